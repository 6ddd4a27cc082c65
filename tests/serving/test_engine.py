"""An artifact in vLLM's engine against the same artifact in kvfold's own runtime."""

import engine
import pytest
import torch
from engine import (
    MEMORY,
    assert_same,
    metric,
    own,
    serve,
    tokens,
)
from transformers import AutoModelForCausalLM

from kvfold.exports.reader import read_artifact
from kvfold.runtime.vllm.settings import layout_of

pytest_plugins = ("engine",)

PROMPTS = [tokens(n, n) for n in (1, 3, 27, 60, 300, 900)]


@pytest.fixture(scope="module")
def expected(served_artifact):
    """What kvfold's runtime answers to PROMPTS."""
    return own(served_artifact, PROMPTS)


@pytest.fixture(scope="module")
def llm(served_artifact):
    with engine.engine(served_artifact) as made:
        yield made


def test_layers_of_three_formats_give_the_runtimes_tokens(llm, served_artifact, expected):
    assert len(set(read_artifact(served_artifact).formats)) == 3
    assert_same(serve(llm, PROMPTS), expected)


def test_a_second_turn_is_hit_but_for_its_last_tokens(llm):
    """Sinks and window are hit too, and what is read is what was written."""
    first = tokens(1300, 5)
    answered = serve(llm, [first])[0]
    second = [*first, *answered.tokens, *tokens(40, 6)]
    again = serve(llm, [second, first])
    assert again[1].cached >= 0.98 * len(first) and again[0].cached == len(second) // 128 * 128
    assert_same(again[1:], [answered])
    llm.reset_prefix_cache()
    fresh = serve(llm, [second])
    assert fresh[0].cached == 0
    assert_same(again[:1], fresh)


def test_requests_share_what_they_begin_with_in_one_step(llm):
    """The second reads blocks that the first fills in the very same step."""
    llm.reset_prefix_cache()
    text = tokens(700, 7)
    prompts = [text[:300], text, text[:290]]
    together = serve(llm, prompts)
    assert sum(answer.cached for answer in together) > 0
    llm.reset_prefix_cache()
    alone = []
    for prompt in prompts:
        alone += serve(llm, [prompt])
        llm.reset_prefix_cache()
    assert_same(together, alone)


def test_a_block_has_the_bytes_of_all_layers_pages_and_no_more(llm, served_artifact):
    artifact = read_artifact(served_artifact)
    layout, geometry = layout_of(artifact, None), artifact.geometry
    pages = sum(geometry.pair_nbytes(*pair) for pair in artifact.formats)
    raw = (
        layout.raw_block_tokens
        * len(artifact.formats)
        * geometry.num_kv_heads
        * 4
        * geometry.head_dim
    )
    block = max(layout.pages_per_block * pages, raw)
    assert layout.pages_per_block * pages >= raw  # 16-bit rows cost no block more than they fill
    assert llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == MEMORY // block


def test_chunked_prompts_give_the_same_tokens(served_artifact, expected):
    with engine.engine(
        served_artifact, max_num_batched_tokens=48, enable_prefix_caching=False
    ) as llm:
        assert_same(serve(llm, PROMPTS), expected)


def test_preempted_requests_give_what_they_give_alone(served_artifact):
    """Too few blocks for all: requests are thrown out and come back, blocks are evicted."""
    prompts = [tokens(n, n) for n in (400, 420, 380, 410)]
    with engine.engine(served_artifact, num_gpu_blocks_override=24, max_model_len=640,
                       max_num_batched_tokens=128) as llm:  # fmt: skip
        crowded = serve(llm, prompts, 150)
        assert metric(llm, "num_preemptions") > 0
        alone = [serve(llm, [prompt], 150)[0] for prompt in reversed(prompts)][::-1]
    assert_same(crowded, alone)


def test_two_ranks_have_a_head_each(served_artifact, expected):
    with engine.engine(served_artifact, tensor_parallel_size=2) as llm:
        assert_same(serve(llm, PROMPTS), expected)


def test_another_model_beside_it_is_vllms_own(served_folder, served_artifact):
    """In one process, before and after an artifact."""
    prompts = PROMPTS[2:5]
    stock = AutoModelForCausalLM.from_pretrained(served_folder, dtype=torch.float32)
    wanted = [engine.alone(stock, prompt, 8).tokens for prompt in prompts]
    for folder in (served_folder, served_artifact, served_folder):
        with engine.engine(folder) as llm:
            found = [answer.tokens for answer in serve(llm, prompts, 8)]
            config = llm.llm_engine.vllm_config
            assert ("kvfold" in config.additional_config) == (folder == served_artifact)
        if folder == served_folder:
            assert found == wanted
