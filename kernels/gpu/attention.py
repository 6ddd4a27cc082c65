"""Attention over a packed cache with Triton: one split-K kernel over sinks, pages and window, and
one that merges its parts.

Lengths and the block table live on the device, so a decoding step can be captured in a CUDA graph.
Runs under Triton's interpreter on a CPU too (TRITON_INTERPRET=1 before Triton is imported).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.kernels.compile.launch import INTERPRET, Branches, launch, multiprocessors
from kvfold.kernels.formats import Format, raw16
from kvfold.kernels.gpu.device.bits import count, pick
from kvfold.kernels.gpu.device.constants import NEVER
from kvfold.kernels.gpu.device.packed import packed_part
from kvfold.kernels.gpu.device.raw import raw_blocks, raw_part, store_part
from kvfold.kernels.gpu.kinds import device_layout
from kvfold.kernels.gpu.merge import MOST_SLOTS, merge_parts
from kvfold.kernels.gpu.queries import Queries
from kvfold.kernels.gpu.records import LogitOptions, PagedCache, Regions
from kvfold.kernels.pages import anchor

PLAIN_LOGITS = LogitOptions()
RAW_BLOCK = 32  # 16-bit rows at a time
MOST_RUNGS: tl.constexpr = tl.constexpr(8)
TILE_TOKENS = 128  # packed tokens at a time
FIXED_TILES = 8  # tiles in a part, where results may not depend on the batch
LEAST_TOKENS = 128  # of a part, where the batch may decide
# programs of one warp that share a multiprocessor: two to a scheduler, as the registers allow
WAVE = 8
STAGES, AHEAD_STAGES = 4, 3  # tiles in flight and one
# of steps over 4-bit pages: with the 255 that it may take, Triton 3.6's ptxas spills 57 times a
# tile, with these never
FOUR_BIT_REGISTERS = 240
# 16 bytes of 16-bit rows, so that a step needs no kernel of its own to be known as aligned
ROW_UNIT: tl.constexpr = tl.constexpr(8)


@triton.jit
def rung_parts(
    edges, rung, rungs, first_page, last_page, raw_count, splits, least, pages_each: tl.constexpr
):
    """(the first part of a rung, units of a part), where the tiles of all rungs, and the 16-bit
    rows' blocks behind the last one's, are shared out so that all parts are equally large: they are
    `splits`, and one more for each rung whose last part is not full."""
    r = tl.arange(0, MOST_RUNGS)
    low = tl.maximum(first_page, tl.load(edges + r, mask=(r > 0) & (r < rungs), other=0))
    high = tl.minimum(last_page, tl.load(edges + r + 1, mask=r < rungs - 1, other=0x7FFFFFFF))
    tiles = (high - low // pages_each * pages_each + pages_each - 1) // pages_each
    units = tl.where((low < high) & (r < rungs), tiles, 0) + tl.where(r == rungs - 1, raw_count, 0)
    each = tl.maximum((tl.sum(units, 0) + splits - 1) // splits, least)
    return tl.sum(tl.where(r < rung, (units + each - 1) // each, 0), 0), each


# numbers that vary from call to call, and where a batch's rows begin, must not each compile a
# kernel of their own
@triton.jit(
    do_not_specialize=[
        "new", "table_width", "sinks", "window", "ring", "sliding", "query_blocks", "splits", "slots", "least",
        "rung", "rungs", "raw_step_b", "raw_step_h", "raw_step_t", "bias_steps", "first_step", "first_place",
        "block_step", "page_step", "raw_table_width", "raw_shift",
    ],
    do_not_specialize_on_alignment=[
        "q_scale_ptr", "q_shift_ptr", "table", "state", "segments", "ml_ptr", "first_query", "packed_before",
        "mean_ptr",
        "bias_ptr", "spans", "within", "raw_table",
    ],
)  # fmt: skip
def _attention_kernel(
    q_ptr, q_scale_ptr, q_shift_ptr, anchor, table, state, segments, raw_k, raw_v, o_ptr, ml_ptr, first_query,
    packed_before,
    new, table_width, sinks, window, ring, sliding, query_blocks, splits, slots, least, rung, rungs,
    raw_step_b, raw_step_h, raw_step_t, mean_ptr, bias_ptr, spans, within, bias_steps, first_step,
    raw_table, raw_table_width, raw_shift, first_place, block_step, page_step,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    PROMPT: tl.constexpr, MASKED: tl.constexpr, CAP: tl.constexpr, SHIFT: tl.constexpr, MEAN: tl.constexpr,
    STAGES: tl.constexpr, PREFETCH: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
    PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (splits, and `rungs` more for the last of several rungs; KV heads; sequences × query
    blocks). Writes parts of one rung's pages, and in the launch of the last rung of the 16-bit rows
    behind them. The rungs' parts are equally large and follow each other; behind them the last
    rung's launch writes a weight of zero for the parts that are left over, and nothing else of
    them.

    PROMPT: several queries. MASKED: a query may not see
    all that is packed, as in prompts and sliding windows (`sliding` tokens, 0 for all). Steps from
    one sequence, head and token of the 16-bit rows to the next are in units of ROW_UNIT numbers.
    MEAN: keys are stored without their rotating mean, but for a prompt's 16-bit rows. PER_BLOCK:
    pages and 16-bit rows lie in blocks of an engine's pool, whose tables both are found by
    (device/places.py); then `state` has the sequences' lengths alone, and raw_step_b goes from
    block to block.
    """
    split = tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2) // query_blocks
    block = tl.program_id(2) % query_blocks
    heads = tl.num_programs(1)
    page_tokens: tl.constexpr = K.page_tokens
    pages_each: tl.constexpr = 16 // K.rows
    last_rung = rung == rungs - 1
    n = tl.arange(0, N)
    if PER_BLOCK > 0:
        total = tl.load(state + b)
        pages = tl.maximum(total - sinks - window, 0) // page_tokens
    else:
        total = tl.load(state + 2 * b) + new
        pages = tl.maximum(
            tl.load(state + 2 * b + 1), tl.maximum(total - sinks - window, 0) // page_tokens
        )
    if PROMPT:
        before = tl.load(packed_before + b)
        queries = tl.minimum(
            block * (COLUMNS // GROUP) + n // GROUP, total - 1 - tl.load(first_query + b)
        )
        last = tl.load(first_query + b) + queries
        limit = sinks + tl.maximum(
            tl.maximum(last + 1 - sinks - window, 0) // page_tokens * page_tokens, before
        )
        raw_from = sinks + before
        last_page = (tl.max(limit, 0) - sinks) // page_tokens
    else:
        last = tl.zeros((N,), tl.int32) + total - 1
        limit = tl.zeros((N,), tl.int32) + sinks + pages * page_tokens
        raw_from = sinks + pages * page_tokens
        last_page = pages
    if MASKED:
        lowest = tl.where(sliding > 0, tl.maximum(last - sliding + 1, 0), 0)
        first_page = tl.maximum(tl.min(lowest, 0) - sinks, 0) // page_tokens
    else:
        lowest = tl.zeros((N,), tl.int32)
        first_page = 0
    columns = n < COLUMNS
    # the last rung ends where the pages do: a page that comes due belongs to it
    edges = segments + b * (rungs + 1)
    from_page = tl.maximum(first_page, tl.load(edges + rung, mask=rung > 0, other=0))
    to_page = tl.minimum(
        last_page, tl.load(edges + rung + 1, mask=rung < rungs - 1, other=0x7FFFFFFF)
    )
    # tiles lie at multiples of 128 tokens behind the sinks, wherever the first page is
    tile_page = from_page // pages_each * pages_each
    tiles = tl.where(from_page < to_page, (to_page - tile_page + pages_each - 1) // pages_each, 0)
    raw_count, raw_first = raw_blocks(total, raw_from, sinks, ring, limit, last, BLOCK, MASKED)
    slot, each, parts = split, tl.maximum((tiles + raw_count + splits - 1) // splits, least), splits
    if rungs > 1:
        first_slot, each = rung_parts(
            edges, rung, rungs, first_page, last_page, raw_count, splits, least, pages_each
        )
        slot, parts = first_slot + split, splits + rungs
    raw_count = tl.where(last_rung, raw_count, 0)
    units = tiles + raw_count
    place = (b * heads + head) * query_blocks + block
    o = o_ptr + (place.to(tl.int64) * slots + slot) * (N * K.head_dim)
    ml = ml_ptr + (place * slots + slot) * (2 * N)
    if split * each >= units:
        left_over = columns & last_rung & (slot < parts)
        tl.store(ml + n, tl.zeros((N,), tl.float32) + NEVER, mask=left_over)
        tl.store(ml + N + n, tl.zeros((N,), tl.float32), mask=left_over)
        return
    begin = tl.minimum(split * each, tiles)
    end = tl.minimum(split * each + each, tiles)
    q = q_ptr + place.to(tl.int64) * (N * K.head_dim)
    q_scale = tl.load(q_scale_ptr + b * heads + head)
    shift = tl.load(q_shift_ptr + place * N + n) if SHIFT else tl.zeros((N,), tl.float32)
    coefficients = mean_ptr + place.to(tl.int64) * (2 * MEAN * N)
    bias = bias_ptr + (place.to(tl.int64) * bias_steps - first_step) * N
    acc, m_i, l_i = packed_part(
        q, q_scale, shift, anchor, table + b.to(tl.int64) * table_width, tile_page, from_page, to_page, begin,
        end, head,
        sinks, limit, lowest, heads * K.nbytes, coefficients, bias, spans, within, first_place, block_step, page_step,
        K, V, N, MASKED, CAP, SHIFT, MEAN, STAGES, PREFETCH, INTERPRET, PER_BLOCK,
    )  # fmt: skip
    at = head.to(tl.int64) * raw_step_h
    if PER_BLOCK == 0:
        at += b.to(tl.int64) * raw_step_b
    at *= ROW_UNIT
    acc, m_i, l_i = raw_part(
        q, q_scale, shift, raw_k + at, raw_v + at, raw_step_t * ROW_UNIT, acc, m_i, l_i,
        tl.maximum(split * each - tiles, 0), tl.minimum(split * each + each - tiles, raw_count), raw_first,
        total, raw_from, sinks, ring, limit, lowest, last, coefficients, bias, spans, within,
        raw_table + b.to(tl.int64) * raw_table_width, raw_step_b.to(tl.int64) * ROW_UNIT, raw_shift,
        R, V, N, BLOCK, MASKED, CAP, SHIFT, 0 if PROMPT else MEAN, PER_BLOCK > 0,
    )  # fmt: skip
    for t in tl.static_range(count(V.value_runs)):
        store_part(o + n[None, :] * K.head_dim, columns, acc[t], pick(V.value_runs, t))
    tl.store(ml + n, m_i, mask=columns)
    tl.store(ml + N + n, l_i, mask=columns)


@dataclass(frozen=True)
class Prompt:
    """What `attention` must know of the queries of a prompt.

    Attributes:
        first_query: int32 [B], position of the first query.
        packed_before: int32 [B], tokens in pages that every query reads from pages.
    """

    first_query: Tensor
    packed_before: Tensor


def attention(
    queries: Queries,
    cache: PagedCache,
    formats: Sequence[tuple[Format, Format]],
    out: Tensor,
    regions: Regions,
    logits: LogitOptions = PLAIN_LOGITS,
    *,
    new: int = 0,
    advance: bool = False,
    prompt: Prompt | None = None,
    splits: int = 0,
    batch_invariant: bool = False,
) -> Tensor:
    """Attention of decoding steps or of prompts over packed pages and 16-bit rows.

    Pages of several formats take one launch a rung, each over its own pages, and one that merges
    them all. In a CUDA graph the rungs are branches beside each other.

    Args:
        queries: see Queries.
        cache: of one layer.
        formats: (key format, value format) of every page; or, with `cache.segments`, of each of
            their R rungs.
        out: [B, T, num_heads, head_dim], any float type; written.
        regions: of the cache.
        logits: what is done to them.
        new: tokens in the rows that the cache's state does not count yet; with `advance` it does
            afterwards.
        prompt: many queries of each sequence; None: one, its last token.
        splits: programs that share the pages of one head and sequence; 0 chooses.
        batch_invariant: divide the pages by the sequence's own length alone, so that what a
            decoding step gives a sequence has the same bits in any batch. Prompts are divided by
            what their call holds; give them one sequence at a time.
    Raises:
        KvfoldError: formats and segments don't fit each other, or are more than MOST_RUNGS.
    """
    batch, kv_heads, blocks, padded, dim = queries.data.shape
    _check_rungs(cache.segments, len(formats), batch)
    sinks, window, page_tokens, table = (
        regions.sinks,
        regions.window,
        regions.page_tokens,
        cache.table,
    )
    fixed = batch_invariant and prompt is None
    places = batch * kv_heads * blocks
    splits = _splits(splits, cache, page_tokens, places, fixed)
    parts = splits + (len(formats) if len(formats) > 1 else 0)
    device = out.device
    partial = torch.empty(places, parts, padded, dim, dtype=torch.float32, device=device)
    ml = torch.empty(places, parts, 2, padded, dtype=torch.float32, device=device)
    none = cache.state  # in place of what is not there, of the same type: nothing reads it
    mean, shift = queries.mean, queries.shift
    term: tuple = (queries.scale, queries.scale, queries.scale, queries.scale, 0, 0)
    if mean is not None:
        tables = mean.tables
        term = (
            mean.coefficients,
            mean.bias,
            tables.spans,
            tables.within,
            mean.bias.shape[3],
            mean.first_step,
        )
    cap = float(logits.softcap or 0.0)
    raw_keys, raw_values = cache.raw_keys, cache.raw_values
    if any(step % ROW_UNIT.value for step in raw_keys.stride()[:3]):
        raw_keys, raw_values = raw_keys.contiguous(), raw_values.contiguous()
    raw_steps = [step // ROW_UNIT.value for step in raw_keys.stride()[:3]]
    beside = Branches(device, len(formats))
    for rung, pair in enumerate(formats):
        k_layout, v_layout = (device_layout(x, page_tokens) for x in pair)
        ahead = k_layout.ahead or v_layout.ahead  # addresses are loaded one tile ahead (LOG.md)
        stages = AHEAD_STAGES if ahead else STAGES
        four_bit = prompt is None and all(levels == 16 for fmt in pair for _, levels in fmt.classes)
        with beside.branch(rung):
            launch(
                _attention_kernel, (parts if rung == len(formats) - 1 else splits, kv_heads, batch * blocks),
                # queries and cache
                queries.data, queries.scale, queries.scale if shift is None else shift, anchor(device),
                table, cache.state, none if cache.segments is None else cache.segments,
                raw_keys, raw_values, partial, ml,
                none if prompt is None else prompt.first_query, none if prompt is None else prompt.packed_before,
                # numbers
                new, table.shape[1], sinks, window, regions.ring, logits.sliding, blocks, splits, parts,
                FIXED_TILES if fixed else 1, rung, len(formats), *raw_steps, *term,
                none, 0, 0, 0, 0, 0,
                K=k_layout, V=v_layout, R=device_layout(raw16(dim), page_tokens), N=padded, COLUMNS=queries.columns,
                GROUP=queries.group, PROMPT=prompt is not None, MASKED=prompt is not None or logits.sliding > 0,
                CAP=cap, SHIFT=shift is not None and cap > 0, MEAN=0 if mean is None else mean.tables.within.shape[1],
                STAGES=stages, PREFETCH=ahead, BLOCK=RAW_BLOCK, INTERPRET=INTERPRET, PER_BLOCK=0, num_warps=1,
                num_stages=stages, maxnreg=FOUR_BIT_REGISTERS if four_bit else None,
            )  # fmt: skip
    beside.join()
    merge_parts(
        partial,
        ml,
        out,
        logits.sink_logits,
        None if cap else shift,
        cache.state,
        queries,
        regions,
        new=new,
        advance=advance,
        in_order=fixed,
    )
    return out


def _check_rungs(segments: Tensor | None, rungs: int, batch: int) -> None:
    """Raises KvfoldError where segments don't fit formats, or there are too many."""
    shape = None if segments is None else tuple(segments.shape)
    if shape != (batch, rungs + 1) and not (shape is None and rungs == 1):
        raise KvfoldError(
            f"segments of shape {shape} don't fit {rungs} formats; "
            f"give int32 [{batch}, formats + 1] with formats, or neither."
        )
    if rungs > MOST_RUNGS.value:
        raise KvfoldError(
            f"Pages of {rungs} formats are too many for one call; give {MOST_RUNGS.value} at the most."
        )


def _splits(given: int, cache: PagedCache, page_tokens: int, places: int, fixed: bool) -> int:
    """Programs that share the pages of one head and sequence: as many as were asked for, or 0 for
    as many as are best."""
    most = MOST_SLOTS - 32
    if fixed:  # enough for the longest sequence that fits the table
        raw = -(-cache.raw_keys.shape[2] // RAW_BLOCK)
        units = -(-cache.table.shape[1] * page_tokens // TILE_TOKENS) + raw
        return min(-(-units // (FIXED_TILES * 32)) * 32, most)  # in whole blocks of the merge
    return given or min(
        pick_splits(places, cache.table.shape[1] * page_tokens, cache.table.device), most
    )


def pick_splits(programs: int, tokens: int, device: torch.device) -> int:
    """Programs for each head and sequence: one wave of the device, each with LEAST_TOKENS or more.

    Args:
        programs: heads × sequences × query blocks.
        tokens: of the longest sequence that fits the block table.
    """
    count = multiprocessors(device)
    if not count:
        return 2
    wave = WAVE * count
    return max(1, min(wave // programs, tokens // LEAST_TOKENS))
