"""Merges the parts of split-K attention by their maxima, and moves the sequences' state on."""

import triton
import triton.language as tl

from kvfold.kernels.triton_packed import NEVER


@triton.jit(do_not_specialize=["new", "sinks", "window", "query_blocks", "queries", "slots"])
def merge_kernel(
    o_ptr, ml_ptr, out, aux, q_shift_ptr, state, new, sinks, window, query_blocks, queries, slots,
    out_stride_b, out_stride_t, out_stride_h,
    DIM: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    SLOTS_2: tl.constexpr, BLOCK: tl.constexpr, AUX: tl.constexpr, SHIFT: tl.constexpr, ADVANCE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, HEADS: tl.constexpr, HOLES: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences × KV heads × query blocks, COLUMNS, runs of CHANNELS). Merges the parts of one query and, with ADVANCE, moves the
    sequence's length and number of pages on by `new` tokens.

    HOLES: parts of no weight may be unwritten. FIXED: the sums are taken in an order that the number of slots has no part in.
    """
    place = tl.program_id(0)
    n = tl.program_id(1)
    block = place % query_blocks
    head = (place // query_blocks) % HEADS
    b = place // query_blocks // HEADS
    base = ml_ptr + place * (slots * 2 * N) + n
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    parts = o_ptr + (place.to(tl.int64) * slots * N + n) * DIM
    if AUX:
        sink = tl.load(aux + head * GROUP + n % GROUP).to(tl.float32)
        if SHIFT:  # instead of adding it to every logit
            sink -= tl.load(q_shift_ptr + place * N + n)
        sink *= 1.4426950408889634
    acc = tl.zeros((CHANNELS,), tl.float32)
    if FIXED:
        tops = tl.full((BLOCK,), NEVER, tl.float32)
        for start in tl.range(0, slots, BLOCK):
            s = start + tl.arange(0, BLOCK)
            tops = tl.maximum(tops, tl.load(base + s * (2 * N), mask=s < slots, other=NEVER))
        best = tl.max(tops, 0)
        if AUX:
            best = tl.maximum(best, sink)
        total = 0.0
        for start in tl.range(0, slots, BLOCK):
            s = start + tl.arange(0, BLOCK)
            weight, values = _merge_block(parts, base, s, slots, best, d, DIM, N, HOLES)
            total += tl.sum(weight * tl.load(base + s * (2 * N) + N, mask=s < slots, other=0.0), 0)
            acc += tl.sum(values * weight[:, None], 0)
    else:
        slot = tl.arange(0, SLOTS_2)
        if SLOTS_2 <= BLOCK:  # asked for before the weights are known, which take a barrier
            at = parts + slot[:, None] * (N * DIM) + d[None, :]
            values = tl.load(at, mask=(slot < slots)[:, None] & (d < DIM)[None, :], other=0.0)
        top = tl.load(base + slot * (2 * N), mask=slot < slots, other=NEVER)
        part = tl.load(base + slot * (2 * N) + N, mask=slot < slots, other=0.0)
        best = tl.max(top, 0)
        if AUX:
            best = tl.maximum(best, sink)
        weight = tl.where(top > 0.5 * NEVER, tl.exp2(top - best), 0.0)
        total = tl.sum(weight * part, 0)
        if SLOTS_2 <= BLOCK:
            if HOLES:
                values = tl.where((weight > 0.0)[:, None], values, 0.0)
            acc = tl.sum(values * weight[:, None], 0)
        else:
            for start in tl.static_range(0, SLOTS_2, BLOCK):
                s = start + tl.arange(0, BLOCK)
                weight, values = _merge_block(parts, base, s, slots, best, d, DIM, N, HOLES)
                acc += tl.sum(values * weight[:, None], 0)
    if AUX:
        total += tl.exp2(sink - best)
    acc = acc / tl.where(total > 0.0, total, 1.0)
    t = block * (COLUMNS // GROUP) + n // GROUP
    if t < queries:
        to = (
            out
            + b.to(tl.int64) * out_stride_b
            + t.to(tl.int64) * out_stride_t
            + (head * GROUP + n % GROUP) * out_stride_h
        )
        tl.store(to + d, acc.to(out.dtype.element_ty), mask=d < DIM)
    if ADVANCE:
        if (head == 0) & (n == 0) & (block == 0) & (tl.program_id(2) == 0):
            length = tl.load(state + 2 * b) + new
            pages = tl.maximum(tl.load(state + 2 * b + 1), tl.maximum(length - sinks - window, 0) // PAGE_TOKENS)
            tl.store(state + 2 * b, length)
            tl.store(state + 2 * b + 1, pages)


@triton.jit
def _merge_block(parts, base, s, slots, best, d, DIM: tl.constexpr, N: tl.constexpr, HOLES: tl.constexpr):
    """Weights of slots s and their channels d."""
    top = tl.load(base + s * (2 * N), mask=s < slots, other=NEVER)
    seen = top > 0.5 * NEVER
    written = seen if HOLES else s < slots
    at = parts + s[:, None] * (N * DIM) + d[None, :]
    values = tl.load(at, mask=written[:, None] & (d < DIM)[None, :], other=0.0)
    return tl.where(seen, tl.exp2(top - best), 0.0), values
