"""One long generation under a budget: finishes, or says where not; bytes, pages by rung and time as
it goes.

    python benchmarks/long_generation.py DIR [--tokens 16384] [--share 0.2] [--policy progressive] [--prompt TEXT]
                                             [--seed 0] [--dtype bfloat16] [--device auto]
                                             [--attention auto] [--json FILE]

`model.generate` continues the prompt to `tokens` tokens in all, sampled with a seed, no token
ending it. The budget is a share of what 16 bits take for them. After every token the cache's
resident bytes are compared with it.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.generation.streamers import BaseStreamer

from kvfold import runtime
from kvfold.compress.models import quiet_transformers
from kvfold.compress.plan import pick_device
from kvfold.exports.reader import read_artifact
from kvfold.pretrained import tokenizer_from_pretrained

MARKS = 16  # lines of the table
RUNGS = ("pages at the searched bits", "4 bits", "8 bits", "16 bits")
PROMPT = "The history of the lighthouse begins with a storm. In the winter of that year,"


class Meter(BaseStreamer):
    """Reads the cache after each token.

    Args:
        cache: what `generate` fills.
        every: tokens between two lines.
    """

    def __init__(self, cache: runtime.QuantizedKVCache, every: int) -> None:
        self.cache, self.every = cache, every
        self.lines: list[dict[str, Any]] = []
        self.most, self.tokens, self.since = 0, 0, time.monotonic()

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.most = max(self.most, self.cache.nbytes)
        before, self.tokens = self.tokens, self.cache.get_seq_length()
        if self.tokens // self.every > before // self.every:
            self.mark()

    def end(self) -> None:
        """Called when the last token has come."""
        if not self.lines or self.lines[-1]["tokens"] != self.tokens:
            self.mark()

    def mark(self) -> None:
        """Adds a line and prints it."""
        now, last = time.monotonic(), self.lines[-1]["tokens"] if self.lines else 0
        rungs = [
            list(layer.table.pool.counts) for layer in self.cache.layers if layer.is_initialized
        ]  # floor first
        line = {
            "tokens": self.tokens,
            "nbytes": self.cache.nbytes,
            "most_nbytes": self.most,
            "ms_per_token": 1e3 * (now - self.since) / max(1, self.tokens - last),
            "pages": [sum(counts) for counts in zip(*rungs, strict=True)],
        }
        self.lines.append(line)
        self.since = now
        held = " | ".join(map(str, line["pages"]))
        print(
            f"| {line['tokens']} | {line['nbytes']} | {line['ms_per_token']:.1f} | {held} |",
            flush=True,
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--policy", default="progressive")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quiet_transformers()
    found = read_artifact(args.artifact)
    budget = int(args.share * 2 * found.geometry.elements(args.tokens, len(found.specs)))
    model: Any = runtime.load_pretrained(
        args.artifact, device=pick_device(args.device), dtype=getattr(torch, args.dtype), policy=args.policy,
        kv_budget=budget, attention=args.attention,
    )  # fmt: skip
    tokenizer = tokenizer_from_pretrained(args.artifact)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    new = args.tokens - inputs.input_ids.shape[1]
    cache = model.new_kv_cache()
    meter = Meter(cache, -(-args.tokens // MARKS))
    set_seed(args.seed)
    print(f"budget {budget} bytes: {args.share:g} of 16 bits at {args.tokens} tokens\n")
    names = RUNGS if args.policy == "progressive" else RUNGS[:1]
    print(
        f"| tokens | bytes | ms a token since | {' | '.join(names)} |\n{'|---' * (3 + len(names))}|"
    )
    begun = time.monotonic()
    out = model.generate(
        **inputs, past_key_values=cache, streamer=meter, max_new_tokens=new, min_new_tokens=new, do_sample=True,
        temperature=0.8, top_p=0.95, top_k=0, pad_token_id=0,
    )  # fmt: skip
    seconds = time.monotonic() - begun
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    distinct = len(set(itertools.pairwise(out[0].tolist()))) / (out.shape[1] - 1)
    print(
        f"\n{out.shape[1]} tokens in {seconds:.0f} s, at most {meter.most} of {budget} bytes; "
        f"distinct pairs {distinct:.3f}"
    )
    print(f"end: …{text[-200:]!r}")
    if args.json:
        facts = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        row = {
            **facts,
            "budget": budget,
            "most_nbytes": meter.most,
            "seconds": seconds,
            "lines": meter.lines,
        }
        args.json.write_text(
            json.dumps({**row, "distinct_pairs": distinct, "text": text}, indent=1),
            encoding="utf-8",
        )
    if meter.most > budget or out.shape[1] != args.tokens:
        raise SystemExit(
            f"{meter.most} bytes of {budget}, {out.shape[1]} tokens of {args.tokens}: not as promised"
        )


if __name__ == "__main__":
    main()
