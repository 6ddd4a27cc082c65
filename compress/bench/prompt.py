"""`kvfold bench prompt`: a prompt read into the packed cache against transformers' 16-bit cache,
after the correctness gate."""

import itertools
import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvfold.compress.bench.cases import Pair
from kvfold.compress.bench.decode import wait
from kvfold.compress.bench.gate import LARGEST_ERROR
from kvfold.compress.bench.model import attach_formats, build_model, free_memory, layer_formats
from kvfold.exports.account import Geometry
from kvfold.kernels.attention import Tile, attend
from kvfold.kernels.gpu.attention import Prompt, attention
from kvfold.kernels.gpu.dense import query_rows
from kvfold.kernels.gpu.prompt import PageRun, PromptRows, attend_queries
from kvfold.kernels.gpu.queries import prepare_queries
from kvfold.kernels.gpu.records import LogitOptions, PagedCache, Regions
from kvfold.kernels.pages import page_address
from kvfold.kernels.quantizer import decode, encode
from kvfold.runtime.backends.choose import backend_of
from kvfold.runtime.cache.cache import QuantizedKVCache

REPEATS = 3
MANY_SINKS = 100  # more than one block of 16-bit rows: the gate's second number


def prompt_error(
    geometry: Geometry,
    formats: Pair,
    num_heads: int,
    tokens: int,
    queries: int,
    decoded: bool,
    device: torch.device,
) -> float:
    """Largest relative error of any head, kernels against float32 on the same codes: the last
    `queries` of `tokens` tokens of a sequence, all of it in one call, in float16.

    Args:
        decoded: pages are decoded for all queries, as for many of them; else read as they are
            packed, as by a step.
    """
    g, dim = geometry, geometry.head_dim
    raw = [torch.randn(g.num_kv_heads, tokens, dim, device=device).half() for _ in range(2)]
    read = [x.float() for x in raw]
    count = g.num_pages(tokens)
    pages = []
    for i in range(count):
        at = slice(g.sinks + i * g.page_tokens, g.sinks + (i + 1) * g.page_tokens)
        blocks = [encode(x[:, at], fmt) for x, fmt in zip(raw, formats, strict=True)]
        for side, block, fmt in zip(read, blocks, formats, strict=True):
            side[:, at] = decode(block, fmt, g.page_tokens)
        pages.append(torch.cat([block.flatten() for block in blocks]))
    table = torch.tensor([[page_address(page) for page in pages] or [0]], device=device)
    first = tokens - queries
    places = torch.arange(tokens, device=device)
    limit = (
        g.sinks
        + (places[first:] + 1 - g.sinks - g.window).clamp_min(0) // g.page_tokens * g.page_tokens
    )
    middle = slice(g.sinks, g.sinks + count * g.page_tokens)
    tiles = [
        Tile(raw[0], raw[1], places, False),
        Tile(read[0][:, middle], read[1][:, middle], places[middle], True),
    ]
    query = (2 * torch.randn(1, num_heads, queries, dim, device=device)).half()
    want = attend(query[0], places[first:], limit, tiles, sinks=g.sinks, scaling=dim**-0.5)
    out = torch.full((1, queries, num_heads, dim), torch.nan, dtype=torch.float16, device=device)
    regions = Regions(g.sinks, g.window, g.page_tokens)
    if decoded:
        rows = query_rows(query[0], g.num_kv_heads, None, dim**-0.5)
        runs = [PageRun(*formats, 0, count)] if count else []
        attend_queries(
            rows,
            first,
            runs,
            table[0],
            PromptRows(raw[0], raw[1], 0),
            regions,
            LogitOptions(),
            out[0],
        )
    else:
        numbers = partial(torch.tensor, dtype=torch.int32, device=device)
        attention(
            prepare_queries(query, g.num_kv_heads, dim**-0.5),
            PagedCache(table, numbers([[tokens, count]]), raw[0][None], raw[1][None]),
            [formats],
            out,
            regions,
            prompt=Prompt(numbers([first]), numbers([0])),
        )
    error = (out[0].transpose(0, 1).float() - want).norm(dim=(1, 2)) / want.norm(dim=(1, 2))
    return float(error.max())


def gate(
    formats: dict[str, Pair],
    regions: tuple[int, int, int],
    heads: tuple[int, int],
    tokens: int,
    device: torch.device,
):
    """Checks of every pair of formats: [(what, error, largest error allowed)]; NaN errors fail
    too."""
    found = []
    for (name, pair), sinks in itertools.product(
        formats.items(), dict.fromkeys((regions[0], MANY_SINKS))
    ):
        geometry = Geometry(heads[1], pair[0].head_dim, sinks, *regions[1:])
        for decoded in (True, False):
            error = prompt_error(
                geometry, pair, heads[0], tokens, min(tokens, tokens // 4 | 1), decoded, device
            )
            what = "pages decoded" if decoded else "pages as they are packed"
            found.append((f"{name}, {sinks} sinks, {what}", error, LARGEST_ERROR[torch.float16]))
    return found


@torch.no_grad()
def read_ms(model: Any, make_cache: Any, ids: Tensor, chunk: int) -> tuple[float, int | None]:
    """(milliseconds until the last token's logits, the median of REPEATS; peak bytes beyond what
    was allocated before)."""
    device = ids.device

    def run() -> float:
        cache = make_cache()
        wait(device)
        start = time.perf_counter()
        for part in ids.split(chunk, 1):
            logits = model(
                input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
        wait(device)
        assert bool(logits.isfinite().all())
        return (time.perf_counter() - start) * 1e3

    run()  # compiles
    free_memory(device)
    peak = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    ms = statistics.median(run() for _ in range(REPEATS))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before
    free_memory(device)
    return ms, peak


def prompt_rows(
    shape: str,
    tokens: int,
    chunk: int,
    names: list[str],
    baseline: bool,
    regions: tuple[int, int, int],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Times a prompt of one sequence, one row a format, the baseline (DynamicCache, sdpa, the same
    chunks) first.

    Returns:
        cache (a format or "dynamic"), shape, tokens, chunk, ms, tokens_per_s, peak_bytes beyond the
        weights (None on a CPU), and `ratio`, the baseline's ms over this row's (None without one).
    """
    model = build_model(shape, device)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
    rows: list[dict[str, Any]] = []

    def add(name: str, found: tuple[float, int | None], base: float | None) -> None:
        ms, peak = found
        ratio = None if base is None else base / ms
        rows.append(
            {
                "cache": name,
                "shape": shape,
                "tokens": tokens,
                "chunk": chunk,
                "ms": ms,
                "tokens_per_s": tokens / ms * 1e3,
                "peak_bytes": peak,
                "ratio": ratio,
            }
        )

    if baseline:
        add("dynamic", read_ms(model, lambda: DynamicCache(config=model.config), ids, chunk), None)
    base = rows[0]["ms"] if rows else None
    g = Geometry(model.config.num_key_value_heads, model.config.head_dim, *regions)
    for name in names:
        formats = layer_formats(name, g.head_dim, model.config.num_hidden_layers)
        artifact, triton = attach_formats(model, formats, g)
        add(
            name,
            read_ms(
                model,
                lambda a=artifact, t=triton: QuantizedKVCache(a.specs, g, None, backend_of(t)),
                ids,
                chunk,
            ),
            base,
        )
    return rows
