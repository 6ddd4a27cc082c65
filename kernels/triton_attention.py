"""Attention over a packed cache with Triton: one split-K kernel over sinks, pages and window, and one that merges its parts.

Lengths and the block table live on the device, so a decoding step can be captured in a CUDA graph. Runs under Triton's
interpreter on a CPU too (TRITON_INTERPRET=1 before Triton is imported).
"""

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.formats import Format, raw16
from kvfold.kernels.pages import anchor
from kvfold.kernels.tiles import program
from kvfold.kernels.triton_bits import count, pick
from kvfold.kernels.triton_packed import NEVER, packed_part
from kvfold.kernels.triton_raw import raw_part, store_part

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
LOG2_E = 1.4426950408889634
RAW_BLOCK = 32  # 16-bit rows at a time
PROMPT_COLUMNS = 16  # query columns of a program over a prompt
QUERY_TOP = 7  # queries are scaled so that the largest component lies in [2^6, 2^7]


# numbers that vary from call to call must not each compile a kernel of their own
@triton.jit(do_not_specialize=["new", "table_width", "sinks", "window", "ring", "sliding", "query_blocks"])
def _attention_kernel(
    q_ptr, q_scale_ptr, anchor, table, state, raw_k, raw_v, o_ptr, ml_ptr, first_query, packed_before,
    new, table_width, sinks, window, ring, sliding, query_blocks,
    raw_stride_b, raw_stride_h, raw_stride_t,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    PROMPT: tl.constexpr, SLIDING: tl.constexpr, CAP: tl.constexpr,
    STAGES: tl.constexpr, PREFETCH: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid: (splits, KV heads, sequences × query blocks)."""
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    head = tl.program_id(1)
    b = tl.program_id(2) // query_blocks
    block = tl.program_id(2) % query_blocks
    heads = tl.num_programs(1)
    rows: tl.constexpr = pick(K, 7)
    k_nbytes: tl.constexpr = pick(K, 8)
    dim: tl.constexpr = pick(K, 9)
    v_pieces: tl.constexpr = pick(V, 3)
    page_tokens: tl.constexpr = 8 * rows
    n = tl.arange(0, N)
    total = tl.load(state + 2 * b) + new
    pages = tl.maximum(tl.load(state + 2 * b + 1), tl.maximum(total - sinks - window, 0) // page_tokens)
    if PROMPT:
        before = tl.load(packed_before + b)
        queries = tl.minimum(block * (COLUMNS // GROUP) + n // GROUP, total - 1 - tl.load(first_query + b))
        last = tl.load(first_query + b) + queries
        limit = sinks + tl.maximum(tl.maximum(last + 1 - sinks - window, 0) // page_tokens * page_tokens, before)
        raw_from = sinks + before
    else:
        last = tl.zeros((N,), tl.int32) + total - 1
        limit = tl.zeros((N,), tl.int32) + sinks + pages * page_tokens
        raw_from = sinks + pages * page_tokens
    lowest = tl.maximum(last - sliding + 1, 0) if SLIDING else tl.zeros((N,), tl.int32)
    place = (b * heads + head) * query_blocks + block
    q = q_ptr + place.to(tl.int64) * (N * dim)
    q_scale = tl.load(q_scale_ptr + b * heads + head)
    o = o_ptr + (place.to(tl.int64) * splits + split) * (N * dim)
    ml = ml_ptr + (place * splits + split) * (2 * N)
    last_page = (tl.max(limit, 0) - sinks) // page_tokens
    first_page = tl.maximum(tl.min(lowest, 0) - sinks, 0) // page_tokens
    acc, top, weight = packed_part(
        q, q_scale, anchor, table + b.to(tl.int64) * table_width, tl.minimum(first_page, last_page), last_page, split, head,
        sinks, limit, lowest, heads * k_nbytes, splits, K, V, N, PROMPT or SLIDING, CAP, STAGES, PREFETCH, INTERPRET,
    )  # fmt: skip
    at = b.to(tl.int64) * raw_stride_b + head * raw_stride_h
    # the last programs first: where pages do not divide evenly, they have fewer
    acc, top, weight = raw_part(
        q, q_scale, raw_k + at, raw_v + at, raw_stride_t, acc, top, weight, splits - 1 - split, total, raw_from, sinks, ring,
        limit, lowest, last, splits, R, v_pieces, dim, N, BLOCK, PROMPT or SLIDING, CAP,
    )  # fmt: skip
    columns = n < COLUMNS
    for t in tl.static_range(count(v_pieces)):
        store_part(o + n[None, :] * dim, columns, acc[t], pick(v_pieces, t))
    tl.store(ml + n, top, mask=columns)
    tl.store(ml + N + n, weight, mask=columns)


@triton.jit(do_not_specialize=["new", "sinks", "window", "query_blocks", "queries", "slots"])
def _merge_kernel(
    o_ptr, ml_ptr, out, aux, state, new, sinks, window, query_blocks, queries, slots, out_stride_b, out_stride_t, out_stride_h,
    DIM: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    SLOTS_2: tl.constexpr, BLOCK: tl.constexpr, AUX: tl.constexpr, ADVANCE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences × KV heads × query blocks, COLUMNS, runs of CHANNELS). Merges the parts of one query and, with ADVANCE, moves the
    sequence's length and number of pages on by `new` tokens."""
    place = tl.program_id(0)
    n = tl.program_id(1)
    block = place % query_blocks
    head = (place // query_blocks) % HEADS
    b = place // query_blocks // HEADS
    slot = tl.arange(0, SLOTS_2)
    base = ml_ptr + place * (slots * 2 * N) + n
    top = tl.load(base + slot * (2 * N), mask=slot < slots, other=NEVER)
    best = tl.max(top, 0)
    if AUX:
        sink = tl.load(aux + head * GROUP + n % GROUP).to(tl.float32) * 1.4426950408889634
        best = tl.maximum(best, sink)
    part = tl.load(base + slot * (2 * N) + N, mask=slot < slots, other=0.0)
    total = tl.sum(tl.where(top > 0.5 * NEVER, tl.exp2(top - best) * part, 0.0), 0)
    if AUX:
        total += tl.exp2(sink - best)
    d = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    acc = tl.zeros((CHANNELS,), tl.float32)
    for start in tl.static_range(0, SLOTS_2, BLOCK):
        s = start + tl.arange(0, BLOCK)
        top_s = tl.load(base + s * (2 * N), mask=s < slots, other=NEVER)
        weight = tl.where(top_s > 0.5 * NEVER, tl.exp2(top_s - best), 0.0)
        at = o_ptr + (place.to(tl.int64) * slots * N + n) * DIM + s[:, None] * (N * DIM) + d[None, :]
        values = tl.load(at, mask=(s < slots)[:, None] & (d < DIM)[None, :], other=0.0)
        acc += tl.sum(values * weight[:, None], 0)
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


@dataclass(frozen=True)
class Queries:
    """Queries as the kernel reads them.

    Attributes:
        data: float16 [B, Hkv, query blocks, N, head_dim]; column n of a block is query n // G, head n mod G of the group.
        scale: float32 [B, Hkv], softmax scaling, log2 e and the inverse of what `data` was multiplied with.
        columns: of N that are queries; N is padded to 8 at least.
        group: G, query heads of a KV head.
        tokens: queries of a sequence.
    """

    data: Tensor
    scale: Tensor
    columns: int
    group: int
    tokens: int


def prepare_queries(query: Tensor, num_kv_heads: int, scaling: float, softcap: float | None = None) -> Queries:
    """Scales queries [B, num_heads, T, head_dim], in the keys' basis, to float16's middle and lays them out.

    The power of two is one for all queries of a KV head, so that it can go into the scale of the keys.
    """
    batch, heads, tokens, dim = query.shape
    group = heads // num_kv_heads
    grouped = query.float().view(batch, num_kv_heads, group, tokens, dim)
    largest = grouped.abs().amax((2, 3, 4)).clamp_min(1e-30)
    power = torch.exp2(QUERY_TOP - torch.ceil(torch.log2(largest)))  # [B, Hkv]
    columns = group if tokens == 1 else max(1, PROMPT_COLUMNS // group) * group
    each = columns // group
    blocks = -(-tokens // each)
    padded = max(8, 1 << (columns - 1).bit_length())
    data = torch.zeros(batch, num_kv_heads, blocks * each, group, dim, dtype=torch.float16, device=query.device)
    data[:, :, :tokens] = (grouped * power[:, :, None, None, None]).transpose(2, 3)
    data = data.view(batch, num_kv_heads, blocks, columns, dim)
    if padded > columns:
        data = torch.nn.functional.pad(data, (0, 0, 0, padded - columns))
    factor = scaling if softcap else scaling * LOG2_E
    return Queries(data.contiguous(), factor / power, columns, group, tokens)


def attention(
    queries: Queries,
    key_format: Format,
    value_format: Format,
    table: Tensor,
    state: Tensor,
    raw_keys: Tensor,
    raw_values: Tensor,
    out: Tensor,
    *,
    sinks: int,
    window: int,
    page_tokens: int,
    ring: int = 0,
    new: int = 0,
    first_query: Tensor | None = None,
    packed_before: Tensor | None = None,
    sliding: int = 0,
    softcap: float = 0.0,
    aux: Tensor | None = None,
    advance: bool = False,
    splits: int = 0,
) -> Tensor:
    """Attention of decoding steps or of prompts over packed pages and 16-bit rows.

    Args:
        queries: see Queries.
        table: int64 [B, entries], addresses of pages (`page_address`), in rising position.
        state: int32 [B, 2], tokens and pages of each sequence.
        raw_keys, raw_values: float16 [B, Hkv, rows, head_dim], same strides: sinks, then a ring of `ring` slots, or, with
            ring = 0, the tokens behind the pages in order.
        out: [B, T, num_heads, head_dim], any float type; written.
        new: tokens in the rows that `state` does not count yet; with `advance` it does afterwards.
        first_query: int32 [B], position of the first query, for prompts; None: one query a sequence, its last token.
        packed_before: int32 [B], tokens in pages that every query of a prompt reads from pages.
        sliding: tokens that a query sees at the most, 0 for all.
        softcap: cap·tanh(logit / cap), 0 for none.
        aux: [num_heads], logits that join the denominator only (attention sinks of gpt-oss), or None.
        splits: programs that share the pages of one head and sequence; 0 chooses.
    """
    batch, kv_heads, blocks, padded, dim = queries.data.shape
    prompt = first_query is not None
    if not splits:
        splits = pick_splits(batch * kv_heads * blocks, table.shape[1] * page_tokens, table.device)
    device = out.device
    partial = torch.empty(batch * kv_heads * blocks, splits, padded, dim, dtype=torch.float32, device=device)
    ml = torch.empty(batch * kv_heads * blocks, splits, 2, padded, dtype=torch.float32, device=device)
    none = state
    k_program, v_program = program(key_format, page_tokens), program(value_format, page_tokens)
    # ternary codes take more instructions than their bytes hide: two tiles in flight, addresses one ahead (LOG.md)
    ternary = bool(k_program.trits or v_program.trits)
    stages = 3 if ternary else 4
    raw_pieces = program(raw16(dim), page_tokens).pieces
    _attention_kernel[(splits, kv_heads, batch * blocks)](
        queries.data, queries.scale, anchor(device), table, state, raw_keys, raw_values, partial, ml,
        first_query if prompt else none, packed_before if prompt else none,
        new, table.shape[1], sinks, window, ring, sliding, blocks, *raw_keys.stride()[:3],
        K=tuple(k_program), V=tuple(v_program), R=raw_pieces, N=padded, COLUMNS=queries.columns, GROUP=queries.group,
        PROMPT=prompt, SLIDING=sliding > 0, CAP=float(softcap or 0.0),
        STAGES=stages, PREFETCH=ternary, BLOCK=RAW_BLOCK, INTERPRET=INTERPRET, num_warps=1, num_stages=stages,
    )  # fmt: skip
    slots_2 = next(n for n in (8, 32, 128, 512, 2048) if n >= splits)
    channels = 32 if dim % 32 == 0 else 16
    _merge_kernel[(batch * kv_heads * blocks, queries.columns, -(-dim // channels))](
        partial, ml, out, aux if aux is not None else state, state, new, sinks, window, blocks, queries.tokens, splits,
        out.stride(0), out.stride(1), out.stride(2),
        DIM=dim, CHANNELS=channels, N=padded, COLUMNS=queries.columns, GROUP=queries.group,
        SLOTS_2=slots_2, BLOCK=min(slots_2, 32), AUX=aux is not None, ADVANCE=advance, PAGE_TOKENS=page_tokens,
        HEADS=kv_heads, num_warps=4,
    )  # fmt: skip
    return out


def pick_splits(programs: int, tokens: int, device: torch.device) -> int:
    """Programs for each head and sequence: one wave of eight warps a multiprocessor, each with 256 tokens or more.

    Args:
        programs: heads × sequences × query blocks.
        tokens: of the longest sequence that fits the block table.
    """
    if device.type != "cuda":
        return 2
    wave = 8 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(wave // programs, tokens // 256))
