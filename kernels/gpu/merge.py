"""Merges the parts of split-K attention by their maxima, and moves the sequences' state on."""

import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.compile.launch import launch
from kvfold.kernels.gpu.device.constants import LOG2_E, NEVER
from kvfold.kernels.gpu.queries import Queries
from kvfold.kernels.gpu.records import Regions

MOST_SLOTS = 2048  # parts that one query's result is merged from
CHANNELS = 32  # of a program
FEW_SLOTS, MANY_SLOTS = 32, 256  # parts that it asks for at once
WARPS = 4


@triton.jit(
    do_not_specialize=[
        "new", "sinks", "window", "page_tokens", "heads", "query_blocks", "queries", "slots", "padded",
        "columns", "group",
        "advance", "out_stride_b", "out_stride_t", "out_stride_h",
    ],
    do_not_specialize_on_alignment=["ml_ptr", "out", "aux", "q_shift_ptr", "state"],
)  # fmt: skip
def _merge_kernel(
    o_ptr, ml_ptr, out, aux, q_shift_ptr, state, new, sinks, window, page_tokens, heads, query_blocks, queries, slots,
    padded, columns, group, advance, out_stride_b, out_stride_t, out_stride_h,
    DIM: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ONCE: tl.constexpr, AUX: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences × KV heads × query blocks, columns, runs of CHANNELS). Merges the parts of
    one query and, with `advance`, moves the sequence's length and number of pages on by `new`
    tokens. Parts of no weight may be unwritten.

    Columns that are queries are `columns` of `padded`. ONCE: there are no more than BLOCK slots.
    Otherwise the sums are taken in an order that the number of slots has no part in.
    """
    place = tl.program_id(0)
    n = tl.program_id(1)
    block = place % query_blocks
    head = (place // query_blocks) % heads
    b = place // query_blocks // heads
    base = ml_ptr + place * (slots * 2 * padded) + n
    step = 2 * padded
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    parts = o_ptr + (place.to(tl.int64) * slots * padded + n) * DIM + d
    if AUX:
        sink = tl.load(aux + head * group + n % group).to(tl.float32)
        if SHIFT:  # instead of adding it to every logit
            sink -= tl.load(q_shift_ptr + place * padded + n)
        sink *= LOG2_E
    slot = tl.arange(0, BLOCK)
    if ONCE:  # asked for before the weights are known, which take a barrier
        inside = slot < slots
        values = tl.load(
            parts + slot[:, None] * (padded * DIM),
            mask=inside[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        top = tl.load(base + slot * step, mask=inside, other=NEVER)
        part = tl.load(base + slot * step + padded, mask=inside, other=0.0)
        best = tl.max(top, 0)
        if AUX:
            best = tl.maximum(best, sink)
        weight = tl.where(top > 0.5 * NEVER, tl.exp2(top - best), 0.0)
        total = tl.sum(weight * part, 0)
        acc = tl.sum(tl.where((weight > 0.0)[:, None], values, 0.0) * weight[:, None], 0)
    else:
        tops = tl.full((BLOCK,), NEVER, tl.float32)
        for start in tl.range(0, slots, BLOCK):
            s = start + slot
            tops = tl.maximum(tops, tl.load(base + s * step, mask=s < slots, other=NEVER))
        best = tl.max(tops, 0)
        if AUX:
            best = tl.maximum(best, sink)
        total = 0.0
        acc = tl.zeros((CHANNELS,), tl.float32)
        for start in tl.range(0, slots, BLOCK):
            s = start + slot
            top = tl.load(base + s * step, mask=s < slots, other=NEVER)
            part = tl.load(base + s * step + padded, mask=s < slots, other=0.0)
            weight = tl.where(top > 0.5 * NEVER, tl.exp2(top - best), 0.0)
            written = (weight > 0.0)[:, None] & (d < DIM)[None, :]
            values = tl.load(parts + s[:, None] * (padded * DIM), mask=written, other=0.0)
            total += tl.sum(weight * part, 0)
            acc += tl.sum(values * weight[:, None], 0)
    if AUX:
        total += tl.exp2(sink - best)
    acc = acc / tl.where(total > 0.0, total, 1.0)
    t = block * (columns // group) + n // group
    if t < queries:
        to = (
            out
            + b.to(tl.int64) * out_stride_b
            + t.to(tl.int64) * out_stride_t
            + (head * group + n % group) * out_stride_h
        )
        tl.store(to + d, acc.to(out.dtype.element_ty), mask=d < DIM)
    if advance != 0:
        if (head == 0) & (n == 0) & (block == 0) & (tl.program_id(2) == 0):
            length = tl.load(state + 2 * b) + new
            pages = tl.maximum(
                tl.load(state + 2 * b + 1), tl.maximum(length - sinks - window, 0) // page_tokens
            )
            tl.store(state + 2 * b, length)
            tl.store(state + 2 * b + 1, pages)


def merge_parts(
    partial: Tensor,
    ml: Tensor,
    out: Tensor,
    sink_logits: Tensor | None,
    shift: Tensor | None,
    state: Tensor,
    queries: Queries,
    regions: Regions,
    *,
    new: int,
    advance: bool,
    in_order: bool,
) -> None:
    """Merges the parts of all queries and, with `advance`, moves the sequences' state on.

    Args:
        partial: float32 [B · Hkv · query blocks, slots, N, head_dim], outputs not yet divided.
        ml: float32 [B · Hkv · query blocks, slots, 2, N], largest scores and sums of weights; a
            weight of 0 says that the part's outputs may be unwritten.
        out: [B, T, num_heads, head_dim], any float type; written.
        sink_logits: [num_heads], logits that join the denominator only, or None.
        shift: float32 [B, Hkv, query blocks, N], what all scores of a query lack, which sink logits
            must lack too; or None.
        state: int32 [B, 2], tokens and pages of each sequence; anything where not `advance`.
        regions: of the cache.
        new: tokens that `state` does not count yet.
        in_order: sums are taken in an order that the number of slots has no part in.
    """
    _, kv_heads, blocks, padded, dim = queries.data.shape
    places, slots = partial.shape[:2]
    channels = CHANNELS if dim % CHANNELS == 0 else 16
    launch(
        _merge_kernel,
        (places, queries.columns, -(-dim // channels)),
        partial,
        ml,
        out,
        sink_logits if sink_logits is not None else state,
        shift if shift is not None else queries.scale,
        state,
        new,
        regions.sinks,
        regions.window,
        regions.page_tokens,
        kv_heads,
        blocks,
        queries.tokens,
        slots,
        padded,
        queries.columns,
        queries.group,
        int(advance),
        *out.stride()[:3],
        DIM=dim,
        CHANNELS=channels,
        BLOCK=FEW_SLOTS if slots <= FEW_SLOTS and not in_order else MANY_SLOTS,
        ONCE=slots <= MANY_SLOTS and not in_order,
        AUX=sink_logits is not None,
        SHIFT=shift is not None,
        num_warps=WARPS,
    )
