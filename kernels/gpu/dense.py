"""Attention of many queries of one sequence over decoded pages and 16-bit rows: a FlashAttention
(Dao 2023, arXiv 2307.08691, algorithm 1) that knows which of the two a query reads a token from.

The split-K kernel unpacks a page again for every 16 columns of queries: right for a step, for a
prompt most of its time. Here pages are float16 already (prompt.py decodes them), and a program goes
over 128 rows of queries (64 of wide heads), a query and head of the group each: first over the tokens that all its
queries read from pages, without a mask, then over those that some of them do, and over the 16-bit
rows. Runs under Triton's interpreter on a CPU too.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.compile.launch import INTERPRET, launch
from kvfold.kernels.gpu.device.bits import pow2
from kvfold.kernels.gpu.device.codec import to_fp16
from kvfold.kernels.gpu.device.constants import LOG2_E, NEVER
from kvfold.kernels.gpu.device.products import add_product
from kvfold.kernels.gpu.device.scores import soft_cap
from kvfold.kernels.gpu.queries import QUERY_TOP, logit_factor
from kvfold.kernels.gpu.records import LogitOptions, Regions

QUERY_ROWS = 32  # rows of a program that prepares queries
BLOCK: tl.constexpr = tl.constexpr(32)  # rows of a matrix at a time
UNIT: tl.constexpr = tl.constexpr(8)  # numbers in which strides of 16-bit rows are counted
WARPS = 4


class Tile(NamedTuple):
    """How the attention kernel is cut for heads up to a width."""

    rows: int  # of queries
    tokens: int  # at a time
    warps: int
    stages: int


TILES = {
    64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 4, 2), 512: Tile(64, 32, 8, 2)
}  # fmt: skip


class QueryRows(NamedTuple):
    """Queries of one sequence as `attend_rows` reads them; row t·G + g of a KV head is query t,
    head g of the group.

    Attributes:
        data: float16 [Hkv, T·G, head_dim], in the keys' basis, each row times a power of two.
        scale: float32 [Hkv, T·G], the softmax's scaling in the base of its exponent, and the
            inverse of that power.
        shift: float32 [Hkv, T·G], scaling · q·μ; None for zero.
        group: G.
    """

    data: Tensor
    scale: Tensor
    shift: Tensor | None
    group: int


@triton.jit(
    do_not_specialize=["rows", "step_h", "step_t"],
    do_not_specialize_on_alignment=["query"],
)  # fmt: skip
def _query_kernel(
    query, step_t, step_h, matrix, out, scale, rows, factor,
    DIM: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TOP: tl.constexpr, MATRIX: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of ROWS rows, KV heads)."""
    head = tl.program_id(1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, pow2(DIM))[None, :]
    there, inside = (r < rows)[:, None], c < DIM
    at = (head * GROUP + r % GROUP).to(tl.int64)
    source = query + (r // GROUP).to(tl.int64) * step_t + at * step_h
    if MATRIX:
        q = tl.zeros((ROWS, pow2(DIM)), tl.float32)
        for start in tl.range(0, pow2(DIM), BLOCK):
            i = start + tl.arange(0, BLOCK)
            a = tl.load(source[:, None] + i[None, :], mask=there & (i < DIM)[None, :], other=0.0)
            m = tl.load(
                matrix + head * (DIM * DIM) + i[:, None] * DIM + c,
                mask=(i < DIM)[:, None] & inside,
                other=0.0,
            )
            q = add_product(a, m, q, INTERPRET)
    else:
        q = tl.load(source[:, None] + c, mask=there & inside, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(q), 1), 1.0e-30)
    bits = largest.to(tl.int32, bitcast=True)
    # the logarithm to base 2, rounded up
    above = (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    power = ((TOP - above + 127) << 23).to(tl.float32, bitcast=True)
    back = ((above - TOP + 127) << 23).to(tl.float32, bitcast=True)
    to = head.to(tl.int64) * rows + r
    tl.store(scale + to, factor * back, mask=r < rows)
    tl.store(out + to[:, None] * DIM + c, to_fp16(q * power[:, None]), mask=there & inside)


def query_rows(
    query: Tensor,
    num_kv_heads: int,
    matrix: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    shift: Tensor | None = None,
) -> QueryRows:
    """Queries in the keys' basis, each scaled to float16's middle.

    Args:
        query: [num_heads, T, head_dim], after RoPE, any float type, channels next to each other.
        matrix: float32 [Hkv, head_dim, head_dim], M⁻¹; None for the identity.
        shift: float32 [num_heads, T], q·μ of what the keys leave out; None for zero.
    """
    heads, tokens, dim = query.shape
    group = heads // num_kv_heads
    rows, device = tokens * group, query.device
    data = torch.empty(num_kv_heads, rows, dim, dtype=torch.float16, device=device)
    scale = torch.empty(num_kv_heads, rows, dtype=torch.float32, device=device)
    launch(
        _query_kernel,
        (-(-rows // QUERY_ROWS), num_kv_heads),
        query, query.stride(1), query.stride(0), scale if matrix is None else matrix, data, scale, rows,
        logit_factor(scaling, softcap),
        DIM=dim, GROUP=group, ROWS=QUERY_ROWS, TOP=QUERY_TOP, MATRIX=matrix is not None,
        INTERPRET=INTERPRET, num_warps=WARPS,
    )  # fmt: skip
    if shift is not None:
        own = (shift.float() * scaling).view(num_kv_heads, group, tokens)
        shift = own.transpose(1, 2).reshape(num_kv_heads, rows)
    return QueryRows(data, scale, shift, group)


class Read(NamedTuple):
    """What the queries of one call read.

    Attributes:
        page_keys, page_values: float16 [Hkv, n, head_dim], contiguous: pages, decoded.
        first: position of their first token.
        raw_keys, raw_values: float16 [Hkv, R, head_dim], any layout with channels next to each
            other and strides that are multiples of 8: sinks, then the tokens behind `before`
            packed ones. Queries read them after the last pages, so with calls before that one
            R = 0.
        query: position of the first query.
        before: tokens in pages that every query reads from pages.
    """

    page_keys: Tensor
    page_values: Tensor
    first: int
    raw_keys: Tensor
    raw_values: Tensor
    query: int
    before: int


class Partial(NamedTuple):
    """Attention over a part of what is read, with weights' sum 1: float32 [Hkv, T·G, head_dim], and
    the logarithms to base 2 of the sums of weights, [Hkv, T·G]."""

    out: Tensor
    sums: Tensor


@triton.jit
def _load_full(ptr, inside, DIM: tl.constexpr):
    """Without a mask where heads are as wide as a tile: loads are then as wide as they can be."""
    if pow2(DIM) == DIM:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=inside, other=0.0)


@triton.jit
def _load_some(ptr, exists, inside, DIM: tl.constexpr):
    """The same of tokens that exist."""
    if pow2(DIM) == DIM:
        return tl.load(ptr, mask=exists, other=0.0)
    else:
        return tl.load(ptr, mask=exists & inside, other=0.0)


@triton.jit(
    do_not_specialize=[
        "tokens", "first", "page_tokens", "raw_tokens", "k_step_h", "k_step_t", "v_step_h", "v_step_t", "query",
        "before", "sinks", "window", "sliding", "out_step_t", "out_step_h", "prior", "last_call",
    ],
    do_not_specialize_on_alignment=["sinks_logit", "shift_ptr", "scale_ptr", "part_sums"],
)  # fmt: skip
def _dense_kernel(
    q_ptr, scale_ptr, shift_ptr, page_k, page_v, raw_k, raw_v, part_out, part_sums, out, sinks_logit,
    tokens, first, page_tokens, raw_tokens, k_step_h, k_step_t, v_step_h, v_step_t, query, before, sinks, window,
    sliding, out_step_t, out_step_h, prior, last_call,
    DIM: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAP: tl.constexpr,
    SHIFT: tl.constexpr, SINKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of M rows, KV heads). prior: goes on from a `Partial`; last_call: writes `out`,
    else a `Partial`."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    head = tl.program_id(1)
    heads_at = head.to(tl.int64)
    rows = tokens * GROUP
    r = block * M + tl.arange(0, M)
    there = r < rows
    last = query + tl.minimum(r, rows - 1) // GROUP
    packed = tl.maximum(last + 1 - sinks - window, 0) // PAGE * PAGE
    limit = sinks + tl.maximum(packed, before)
    lowest = tl.where(sliding > 0, tl.maximum(last - sliding + 1, 0), 0)
    # of the block's first and last query
    early = query + block * M // GROUP
    late = query + tl.minimum(block * M + M - 1, rows - 1) // GROUP
    early_limit = sinks + tl.maximum(
        tl.maximum(early + 1 - sinks - window, 0) // PAGE * PAGE, before
    )
    late_limit = sinks + tl.maximum(tl.maximum(late + 1 - sinks - window, 0) // PAGE * PAGE, before)
    early_low = tl.where(sliding > 0, tl.maximum(early - sliding + 1, 0), 0)
    late_low = tl.where(sliding > 0, tl.maximum(late - sliding + 1, 0), 0)
    # pages: all queries read full … full_end − 1, some of them begin … end − 1
    end = tl.maximum(tl.minimum(late_limit - first, page_tokens), 0)
    begin = tl.minimum(tl.maximum(early_low - first, 0), end) // N * N
    full = tl.maximum((tl.maximum(late_low - first, 0) + N - 1) // N * N, begin)
    full_end = tl.maximum(tl.minimum(early_limit - first, end), 0) // N * N
    full_end = tl.where(full_end > full, full_end, begin)
    full = tl.minimum(full, full_end)
    before_full = (full - begin) // N
    page_blocks = before_full + (end - full_end + N - 1) // N
    # 16-bit rows: the sinks' blocks, then those behind what all queries read from pages
    raw_count = (raw_tokens + N - 1) // N
    sink_count = (sinks + N - 1) // N
    raw_first = tl.maximum((tl.maximum(early_limit, early_low) - before) // N, sink_count)
    raw_end = tl.minimum((late - before) // N + 1, raw_count)
    sink_blocks = tl.minimum(raw_count, sink_count)
    masked = page_blocks + sink_blocks + tl.maximum(raw_end - raw_first, 0)

    c = tl.arange(0, pow2(DIM))
    inside = c < DIM
    n = tl.arange(0, N)
    at = heads_at * rows + r
    q = tl.load(
        q_ptr + at[:, None] * DIM + c[None, :], mask=there[:, None] & inside[None, :], other=0.0
    )
    scale = tl.load(scale_ptr + at, mask=there, other=0.0)
    shift = tl.load(shift_ptr + at, mask=there, other=0.0) if SHIFT else scale
    mask = there[:, None] & inside[None, :]
    known = there & (prior > 0)
    acc = tl.load(part_out + at[:, None] * DIM + c[None, :], mask=mask & (prior > 0), other=0.0)
    m_i = tl.load(part_sums + at, mask=known, other=NEVER)
    l_i = tl.where(known, 1.0, 0.0)
    own_k = page_k + heads_at * page_tokens * DIM
    own_v = page_v + heads_at * page_tokens * DIM
    for j in tl.range(full, full_end, N, num_stages=STAGES):
        k = _load_full(own_k + (j + n)[None, :] * DIM + c[:, None], inside[:, None], DIM)
        qk = tl.dot(q, k)
        if CAP > 0:
            qk = qk * scale[:, None]
            if SHIFT:
                qk += shift[:, None]
            qk = soft_cap(qk, CAP)
            m_new = tl.maximum(m_i, tl.max(qk, 1))
            p = tl.exp2(qk - m_new[:, None])
        else:  # the scale, which is positive, goes into one fused operation of each score
            m_new = tl.maximum(m_i, tl.max(qk, 1) * scale)
            p = tl.exp2(qk * scale[:, None] - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = _load_full(own_v + (j + n)[:, None] * DIM + c[None, :], inside[None, :], DIM)
        acc = tl.dot(p.to(tl.float16), v, acc * alpha[:, None])
        m_i = m_new
    rest_k = raw_k + heads_at * k_step_h * UNIT
    rest_v = raw_v + heads_at * v_step_h * UNIT
    for j in tl.range(0, masked, num_stages=1):
        paged = j < page_blocks
        of_page = tl.where(j < before_full, begin + j * N, full_end + (j - before_full) * N)
        number = j - page_blocks
        of_rows = tl.where(number < sink_blocks, number, raw_first + number - sink_blocks) * N
        row = tl.where(paged, of_page, of_rows) + n
        position = tl.where(paged, first + row, tl.where(row < sinks, row, row + before))
        exists = row < tl.where(paged, page_tokens, raw_tokens)
        k_at = tl.where(paged, own_k, rest_k) + row * tl.where(paged, DIM, k_step_t * UNIT)
        v_at = tl.where(paged, own_v, rest_v) + row * tl.where(paged, DIM, v_step_t * UNIT)
        k = _load_some(k_at[None, :] + c[:, None], exists[None, :], inside[:, None], DIM)
        qk = tl.dot(q, k) * scale[:, None]
        if CAP > 0:
            if SHIFT:
                qk += shift[:, None]
            qk = soft_cap(qk, CAP)
        is_packed = (position >= sinks)[None, :] & (position[None, :] < limit[:, None])
        seen = exists[None, :] & (is_packed == paged)
        seen &= (position[None, :] <= last[:, None]) & (position[None, :] >= lowest[:, None])
        qk = tl.where(seen, qk, NEVER)
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        p = tl.where(seen, tl.exp2(qk - m_new[:, None]), 0.0)
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = _load_some(v_at[:, None] + c[None, :], exists[:, None], inside[None, :], DIM)
        acc = tl.dot(p.to(tl.float16), v, acc * alpha[:, None])
        m_i = m_new
    own = head * GROUP + r % GROUP
    if SINKS:
        sink = tl.load(sinks_logit + own, mask=there, other=0.0).to(tl.float32)
        if SHIFT and CAP == 0:  # instead of adding it to every logit
            sink -= shift
        sink = tl.where(last_call > 0, sink * LOG2_E, NEVER)
        best = tl.maximum(m_i, sink)
        alpha = tl.exp2(m_i - best)
        l_i = l_i * alpha + tl.exp2(sink - best)
        acc *= alpha[:, None]
    acc = acc / tl.where(l_i > 0.0, l_i, 1.0)[:, None]
    if last_call > 0:
        to = (r // GROUP).to(tl.int64) * out_step_t + own * out_step_h
        tl.store(out + to[:, None] + c[None, :], acc.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(part_out + at[:, None] * DIM + c[None, :], acc, mask=mask)
        sums = tl.where(l_i > 0.0, m_i + tl.log2(tl.where(l_i > 0.0, l_i, 1.0)), NEVER)
        tl.store(part_sums + at, sums, mask=there)


def attend_rows(
    queries: QueryRows,
    read: Read,
    regions: Regions,
    logits: LogitOptions,
    out: Tensor,
    prior: Partial | None = None,
    *,
    last: bool = True,
) -> Partial | None:
    """Attention of the queries of one sequence, or one part of it.

    Args:
        regions: of the cache; `ring` is not read.
        out: [T, num_heads, head_dim], any float type; written by the last call.
        prior: what the call before gave; it is overwritten.
        last: nothing is read beyond this.
    Returns:
        None from the last call.
    """
    kv_heads, rows, dim = queries.data.shape
    tokens, device = rows // queries.group, out.device
    raw_keys, raw_values = _in_units(read.raw_keys), _in_units(read.raw_values)
    if not last and prior is None:
        prior_out = torch.empty(kv_heads, rows, dim, dtype=torch.float32, device=device)
        part = Partial(prior_out, torch.empty(kv_heads, rows, dtype=torch.float32, device=device))
    else:
        part = prior or Partial(queries.scale, queries.scale)  # which nothing reads
    # with a soft-cap logits are bent after the shift; else only sink logits see it
    shift = queries.shift if logits.softcap or logits.sink_logits is not None else None
    tile = TILES[max(64, triton.next_power_of_2(dim))]
    scale, sinks_logit = queries.scale, logits.sink_logits
    steps = [x // UNIT.value for y in (raw_keys, raw_values) for x in y.stride()[:2]]
    launch(
        _dense_kernel,
        (-(-rows // tile.rows), kv_heads),
        queries.data, scale, scale if shift is None else shift, read.page_keys, read.page_values,
        raw_keys, raw_values, *part, out, scale if sinks_logit is None else sinks_logit,
        tokens, read.first, read.page_keys.shape[1], raw_keys.shape[1], *steps,
        read.query, read.before, regions.sinks, regions.window, logits.sliding, *out.stride()[:2],
        int(prior is not None), int(last),
        DIM=dim, GROUP=queries.group, PAGE=regions.page_tokens, M=tile.rows, N=tile.tokens,
        CAP=float(logits.softcap or 0.0), SHIFT=shift is not None, SINKS=sinks_logit is not None,
        STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return None if last else part


def _in_units(rows: Tensor) -> Tensor:
    """Rows whose strides are multiples of UNIT, and that begin at one."""
    odd = rows.data_ptr() % 16 or any(step % UNIT.value for step in rows.stride()[:2])
    return rows.contiguous() if odd else rows
