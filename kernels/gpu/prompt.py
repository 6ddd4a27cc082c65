"""Attention of a prompt's queries to pages and 16-bit rows: pages are decoded to float16, a bounded
run at a time into scratch that the next run overwrites, and dense.py goes over them. Runs under
Triton's interpreter on a CPU too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.compile.launch import launch
from kvfold.kernels.formats import Format
from kvfold.kernels.gpu.dense import Partial, QueryRows, Read, attend_rows
from kvfold.kernels.gpu.device.codec import read_header, to_fp16
from kvfold.kernels.gpu.device.columns import NBYTES
from kvfold.kernels.gpu.device.kinds import decode_elements
from kvfold.kernels.gpu.device.mean import stored_mean
from kvfold.kernels.gpu.device.tiles import TOKEN_TILE, tile_width
from kvfold.kernels.gpu.kinds import own_code
from kvfold.kernels.gpu.mean import StoredMean, mean_rows, stored_mean_arguments
from kvfold.kernels.gpu.records import LogitOptions, Regions
from kvfold.kernels.gpu.tables import format_tables, table_length, warps_for
from kvfold.kernels.kinds.storage import FIELDS
from kvfold.kernels.pages import anchor

SCRATCH_NBYTES = 64 << 20  # of decoded keys and values at a time


class PageRun(NamedTuple):
    """Pages of one pair of formats."""

    key_format: Format
    value_format: Format
    first: int  # entry of the block table
    end: int


@triton.jit(
    do_not_specialize=["table_length", "first", "slow_steps"],
    do_not_specialize_on_alignment=["pages", "keys", "values", "slow"],
)
def _decode_kernel(
    anchor_ptr,
    pages,
    first,
    keys,
    values,
    tables,
    table_length,
    fast,
    slow,
    spans,
    within,
    slow_steps,
    ROWS: tl.constexpr,
    OWN: tl.constexpr,
    MEAN: tl.constexpr,
    DIM: tl.constexpr,
):
    """Grid: (pages, KV heads, keys or values). A tile holds some channels of all tokens."""
    i = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    tokens: tl.constexpr = 8 * ROWS
    width: tl.constexpr = tile_width(TOKEN_TILE, tokens)
    block = anchor_ptr + tl.load(pages + i) * 16
    of_keys = tl.program_id(2) == 0
    if of_keys:
        table = tables
        to = keys
    else:
        table = tables + table_length
        block += heads * tl.load(tables + NBYTES)
        to = values
    block += head * tl.load(table + NBYTES)
    header = read_header(table)
    to += (head.to(tl.int64) * tl.num_programs(0) + i) * (tokens * DIM)
    t = tl.arange(0, tokens)
    at = t[:, None]
    for start in range(0, DIM, width):
        c = start + tl.arange(0, width)[None, :]
        x = decode_elements(block, table, header, at // ROWS, at % ROWS, c, c < DIM, OWN, ROWS)
        if MEAN > 0:
            if of_keys:
                x += stored_mean(
                    fast + head * (MEAN * DIM), slow + head.to(tl.int64) * slow_steps * DIM, spans, within,
                    (first + i) * tokens + t, t >= 0, c, c < DIM, DIM, MEAN,
                )  # fmt: skip
        tl.store(to + at * DIM + c, to_fp16(x), mask=c < DIM)


def decode_pages(
    pages: Tensor,
    key_format: Format,
    value_format: Format,
    keys: Tensor,
    values: Tensor,
    page_tokens: int,
    mean: StoredMean | None = None,
    first: int = 0,
) -> None:
    """Decodes pages, in the order given.

    Args:
        pages: int64 [n], addresses (`page_address`).
        keys, values: float16 [Hkv, n·page_tokens, head_dim], contiguous; written, keys with their
            mean.
        mean: where it turns.
        first: number of the first page in its sequence, whose others follow it; only read with
            `mean`.
    """
    dim = keys.shape[2]
    launch(
        _decode_kernel, (pages.numel(), keys.shape[0], 2),
        anchor(pages.device), pages, first, keys, values,
        format_tables([[key_format, value_format]], page_tokens, pages.device), table_length(dim),
        *stored_mean_arguments(mean, pages.device),
        ROWS=page_tokens // FIELDS, OWN=own_code([key_format, value_format]), MEAN=mean_rows(mean), DIM=dim,
        num_warps=warps_for(page_tokens),
    )  # fmt: skip


class PromptRows(NamedTuple):
    """16-bit rows of one sequence as its prompt reads them: float16 [Hkv, R, head_dim] each, the
    sinks and then the tokens behind `before` packed ones; keys with their mean."""

    keys: Tensor
    values: Tensor
    before: int


def attend_queries(
    queries: QueryRows,
    first_query: int,
    runs: Sequence[PageRun],
    table: Tensor,
    rows: PromptRows,
    regions: Regions,
    logits: LogitOptions,
    out: Tensor,
    mean: StoredMean | None = None,
) -> None:
    """Attention of many queries of one sequence.

    Args:
        first_query: position of the first.
        runs: the pages that any of them reads, in order.
        table: int64 [entries], addresses of the sequence's pages.
        regions: of the cache; `ring` is not read.
        out: [T, num_heads, head_dim], any float type; written.
        mean: of the pages' keys, where it turns.
    """
    heads, _, dim = queries.data.shape
    size = regions.page_tokens
    most = max(1, SCRATCH_NBYTES // (4 * heads * dim * size))
    parts = [
        (run, first, min(first + most, run.end))
        for run in runs
        for first in range(run.first, run.end, most)
    ]
    longest = max((end - first for _, first, end in parts), default=0) * size
    scratch = torch.empty(2, heads * longest * dim, dtype=torch.float16, device=out.device)
    none = rows.keys[:, :0]
    if not parts:
        keys, values = scratch.view(2, heads, 0, dim)
        read = Read(keys, values, regions.sinks, rows.keys, rows.values, first_query, rows.before)
        attend_rows(queries, read, regions, logits, out)
    part: Partial | None = None
    for i, (run, first, end) in enumerate(parts):
        last = i == len(parts) - 1
        keys, values = (
            x[: heads * (end - first) * size * dim].view(heads, -1, dim) for x in scratch
        )
        decode_pages(
            table[first:end], run.key_format, run.value_format, keys, values, size, mean, first
        )
        raw = (rows.keys, rows.values) if last else (none, none)
        read = Read(
            keys, values, regions.sinks + first * size, raw[0], raw[1], first_query, rows.before
        )
        part = attend_rows(queries, read, regions, logits, out, part, last=last)
