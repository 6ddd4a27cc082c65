"""Decoding time a token against the number of cached tokens: the plain-torch reference and
transformers' DynamicCache, in one run.

usage: python benchmarks/cpu_decode.py [--tokens 1024,2048,4096,8192,16384] [--key-bits 4] [--value-bits 2] [--steps 12]
                                       [--layers 4] [--heads 8] [--kv-heads 2] [--head-dim 64]
                                       [--threads 1] [--dtype float32] [--clock wall] [--json FILE]

A random model of the shape given; caches are filled with random keys and values, then steps of all
caches take turns, so that other load on the machine falls on all of them alike. Prints the fastest
of the steps, and how each grows from the first length on.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig

from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, uniform
from kvfold.pretrained import model_from_config
from kvfold.runtime.backends.transformers import NAME
from kvfold.runtime.budget.ladder import Ladders
from kvfold.runtime.cache.cache import QuantizedKVCache

FILL = 1024  # tokens appended at a time
# a processor's time, of all threads, leaves out what a step waits for on a busy machine
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PLAIN, FLOOR, PROGRESSIVE = CACHES = ("DynamicCache", "floor", "progressive")


def build(options: argparse.Namespace) -> Any:
    """A random model on the CPU."""
    torch.manual_seed(0)
    width = options.heads * options.head_dim
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        vocab_size=1024,
        max_position_embeddings=1 << 20,
    )
    return (
        model_from_config(config, attn_implementation=NAME).to(getattr(torch, options.dtype)).eval()
    )


def caches_of(options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Filled caches by name; the progressive one has a fifth of 16 bits."""
    dim = options.head_dim
    key = Format(((dim, 2**options.key_bits),))
    spec = LayerSpec(
        KeySpec(key, matrix=torch.eye(dim).repeat(options.kv_heads, 1, 1)),
        ValueSpec(uniform(dim, 2**options.value_bits)),
    )
    specs, geometry = [spec] * options.layers, Geometry(options.kv_heads, dim, 4, 128, 32)
    ladders = Ladders(specs, [(1.0, 1.0)] * options.layers, geometry)
    least = ladders.least_nbytes(geometry, tokens + 2 * options.steps)
    budget = max(least, int(0.2 * 2 * geometry.elements(tokens, options.layers)))
    found = {
        PLAIN: DynamicCache(),
        FLOOR: QuantizedKVCache(specs, geometry),
        PROGRESSIVE: QuantizedKVCache(specs, geometry, budget, ladders=ladders),
    }
    for cache in found.values():
        generator = torch.Generator().manual_seed(1)
        for _ in range(0, tokens, FILL):
            for layer in range(options.layers):
                shape = (2, 1, options.kv_heads, min(FILL, tokens), dim)
                cache.update(
                    *torch.randn(shape, generator=generator).to(getattr(torch, options.dtype)),
                    layer,
                )
    return found


@torch.inference_mode()
def measure(options: argparse.Namespace, model: Any, tokens: int) -> dict[str, float]:
    """Least milliseconds of a decoding step on each cache."""
    caches = caches_of(options, tokens)
    ids = torch.zeros(1, 1, dtype=torch.long)
    clock = CLOCKS[options.clock]
    found: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(options.steps):
        for name, cache in caches.items():
            begun = clock()
            model(input_ids=ids, past_key_values=cache, use_cache=True)
            found[name].append(1e3 * (clock() - begun))
    return {name: min(times) for name, times in found.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: milliseconds, and as a multiple of the first length's."""
    names = [name for name in CACHES if name in rows[0]]
    lines = [f"| cached tokens | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = " | ".join(
            f"{row[name]:.2f} ms ({row[name] / rows[0][name]:.2f}×)" for name in names
        )
        lines.append(f"| {row['tokens']} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="1024,2048,4096,8192,16384")
    parser.add_argument("--key-bits", type=int, default=4)
    parser.add_argument("--value-bits", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--dtype", default="float32", help="that the model computes in, and so of DynamicCache"
    )
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu: time on the processor, by which a busy machine counts less",
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    model = build(options)
    rows = []
    for tokens in (int(part) for part in options.tokens.split(",")):
        rows.append({"tokens": tokens, **measure(options, model, tokens)})
        print(rows[-1], flush=True)
    print(table(rows))
    if options.json:
        options.json.write_text(
            json.dumps({"options": {**vars(options), "json": None}, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
