"""The ONNX graphs of an artifact beside the same model's with a 16-bit cache: sizes, tokens/s, and
how far from the runtime.

    python benchmarks/onnx_speed.py DIR [--forms packed,gqa8,gqa4,16bit] [--prompt 512] [--new 64] [--threads 2]
                                    [--graphs FOLDER]

The prompt is the beginning of the held-out text. `packed` is compared with kvfold's own reference
on the same tokens: logits of the prompt read in one go and of every token generated after it, fed
with the reference's tokens, and the greedy text; once on the cache that the graphs made themselves,
where a last bit of a key may turn a code, and once on the runtime's own bytes. Beside it stands how
far the runtime is from itself when it reads the prompt in two parts. Every form's KL is to the
16-bit graph on the prompt.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kvfold import runtime
from kvfold.compress.models import quiet_transformers
from kvfold.compress.targets.onnx import export_onnx
from kvfold.compress.text import HELD_OUT, read_documents
from kvfold.exports.onnx.runner import OnnxRunner, nbytes
from kvfold.pretrained import tokenizer_from_pretrained

FORMS = {
    "packed": ("packed", None),
    "gqa8": ("gqa", 8),
    "gqa4": ("gqa", 4),
    "16bit": ("16bit", None),
}
PARTS = ("prefill.onnx", "decode.onnx", "weights.bin")


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, float64."""
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


class Reference(NamedTuple):
    """What kvfold's own runtime computes."""

    prompt: np.ndarray  # logits of the prompt [T, V]
    tokens: np.ndarray  # greedy tokens [new]
    later: np.ndarray  # logits after each of them [new, V]
    caches: list[dict[str, np.ndarray]]  # before each of them, as the graphs take it
    spread: float  # largest difference of two ways to read the prompt: at once, and in two parts


def reference(artifact: Path, ids: np.ndarray, new: int) -> Reference:
    """Reads the prompt and generates greedily."""
    model: Any = runtime.load_pretrained(artifact, device="cpu", attention="reference")
    prompt = torch.from_numpy(ids)
    half = prompt.shape[1] // 2
    with torch.inference_mode():
        out = model(prompt)
        part = model(prompt[:, :half])
        again = model(prompt[:, half:], past_key_values=part.past_key_values).logits
        spread = float((out.logits[:, half:] - again).abs().max())
        logits, cache, tokens, later, caches = (
            out.logits[0].numpy().copy(),
            out.past_key_values,
            [],
            [],
            [],
        )
        token = out.logits[:, -1:].argmax(-1)
        for _ in range(new):
            tokens.append(int(token))
            caches.append(runtime.onnx_inputs(cache))
            out = model(token, past_key_values=cache)
            later.append(out.logits[0, 0].numpy().copy())
            token = out.logits[:, -1:].argmax(-1)
    return Reference(logits, np.array(tokens), np.array(later), caches, spread)


def measure(runner: OnnxRunner, ids: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Logits and speed of one form, fed with the prompt and then with `tokens`."""
    started = time.perf_counter()
    runner.read(ids)
    prefill = ids.shape[1] / (time.perf_counter() - started)
    prompt, cache = runner(ids, runner.empty())
    later, seconds = [], []
    for token in tokens:
        started = time.perf_counter()
        logits, cache = runner(np.array([[token]]), cache)
        seconds.append(time.perf_counter() - started)
        later.append(logits[0, 0].copy())
    return {
        "prompt": prompt[0].copy(),
        "later": np.array(later),
        "prefill_tokens_s": prefill,
        "decode_tokens_s": 1 / float(np.median(seconds)),
        "fastest_tokens_s": 1 / min(seconds),
        "cache_bytes": nbytes(cache),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--text", help="text file, or datasets id as ID:CONFIG:SPLIT; default: the held-out text"
    )
    parser.add_argument(
        "--graphs",
        type=Path,
        help="folder that keeps the graphs, and those that it has are not exported again",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet_transformers()
    torch.set_num_threads(args.threads)
    _, documents = read_documents(args.text, (HELD_OUT,))
    tokenizer = tokenizer_from_pretrained(args.artifact)
    ids = np.array([tokenizer("\n\n".join(documents))["input_ids"][: args.prompt]], dtype=np.int64)
    torch.set_flush_denormal(True)
    ref = reference(args.artifact, ids, args.new)
    rows: list[dict[str, Any]] = []
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ["16bit", *(n for n in args.forms.split(",") if n != "16bit")]:
            folder = (args.graphs or Path(scratch)) / name
            if not folder.is_dir():
                export_onnx(args.artifact, folder, *FORMS[name], None, torch.device("cpu"))
            started = time.perf_counter()
            runner = OnnxRunner(folder, args.threads)
            loading = time.perf_counter() - started
            got = found[name] = measure(runner, ids, ref.tokens)
            plain = log_softmax(found["16bit"]["prompt"])
            kl = float((np.exp(plain) * (plain - log_softmax(got["prompt"]))).sum(-1).mean())
            row = {
                "form": name,
                "graph_bytes": {p: (folder / p).stat().st_size for p in PARTS},
                "load_s": round(loading, 1),
                "prefill_tokens_s": round(got["prefill_tokens_s"], 1),
                "decode_tokens_s": round(got["decode_tokens_s"], 2),
                "fastest_tokens_s": round(got["fastest_tokens_s"], 2),
                "cache_bytes": got["cache_bytes"],
                "kl_to_16bit": kl,
            }
            if name == "packed":
                text = [int(t[0]) for t in runner.generate(ids, args.new)]
                steps = [
                    runner(np.array([[t]]), runner.cache_of(c))[0]
                    for t, c in zip(ref.tokens, ref.caches, strict=True)
                ]
                shared = [np.abs(x[0, 0] - y) for x, y in zip(steps, ref.later, strict=True)]
                apart = np.abs(got["later"] - ref.later)
                row |= {
                    "logit_error_on_the_runtimes_cache": {
                        "max": float(np.max(shared)),
                        "median_of_max": float(np.median([x.max() for x in shared])),
                    },
                    "logit_error_on_its_own": {
                        "prompt_max": float(np.abs(got["prompt"] - ref.prompt).max()),
                        "decode_max": float(apart.max()),
                        "median_of_max": float(np.median(apart.max(-1))),
                    },
                    "worst_token": {
                        "place": int(apart.max(-1).argmax()),
                        "id": int(ref.tokens[apart.max(-1).argmax()]),
                        "error_on_the_runtimes_cache": float(shared[apart.max(-1).argmax()].max()),
                    },
                    "runtime_in_two_parts_max": ref.spread,
                    "same_greedy_token_on_reference_tokens": int(
                        (got["later"].argmax(-1) == ref.later.argmax(-1)).sum()
                    ),
                    "greedy_tokens_until_another": next(
                        (
                            i
                            for i, (a, b) in enumerate(zip(text, ref.tokens, strict=True))
                            if a != b
                        ),
                        len(text),
                    ),
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
            del runner
    report = {
        "artifact": args.artifact.name,
        "prompt": args.prompt,
        "new": args.new,
        "threads": args.threads,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
