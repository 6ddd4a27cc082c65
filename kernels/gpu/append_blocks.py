"""A decoding step of one layer up to the attention, over the blocks of an engine's pool: transform,
16-bit row, page, queries. A single launch, in which the host is asked for nothing.

What is packed follows from a sequence's length alone, so nothing is moved on behind it. A page may
be written again, by another sequence that shares its block: of the same 16-bit rows, the same bytes.
A window of one token or none is for sequences that share no blocks: a page of theirs may come due
in the launch that stores its last row.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.kernels.compile.launch import launch
from kvfold.kernels.gpu.append import (
    NO_TRANSFORM,
    REGISTERS,
    UNROLL,
    check_transform,
    mean_arguments,
)
from kvfold.kernels.gpu.blocks import BlockCache
from kvfold.kernels.gpu.clips import clips_of
from kvfold.kernels.gpu.device.codec import IN_BLOCKS
from kvfold.kernels.gpu.device.columns import NBYTES
from kvfold.kernels.gpu.device.pages import write_block
from kvfold.kernels.gpu.device.places import BlockRows, load_pages
from kvfold.kernels.gpu.device.step import write_query, write_row
from kvfold.kernels.gpu.kinds import own_code
from kvfold.kernels.gpu.mean import STEPS_BLOCK
from kvfold.kernels.gpu.queries import QUERY_TOP, Queries, logit_factor
from kvfold.kernels.gpu.records import KeyTransform, PageFormat, Regions
from kvfold.kernels.gpu.tables import format_tables, table_length, warps_for
from kvfold.kernels.kinds.storage import FIELDS


# numbers that vary from layer to layer, or from format to format, must not each compile a kernel of
# their own
@triton.jit(
    do_not_specialize=[
        "k_clip_h", "k_clip_g", "v_clip_h", "v_clip_g", "table_width", "raw_table_width", "sinks", "window",
        "first_place", "block_step", "page_step", "raw_shift", "key_stride_b", "key_stride_h", "value_stride_b",
        "value_stride_h", "query_stride_b", "query_stride_h", "raw_stride_b", "raw_stride_h", "raw_stride_t",
        "bias_steps",
    ],
    do_not_specialize_on_alignment=[
        "table", "raw_table", "lengths", "slots", "new_keys", "new_values", "query", "k_clip", "v_clip",
        "coefficients", "bias", "spans", "within", "steps", "pairs", "channels",
    ],
)  # fmt: skip
def _append_blocks_kernel(
    packed, raw, table, raw_table, lengths, slots, new_keys, new_values, query, q_out, q_scale, q_shift,
    matrix, offset, query_matrix, formats, k_clip, v_clip, k_clip_h, k_clip_g, v_clip_h, v_clip_g, factor, scaling,
    table_width, raw_table_width, sinks, window, first_place, block_step, page_step, raw_shift,
    key_stride_b, key_stride_h, value_stride_b, value_stride_h, query_stride_b, query_stride_h,
    raw_stride_b, raw_stride_h, raw_stride_t, coefficients, bias, spans, within, steps, pairs, channels, bias_steps,
    DIM: tl.constexpr, ROWS: tl.constexpr, TABLE: tl.constexpr, MATRIX: tl.constexpr, OFFSET: tl.constexpr,
    SHIFT: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, TOP: tl.constexpr, MEAN: tl.constexpr,
    BIAS: tl.constexpr, OWN: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences, KV heads, keys, values or queries, and with MEAN every BIAS steps of the
    slow pairs)."""
    b = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    place = b * heads + head
    q = query + b.to(tl.int64) * query_stride_b + head * GROUP * query_stride_h
    if tl.program_id(2) >= 2:
        write_query(
            tl.program_id(2) - 2, place, lengths + b, sinks + 1, q, query_stride_h, q_out, q_scale, q_shift,
            query_matrix + head * (DIM * DIM), offset + head * DIM, coefficients, bias, steps, pairs,
            factor, scaling, bias_steps,
            DIM, GROUP, N, TOP, MATRIX, SHIFT, MEAN, BIAS,
        )  # fmt: skip
    else:
        token = tl.load(lengths + b) - 1
        slot = tl.load(slots + b)
        if (slot >= 0) & (token >= 0):
            rows = raw + head.to(tl.int64) * raw_stride_h
            row = (slot >> raw_shift) * raw_stride_b + (
                slot & ((1 << raw_shift) - 1)
            ) * raw_stride_t
            if tl.program_id(2) == 0:
                k = new_keys + b.to(tl.int64) * key_stride_b + head * key_stride_h
                mu = offset + head * DIM
                write_row(
                    rows + row, k, matrix + head * (DIM * DIM), mu, slots, token, 0, token - sinks, spans, within,
                    steps, channels,
                    DIM, MATRIX, OFFSET, False, MEAN,
                )  # fmt: skip
            else:
                v = new_values + b.to(tl.int64) * value_stride_b + head * value_stride_h
                rows += DIM
                write_row(
                    rows + row, v, matrix, offset, slots, token, 1, token, spans, within, steps, channels,
                    DIM, False, False, False, 0,
                )  # fmt: skip
            behind = tl.maximum(token + 1 - sinks - window, 0)
            # a page comes due where the tokens behind the window have just become whole pages
            if (behind > 0) & (behind % (8 * ROWS) == 0):
                tl.debug_barrier()  # without a window the page ends with the row just written
                number = behind // (8 * ROWS) - 1
                pages = table + b.to(tl.int64) * table_width
                page = load_pages(
                    pages, number, number >= 0, first_place, block_step, page_step, PER_BLOCK
                )
                block = packed + page * 16
                own = formats
                if tl.program_id(2) == 0:
                    clip = k_clip + head * k_clip_h
                    clipped = k_clip_h
                    clip_step = k_clip_g
                else:
                    block += heads * tl.load(own + NBYTES)
                    own += TABLE
                    clip = v_clip + head * v_clip_h
                    clipped = v_clip_h
                    clip_step = v_clip_g
                block += head * tl.load(own + NBYTES)
                source = BlockRows(
                    rows, raw_stride_t, raw_table + b.to(tl.int64) * raw_table_width, raw_stride_b.to(tl.int64),
                    raw_shift, sinks + number * (8 * ROWS),
                )  # fmt: skip
                write_block(
                    block, own, clip, clip_step, clipped, source, ROWS, IN_BLOCKS, OWN, UNROLL
                )


def append_blocks(
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    cache: BlockCache,
    queries: Queries,
    fmt: PageFormat,
    regions: Regions,
    *,
    scaling: float,
    softcap: float | None = None,
    transform: KeyTransform = NO_TRANSFORM,
) -> None:
    """Appends the newest token of every sequence and prepares its queries.

    z = M(k − m_t) in float32, saturated to float16, and v go to the token's row of the 16-bit
    blocks. If sinks and window leave one more whole page of tokens than before, that page is
    written to its place; a step of one token brings no more than one.

    Args:
        keys, values: new ones after RoPE, [B, Hkv, head_dim], float16, bfloat16 or float32.
        query: [B, num_heads, head_dim].
        cache: of one layer, with the blocks that the new tokens need.
        queries: written; from `empty_queries`, and to be given to `attend_blocks`.
        fmt: of pages; clips contiguous.
        regions: of the cache.
        scaling, softcap: of the model's attention.
        transform: of keys and queries, contiguous float32.
    Raises:
        KvfoldError: channels do not lie side by side, or the transform is no contiguous float32 or
            not that of the queries.
    """
    batch, kv_heads, dim = keys.shape
    page_tokens = regions.page_tokens
    if any(x.stride(-1) != 1 for x in (keys, values, query)):
        raise KvfoldError("Channels of a step's states do not lie side by side; copy them first.")
    check_transform(transform, queries)
    shift, mean = queries.shift, queries.mean
    none = queries.scale  # in place of what is not there, of the same type: nothing reads it
    matrix, offset, query_matrix = (none if x is None else x for x in transform)
    term, bias_steps = mean_arguments(mean, none)
    k_clip, _, *k_strides = clips_of([fmt.key_clip], [fmt.key], kv_heads)
    v_clip, _, *v_strides = clips_of([fmt.value_clip], [fmt.value], kv_heads)
    tables = format_tables([[fmt.key], [fmt.value]], page_tokens, keys.device)
    launch(
        _append_blocks_kernel, (batch, kv_heads, 3 + bias_steps // STEPS_BLOCK),
        cache.packed, cache.raw, cache.table, cache.raw_table, cache.lengths, cache.slots, keys, values, query,
        queries.data, queries.scale, none if shift is None else shift, matrix, offset, query_matrix,
        tables, none if k_clip is None else k_clip, none if v_clip is None else v_clip, *k_strides, *v_strides,
        logit_factor(scaling, softcap), scaling,
        cache.table.stride(0), cache.raw_table.stride(0), regions.sinks, regions.window, *cache.page_steps,
        cache.raw_shift, *keys.stride()[:2], *values.stride()[:2], *query.stride()[:2], *cache.raw.stride()[:3],
        *term, bias_steps,
        DIM=dim, ROWS=page_tokens // FIELDS, TABLE=table_length(dim), MATRIX=transform.matrix is not None,
        OFFSET=transform.offset is not None, SHIFT=shift is not None, GROUP=queries.group, N=queries.data.shape[3],
        TOP=QUERY_TOP, MEAN=0 if mean is None else mean.tables.within.shape[1], BIAS=STEPS_BLOCK,
        OWN=own_code([fmt.key, fmt.value]), PER_BLOCK=cache.pages_per_block,
        num_warps=warps_for(page_tokens), maxnreg=REGISTERS, enable_fp_fusion=False,
    )  # fmt: skip
