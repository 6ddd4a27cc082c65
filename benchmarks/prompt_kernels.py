"""Times of the kernels that a prompt's chunk takes in one layer. Needs a GPU, and nothing else at
work on it.

usage: python benchmarks/prompt_kernels.py [--heads 32] [--kv-heads 8] [--dim 128] [--tokens 8192] [--before 24576]
                                           [--pair 2.5a/2a] [--dtype bfloat16]

Random numbers: a chunk of --tokens behind --before packed ones. A line for each kernel has the
least milliseconds of five rounds. Decoding and attention are over all that is packed.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from triton.testing import do_bench

from kvfold.exports.spec import KeySpec
from kvfold.kernels import catalogue
from kvfold.kernels.gpu.dense import Read, attend_rows, query_rows
from kvfold.kernels.gpu.encode import encode_pages
from kvfold.kernels.gpu.mean import stored_mean
from kvfold.kernels.gpu.prompt import decode_pages
from kvfold.kernels.gpu.records import LogitOptions, PageFormat, Regions
from kvfold.kernels.gpu.rows import gather_rows, store_rows
from kvfold.kernels.pages import page_address

PAGE, SINKS, WINDOW = 32, 64, 128


def timed(name: str, call: Callable[[], object]) -> None:
    """Prints the least of five medians."""
    call()
    print(
        f"{name:<10}{min(do_bench(call, return_mode='median') for _ in range(5)):8.3f} ms",
        flush=True,
    )


@torch.inference_mode()
def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser(usage=__doc__)
    for name, usual in (
        ("heads", 32),
        ("kv-heads", 8),
        ("dim", 128),
        ("tokens", 8192),
        ("before", 24576),
    ):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--pair", default="2.5a/2a")
    parser.add_argument("--dtype", default="bfloat16")
    o = parser.parse_args()
    kv, dim, tokens, before = o.kv_heads, o.dim, o.tokens, o.before
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    fmt = PageFormat(*dict(zip(catalogue.PAIRS, catalogue.pairs(dim), strict=True))[o.pair])
    turns = torch.tensor([5e5 ** (-2 * i / dim) for i in range(dim // 2)]).tolist()
    spec = KeySpec(
        fmt.key, matrix=torch.linalg.qr(torch.randn(kv, dim, dim))[0], offset=torch.randn(kv, dim),
        frequencies=tuple(turns),
    )  # fmt: skip
    end = SINKS + before + tokens
    mean = stored_mean(spec.tables(SINKS), spec.mean_bases, end)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=getattr(torch, o.dtype))

    nbytes = kv * (fmt.key.nbytes(PAGE) + fmt.value.nbytes(PAGE))
    step = -(-nbytes // 16) * 16
    data = torch.zeros((before + tokens) // PAGE, step, dtype=torch.uint8)
    pages = torch.tensor([page_address(x) for x in data])
    keys, values = random(tokens, kv, dim), random(tokens, kv, dim)
    stored = torch.empty(2, kv, tokens, dim, dtype=torch.float16)
    positions = SINKS + before + torch.arange(tokens)
    places = torch.arange(tokens) * dim
    query = random(o.heads, tokens, dim)
    timed("store", lambda: store_rows(
        keys, values, positions, places, spec.matrix, None, mean, SINKS, stored[0], stored[1], tokens * dim
    ))  # fmt: skip
    timed("gather", lambda: gather_rows(
        stored[0], stored[1], tokens * dim, positions, places, kv, dim, mean, SINKS, copy=True
    ))  # fmt: skip
    starts = torch.arange(tokens // PAGE, dtype=torch.int32) * PAGE
    timed("encode", lambda: encode_pages(
        stored[0][None], stored[1][None], fmt, pages[before // PAGE :], torch.zeros_like(starts), starts,
        page_tokens=PAGE,
    ))  # fmt: skip
    for first in range(0, before, tokens):  # so that decoding finds codes
        where = pages[first // PAGE : (first + tokens) // PAGE]
        encode_pages(
            stored[0][None], stored[1][None], fmt, where, torch.zeros_like(starts[: len(where)]),
            starts[: len(where)], page_tokens=PAGE,
        )  # fmt: skip
    packed = (before + tokens - WINDOW) // PAGE * PAGE
    read = torch.empty(2, kv, packed, dim, dtype=torch.float16)
    timed("decode", lambda: decode_pages(
        pages[: packed // PAGE], fmt.key, fmt.value, read[0], read[1], PAGE, mean, 0
    ))  # fmt: skip
    timed("queries", lambda: query_rows(query, kv, spec.query_matrix, dim**-0.5))
    rows = query_rows(query, kv, spec.query_matrix, dim**-0.5)
    sinks = torch.randn(kv, SINKS, dim).half()
    raw = [torch.cat([sinks, x], 1) for x in stored]
    out = torch.empty(tokens, o.heads, dim, dtype=query.dtype)
    what = Read(read[0], read[1], SINKS, *raw, query=SINKS + before, before=before)
    regions = Regions(SINKS, WINDOW, PAGE)
    timed("attention", lambda: attend_rows(rows, what, regions, LogitOptions(), out))
    products = 4 * o.heads * dim * tokens * (before + tokens / 2)
    print(f"attention is {products / 1e12:.2f} TFLOP")


if __name__ == "__main__":
    main()
