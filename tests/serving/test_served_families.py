"""Tiny artifacts of every family that is served: vLLM computes around attention what transformers
computes."""

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor

import engine
import pytest
from conftest import CONFIGS, TINY_RECIPE, save_tiny
from engine import own, serve, tokens

from kvfold import KvfoldError
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.runtime.vllm.families import SERVED

# sliding windows, soft-capped logits, sink logits, biases, norms of queries and keys, one projection
# for all three
FEW = {"gemma2", "gemma3_text", "gpt_oss", "qwen2", "qwen3", "phi3"}
PROMPTS = [tokens(n, n) for n in (27, 60, 300)]
# heads of these models look at few tokens, so that a code which rounding turns is worth more than in
# test_engine.py, and a near tie may go the other way; what is wrong shows from the first token on
LEAST, WITHIN = 10, 0.03


@pytest.fixture(scope="module")
def apart():
    """A process that never has an engine: vLLM changes transformers' layers where it runs them."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def make(folder, family, text_file):
    """An artifact of a family, of the fewest bits from 4 on that its windows allow."""
    with pytest.MonkeyPatch.context() as patch:
        if family.startswith(
            ("gemma", "cohere", "vaultgemma")
        ):  # vLLM knows them with a tied head alone
            config = CONFIGS[family]()
            config.tie_word_embeddings = True
            patch.setitem(CONFIGS, family, lambda: config)
        save_tiny(folder / "model", family)
    (folder / "tiny.yaml").write_text(TINY_RECIPE)
    recipe, options = (
        load_recipe(folder / "tiny.yaml"),
        {"calib": str(text_file), "accept_loss": True},
    )
    try:
        compress(str(folder / "model"), "4", folder / "artifact", recipe=recipe, **options)
    except KvfoldError as error:
        least = float(re.search(r"at least ([\d.]+) bits", str(error))[1])
        compress(
            str(folder / "model"), f"{least + 0.5}", folder / "artifact", recipe=recipe, **options
        )
    return folder / "artifact"


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in FEW else pytest.mark.slow) for f in sorted(SERVED)]
)
def test_a_family_gives_the_runtimes_tokens(family, tmp_path, text_file, apart):
    artifact = make(tmp_path, family, text_file)
    expected = apart.submit(own, str(artifact), PROMPTS).result()
    with engine.engine(artifact, max_num_batched_tokens=128) as llm:
        found = serve(llm, PROMPTS)
    for a, b in zip(found, expected, strict=True):
        same = [x == y for x, y in zip(a.tokens, b.tokens, strict=True)]
        until = same.index(False) if False in same else len(same)
        assert until >= LEAST
        worst = max(abs(x - y) for x, y in zip(a.logprobs[:until], b.logprobs, strict=False))
        assert worst <= WITHIN
