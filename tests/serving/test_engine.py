"""An artifact in vLLM's engine against the same artifact in kvfold's own runtime."""

import shutil

import engine
import pytest
import torch
from conftest import CONFIGS, TINY_RECIPE, save_tiny
from engine import MEMORY, assert_same, metric, own, serve, tokens
from transformers import AutoModelForCausalLM

from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.exports.reader import read_artifact
from kvfold.runtime.vllm.settings import layout_of

PROMPTS = [tokens(n, n) for n in (1, 3, 27, 60, 300, 900)]
SINKS, WINDOW = 3, 24


@pytest.fixture(scope="module")
def expected(tiny_artifact):
    """What kvfold's runtime answers to PROMPTS."""
    return own(tiny_artifact, PROMPTS)


@pytest.fixture(scope="module")
def llm(tiny_artifact):
    with engine.engine(tiny_artifact) as made:
        yield made


def test_layers_of_three_formats_give_the_runtimes_tokens(llm, tiny_artifact, expected):
    assert len(set(read_artifact(tiny_artifact).formats)) == 3
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


def test_a_block_has_the_bytes_of_all_layers_pages_and_no_more(llm, tiny_artifact):
    artifact = read_artifact(tiny_artifact)
    layout, geometry = layout_of(artifact, None), artifact.geometry
    pages = sum(geometry.pair_nbytes(*pair) for pair in artifact.formats)
    raw = layout.raw_block_tokens * len(artifact.formats) * geometry.num_kv_heads * 4 * geometry.head_dim
    block = max(layout.pages_per_block * pages, raw)
    assert layout.pages_per_block * pages >= raw  # 16-bit rows cost no block more than they fill
    assert llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == MEMORY // block


def test_chunked_prompts_give_the_same_tokens(tiny_artifact, expected):
    with engine.engine(tiny_artifact, max_num_batched_tokens=48, enable_prefix_caching=False) as llm:
        assert_same(serve(llm, PROMPTS), expected)


def test_preempted_requests_give_what_they_give_alone(tiny_artifact):
    """Too few blocks for all: requests are thrown out and come back, blocks are evicted."""
    prompts = [tokens(n, n) for n in (400, 420, 380, 410)]
    with engine.engine(tiny_artifact, num_gpu_blocks_override=40, max_model_len=640,
                       max_num_batched_tokens=128) as llm:  # fmt: skip
        crowded = serve(llm, prompts, 150)
        assert metric(llm, "num_preemptions") > 0
        alone = [serve(llm, [prompt], 150)[0] for prompt in reversed(prompts)][::-1]
    assert_same(crowded, own(tiny_artifact, prompts, 150), 5e-3)
    assert_same(crowded, alone, 5e-3)


def test_ngram_drafts_change_no_token(tiny_artifact):
    text = tokens(30, 2) * 4
    prompts = [text, tokens(200, 3), text[:50]]
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine.engine(tiny_artifact, speculative_config=drafts) as llm:
        found = serve(llm, prompts, 100)
        assert metric(llm, "spec_decode_num_draft_tokens") > 20
    assert_same(found, own(tiny_artifact, prompts, 100))


def test_two_ranks_have_a_head_each(tiny_artifact, expected):
    with engine.engine(tiny_artifact, tensor_parallel_size=2) as llm:
        assert_same(serve(llm, PROMPTS), expected)


def test_another_model_beside_it_is_vllms_own(tiny_folder, tiny_artifact):
    """In one process, before and after an artifact."""
    prompts = PROMPTS[2:5]
    stock = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    wanted = [engine._own(stock, prompt, 8).tokens for prompt in prompts]
    for folder in (tiny_folder, tiny_artifact, tiny_folder):
        with engine.engine(folder) as llm:
            found = [answer.tokens for answer in serve(llm, prompts, 8)]
            config = llm.llm_engine.vllm_config
            assert ("kvfold" in config.additional_config) == (folder == tiny_artifact)
        if folder == tiny_folder:
            assert found == wanted


@pytest.fixture(scope="module")
def family_artifact(tmp_path_factory, text_file):
    """Makes a tiny artifact of a family."""

    def make(family: str, bits: str):
        folder = tmp_path_factory.mktemp(family)
        with pytest.MonkeyPatch.context() as patch:
            stock = CONFIGS[family]
            if family == "gemma2":  # vLLM knows it with a tied head alone
                patch.setitem(CONFIGS, family, lambda: _tied(stock()))
            save_tiny(folder / "model", family)
        (folder / "tiny.yaml").write_text(TINY_RECIPE)
        recipe = load_recipe(folder / "tiny.yaml")
        compress(str(folder / "model"), bits, folder / "artifact", calib=str(text_file), recipe=recipe)
        shutil.rmtree(folder / "model")
        return folder / "artifact"

    return make


def _tied(config):
    config.tie_word_embeddings = True
    return config


@pytest.mark.parametrize(
    ("family", "bits"),
    [("gemma2", "6"), ("gemma3_text", "6"), ("gpt_oss", "6"), ("qwen2", "4"), ("qwen3", "4"), ("phi3", "15")],
)
def test_families(family_artifact, family, bits):
    """Sliding windows, soft-capped logits, sink logits, biases, norms of queries and keys, one
    projection for all three."""
    artifact = family_artifact(family, bits)
    prompts = PROMPTS[2:5]
    wanted = own(artifact, prompts)
    with engine.engine(artifact, max_num_batched_tokens=128) as llm:
        assert_same(serve(llm, prompts), wanted)
