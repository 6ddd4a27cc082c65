"""An artifact in vLLM against kvfold's own runtime on the same device: greedy tokens behind random
prompts, their log-probabilities, and what prefix caching finds. On a GPU decoding steps are replayed
from CUDA graphs.

usage: python benchmarks/served_tokens.py ARTIFACT [--lengths 40,200,700,1300] [--new 48] [--dtype float32]
                                          [--memory 1GiB] [--eager]

Prompts go in together, together once more, so that blocks are hit, and one by one. Ends with 1 where a
token differs whose next best was more than TIE nats away, or a log-probability before that differs by
more. Where vLLM lacks the package flashinfer, say VLLM_USE_FLASHINFER_SAMPLER=0 in front.
"""

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

TIE = 0.1  # nats


class Answer(NamedTuple):
    """Greedy tokens behind one prompt: their log-probabilities, how far the next best was, and the
    prompt's tokens that were in the engine's cache."""

    tokens: list[int]
    logprobs: list[float]
    gaps: list[float]
    cached: int = 0


def own_answers(options: argparse.Namespace, prompts: list[list[int]], device: str) -> list[Answer]:
    """By kvfold's runtime, one by one."""
    import torch

    from kvfold import runtime

    dtype = getattr(torch, options.dtype)
    model: Any = runtime.load_pretrained(options.artifact, dtype=dtype, device=device)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.new, min_new_tokens=options.new,
            do_sample=False, return_dict_in_generate=True, output_logits=True, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        tokens = out.sequences[0, len(prompt) :].tolist()
        steps = [logits[0].float().log_softmax(-1) for logits in out.logits]
        best = [step.topk(2).values.tolist() for step in steps]
        logprobs = [float(step[token]) for step, token in zip(steps, tokens, strict=True)]
        found.append(Answer(tokens, logprobs, [first - second for first, second in best]))
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


def engine(options: argparse.Namespace, longest: int) -> Any:
    """vLLM with the artifact."""
    from vllm import LLM

    from kvfold.exports.units import parse_nbytes

    graphs = {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8],
    }
    how = {"enforce_eager": True} if options.eager else {"compilation_config": graphs}
    return LLM(
        options.artifact, skip_tokenizer_init=True, dtype=options.dtype, max_model_len=longest + options.new,
        max_num_seqs=8, max_num_batched_tokens=512, kv_cache_memory_bytes=parse_nbytes(options.memory),
        gpu_memory_utilization=0.5, seed=0, **how,
    )  # fmt: skip


def served_answers(llm: Any, prompts: list[list[int]], new: int) -> list[Answer]:
    """By vLLM, all at once."""
    from vllm import SamplingParams

    how = SamplingParams(
        max_tokens=new, temperature=0, detokenize=False, logprobs=1, ignore_eos=True
    )
    asked: Any = [{"prompt_token_ids": ids} for ids in prompts]
    found = []
    for request in llm.generate(asked, how, use_tqdm=False):
        out = request.outputs[0]
        tokens = list(out.token_ids)
        logprobs = [step[token].logprob for step, token in zip(out.logprobs, tokens, strict=True)]
        found.append(Answer(tokens, logprobs, [], request.num_cached_tokens))
    return found


def row(what: str, prompt: int, found: Answer, own: Answer) -> tuple[str, bool]:
    """A line of the table, and whether the two agree."""
    pairs = enumerate(zip(found.tokens, own.tokens, strict=True))
    same = next((i for i, (a, b) in pairs if a != b), len(own.tokens))
    apart = [abs(a - b) for a, b in zip(found.logprobs[:same], own.logprobs[:same], strict=True)]
    gap = own.gaps[same] if same < len(own.tokens) else 0.0
    worst = max(apart, default=0.0)
    cells = (what, prompt, f"{same} of {len(own.tokens)}", f"{worst:.4f}", found.cached)
    return "| " + " | ".join(map(str, cells)) + " |", gap <= TIE and worst <= TIE


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--lengths", default="40,200,700,1300")
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = [int(x) for x in options.lengths.split(",")]
    vocabulary = json.loads((Path(options.artifact) / "config.json").read_text())["vocab_size"]
    prompts = [
        torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        for n in lengths
    ]
    expected = own_answers(options, prompts, device)
    llm = engine(options, max(lengths))
    print("| prompts | tokens | the same | log-probabilities apart, nats | found in the cache |")
    print("|---|---|---|---|---|")
    good = True
    for what, batches in (
        ("together", [prompts]),
        ("again", [prompts]),
        ("one by one", [[x] for x in prompts]),
    ):
        found = [x for batch in batches for x in served_answers(llm, batch, options.new)]
        for length, served, own in zip(lengths, found, expected, strict=True):
            line, agree = row(what, length, served, own)
            print(line, flush=True)
            good &= agree
    llm.llm_engine.engine_core.shutdown()
    sys.exit(not good)


if __name__ == "__main__":
    main()
