"""Old pages in host memory: bytes on the device and there, time of a decoding step, and whether
logits keep their bits.

    python benchmarks/offload.py DIR [--tokens 2048] [--steps 8] [--share 0.5] [--device cpu] [--text TEXT]
                                 [--json FILE]

A text of `tokens` tokens is read, then `steps` more; once with the whole cache on the device, once
with a budget of `share` of its bytes.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold import runtime
from kvfold.compress.models import quiet_transformers
from kvfold.compress.text import HELD_OUT, read_documents
from kvfold.pretrained import tokenizer_from_pretrained

CHUNK = 512  # tokens of the text at a time


def text_ids(artifact: Path, text: str | None, tokens: int) -> Tensor:
    """So many tokens of a text, again from its beginning where it is shorter: int64 [1, tokens].

    Args:
        artifact: whose tokenizer is taken.
        text: file or ID:CONFIG:SPLIT; None for the held-out text.
    """
    _, documents = read_documents(text, (HELD_OUT,))
    tokenizer = tokenizer_from_pretrained(artifact)
    ids = tokenizer("\n\n".join(documents), return_tensors="pt").input_ids
    return ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]


@torch.inference_mode()
def measure(model: Any, ids: Tensor, steps: int) -> tuple[dict[str, Any], Tensor]:
    """(bytes and milliseconds, logits of the steps float [steps, vocab_size]) of ids int64 [1,
    tokens + steps]."""
    cache, tokens, logits, seconds = None, ids.shape[1] - steps, [], []
    for start in range(0, tokens, CHUNK):
        part = ids[:, start : min(start + CHUNK, tokens)]
        cache = model(part, past_key_values=cache, logits_to_keep=1).past_key_values
    assert cache is not None
    for at in range(tokens, tokens + steps):
        begun = time.perf_counter()
        logits.append(
            model(ids[:, at : at + 1], past_key_values=cache).logits[0, -1].cpu()
        )  # waits for the device
        seconds.append(time.perf_counter() - begun)
    found = {
        "device_bytes": cache.nbytes,
        "host_bytes": cache.host_nbytes,
        "ms_per_token": 1e3 * sorted(seconds)[steps // 2],
    }
    return found, torch.stack(logits)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", default="auto")
    parser.add_argument(
        "--text", help="text file, or datasets id as ID:CONFIG:SPLIT; default: the held-out text"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet_transformers()
    ids = text_ids(args.artifact, args.text, args.tokens + args.steps).to(args.device)
    options: dict[str, Any] = {"device": args.device, "attention": args.attention}
    whole, logits = measure(runtime.load_pretrained(args.artifact, **options), ids, args.steps)
    budget = int(args.share * whole["device_bytes"])
    model = runtime.load_pretrained(args.artifact, kv_budget=budget, offload=True, **options)
    parted, again = measure(model, ids, args.steps)
    place = torch.cuda.get_device_name() if ids.device.type == "cuda" else "cpu"
    report = {
        "artifact": args.artifact.name, "device": place, "tokens": args.tokens, "budget": budget,
        "whole": whole, "offload": parted, "logits_equal": torch.equal(logits, again),
    }  # fmt: skip
    print(json.dumps(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
