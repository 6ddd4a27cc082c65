"""vLLM in the tests' own process, and the same prompts through kvfold's runtime. Importing it skips
the module that does where vLLM is not installed."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import CONFIGS, SHAPE, TINY_RECIPE, char_tokenizer, tiny_model
from transformers import LlamaConfig

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
pytest.importorskip("vllm")

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.runtime.load import load_pretrained

MEMORY = 16 << 20  # bytes of an engine's cache


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory) -> Path:
    """A tiny Llama with heads of 32 channels, the fewest that vLLM's own attention takes on a CPU,
    and so flat that a code that rounding turns is worth less than 1e-3 nats."""
    folder = tmp_path_factory.mktemp("models") / "served"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "llama", lambda: LlamaConfig(**{**SHAPE, "head_dim": 32}))
        model = tiny_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.mul_(0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def served_artifact(tmp_path_factory, served_folder, text_file) -> Path:
    """Its artifact, whose three layers have three pairs of formats; don't write into it."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "tiny.yaml").write_text(TINY_RECIPE)
    recipe = load_recipe(folder / "tiny.yaml")
    out = folder / "artifact"
    compress(str(served_folder), "4.0", out, calib=str(text_file), recipe=recipe)
    return out


class Answer(NamedTuple):
    """Greedy tokens behind one prompt.

    Attributes:
        tokens: those tokens.
        logprobs: of each, in nats.
        cached: tokens of the prompt that were in the engine's cache.
        seconds: the next best of each and by how many nats it was less probable; empty if nobody
            asked.
    """

    tokens: list[int]
    logprobs: list[float]
    cached: int = 0
    seconds: Sequence[tuple[int, float]] = ()


@contextmanager
def engine(model: object, **options: Any) -> Iterator[LLM]:
    """An engine for a folder, in float32 and without a tokenizer; `options` are vLLM's."""
    usual: dict[str, Any] = {
        "skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32", "max_model_len": 2048,
        "max_num_seqs": 8, "kv_cache_memory_bytes": MEMORY, "disable_log_stats": False,
    }  # fmt: skip
    llm = LLM(str(model), **{**usual, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def serve(llm: LLM, prompts: Sequence[list[int]], new: int = 24) -> list[Answer]:
    """`new` greedy tokens behind each prompt, all at once."""
    how = SamplingParams(
        max_tokens=new, temperature=0, detokenize=False, logprobs=2, ignore_eos=True
    )
    found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False)
    return [_answer(request) for request in found]


def _answer(request: Any) -> Answer:
    out = request.outputs[0]
    tokens = list(out.token_ids)
    logprobs = [step[token].logprob for step, token in zip(out.logprobs, tokens, strict=True)]
    seconds = []
    for token, step in zip(tokens, out.logprobs, strict=True):
        other = max((x for x in step if x != token), key=lambda x: step[x].logprob)
        seconds.append((other, step[token].logprob - step[other].logprob))
    return Answer(tokens, logprobs, request.num_cached_tokens, seconds)


def own(model: object, prompts: Sequence[list[int]], new: int = 24) -> list[Answer]:
    """The same one by one through kvfold's runtime."""
    loaded = load_pretrained(str(model), dtype=torch.float32, device="cpu")
    return [alone(loaded, ids, new) for ids in prompts]


def alone(model: Any, prompt: list[int], new: int) -> Answer:
    """The same of one prompt, through a transformers model."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        return_dict_in_generate=True, output_logits=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    tokens = found.sequences[0, len(prompt) :].tolist()
    logprobs = [
        float(logits[0].float().log_softmax(-1)[token])
        for logits, token in zip(found.logits, tokens, strict=True)
    ]
    return Answer(tokens, logprobs)


def assert_same(found: Sequence[Answer], expected: Sequence[Answer], within: float = 0.02) -> None:
    """The same tokens, and log-probabilities within so many nats: sums in another order tip a token's
    scale between two that are equally good now and then. So where the two best tokens are that close,
    either may come, and what follows is another text: it is compared up to there, which must be half
    of all tokens at least."""
    compared = 0
    for a, b in zip(found, expected, strict=True):
        assert len(a.tokens) == len(b.tokens)
        same = (
            i for i, pair in enumerate(zip(a.tokens, b.tokens, strict=True)) if len({*pair}) > 1
        )
        until = next(same, len(a.tokens))
        if until < len(a.tokens):
            assert a.seconds, "another token, and nobody asked which was the next best"
            other, gap = a.seconds[until]
            assert other == b.tokens[until] and gap < 2 * within
        compared += until
        torch.testing.assert_close(
            torch.tensor(a.logprobs[:until]), torch.tensor(b.logprobs[:until]), atol=within, rtol=0
        )
    assert compared >= sum(len(a.tokens) for a in found) / 2


def metric(llm: LLM, name: str) -> float:
    """A counter of the engine's."""
    return next(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def tokens(count: int, seed: int = 1) -> list[int]:
    """Random tokens of the tiny models' vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 120, (count,), generator=generator).tolist()
