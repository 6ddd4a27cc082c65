"""The ONNX graphs of an artifact beside the same model's with a 16-bit cache: sizes, tokens/s, and how far from the runtime.

    python benchmarks/onnx_speed.py DIR [--forms packed,gqa8,gqa4,16bit] [--prompt 512] [--new 64] [--threads 2] [--graphs FOLDER]

The prompt is the beginning of the held-out text. `packed` is compared with kvfold's own reference on the same tokens: logits of the
prompt read in one go and of every token generated after it, fed with the reference's tokens, and the greedy text. Every form's KL
is to the 16-bit graph on the prompt. The fastest of all single steps would hide what a busy machine does, so the median is shown.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from kvfold import runtime
from kvfold.compress.models import quiet_transformers
from kvfold.compress.onnx import export_onnx
from kvfold.compress.text import HELD_OUT, read_documents
from kvfold.exports.onnx_runner import OnnxRunner, nbytes

FORMS = {"packed": ("packed", None), "gqa8": ("gqa", 8), "gqa4": ("gqa", 4), "16bit": ("16bit", None)}
PARTS = ("prefill.onnx", "decode.onnx", "weights.bin")


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, float64."""
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference(artifact: Path, ids: np.ndarray, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits of the prompt [T, V], greedy tokens [new], logits that follow them [new, V]) of kvfold's own runtime."""
    model: Any = runtime.load_pretrained(artifact, device="cpu", attention="reference")
    with torch.inference_mode():
        out = model(torch.from_numpy(ids))
        prompt, cache, tokens, later = out.logits[0].numpy(), out.past_key_values, [], []
        token = out.logits[:, -1:].argmax(-1)
        for _ in range(new):
            tokens.append(int(token))
            out = model(token, past_key_values=cache)
            later.append(out.logits[0, 0].numpy())
            token = out.logits[:, -1:].argmax(-1)
    return prompt, np.array(tokens), np.array(later)


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
        later.append(logits[0, 0])
    return {
        "prompt": prompt[0], "later": np.array(later), "prefill_tokens_s": prefill, "decode_tokens_s": 1 / float(np.median(seconds)),
        "cache_bytes": nbytes(cache),
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text", help="text file, or datasets id as ID:CONFIG:SPLIT; default: the held-out text")
    parser.add_argument(
        "--graphs", type=Path, help="folder that keeps the graphs, and those that it has are not exported again"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet_transformers()
    torch.set_num_threads(args.threads)
    _, documents = read_documents(args.text, (HELD_OUT,))
    tokenizer = AutoTokenizer.from_pretrained(args.artifact)
    ids = np.array([tokenizer("\n\n".join(documents))["input_ids"][: args.prompt]], dtype=np.int64)
    prompt, tokens, later = reference(args.artifact, ids, args.new)
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
            got = found[name] = measure(runner, ids, tokens)
            plain = log_softmax(found["16bit"]["prompt"])
            kl = float((np.exp(plain) * (plain - log_softmax(got["prompt"]))).sum(-1).mean())
            row = {
                "form": name, "graph_bytes": {p: (folder / p).stat().st_size for p in PARTS}, "load_s": round(loading, 1),
                "prefill_tokens_s": round(got["prefill_tokens_s"], 1), "decode_tokens_s": round(got["decode_tokens_s"], 2),
                "cache_bytes": got["cache_bytes"], "kl_to_16bit": kl,
            }  # fmt: skip
            if name == "packed":
                text = [int(t[0]) for t in runner.generate(ids, args.new)]
                row["max_logit_error_prompt"] = float(np.abs(got["prompt"] - prompt).max())
                row["max_logit_error_decode"] = float(np.abs(got["later"] - later).max())
                row["rms_logit_error"] = float(np.sqrt(((got["prompt"] - prompt) ** 2).mean()))
                row["same_greedy_tokens"] = f"{sum(a == b for a, b in zip(text, tokens, strict=True))} of {len(tokens)}"
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
