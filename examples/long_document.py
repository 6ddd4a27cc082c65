"""Reads a long document under a byte budget: the cache starts in 16 bits and is lowered only as the
budget fills.

    python long_document.py ARTIFACT DOCUMENT.txt --budget 24MiB --question "What is it about?"

Prints what the cache holds after each chunk, then answers the question from that cache.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from kvfold import KvfoldError, runtime


def pages(cache: runtime.QuantizedKVCache) -> str:
    """How many pages of all layers stand in 16 bits, in between, and on the bits that the
    artifact's search chose."""
    counts: Counter[str] = Counter()
    for layer in cache.report():
        *finer, floor = layer["pages"].values()  # finest first
        for rung, count in enumerate(finer):
            counts["in 8 or 4 bits" if rung else "in 16 bits"] += count
        counts["on the searched bits"] += floor
    return (
        ", ".join(f"{count} {where}" for where, count in counts.items() if count) or "no page yet"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example; `argv` as on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", help="an artifact's folder or Hub id")
    parser.add_argument("document", type=Path, help="a text file")
    parser.add_argument(
        "--budget",
        default="24MiB",
        help="bytes that the cache may never pass (default: %(default)s)",
    )
    parser.add_argument("--question", default="In short,", help="put behind the document")
    parser.add_argument(
        "--chunk", type=int, default=512, help="tokens read at a time (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=48)
    args = parser.parse_args(argv)

    model = runtime.load_pretrained(args.artifact, policy="progressive", kv_budget=args.budget)
    tokenizer = AutoTokenizer.from_pretrained(args.artifact)
    text = args.document.read_text(encoding="utf-8").rstrip() + "\n\n" + args.question
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)

    cache = model.new_kv_cache()
    last = ids.shape[1] - 1  # of the question; generate reads it, and so has logits to begin with
    for start in range(0, last, args.chunk):
        with torch.inference_mode():
            model(
                ids[:, start : min(start + args.chunk, last)],
                past_key_values=cache,
                logits_to_keep=1,
            )
        print(
            f"{cache.get_seq_length():>7} tokens, {cache.nbytes:>11,} of {cache.budget:,} bytes: {pages(cache)}"
        )

    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=args.max_new_tokens, do_sample=False
    )
    print(tokenizer.decode(out[0, last + 1 :], skip_special_tokens=True))


if __name__ == "__main__":
    try:
        main()
    except (
        KvfoldError
    ) as error:  # e.g. KVBudgetExceeded: not even the searched bits fit; nothing was stored
        sys.exit(f"long_document: {error}")
