"""One decoding step of one layer up to the attention: transform, window, page, queries. A single
launch.

What the host must know is known when the step is captured: lengths, pages and their addresses are
read on the device, so the launch can be part of a CUDA graph. The lengths move on in the kernel
that merges the attention's parts (merge.py).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.kernels.compile.launch import launch
from kvfold.kernels.gpu.clips import clips_of
from kvfold.kernels.gpu.device.codec import RawRows
from kvfold.kernels.gpu.device.columns import NBYTES
from kvfold.kernels.gpu.device.pages import write_block
from kvfold.kernels.gpu.device.step import LABELS, write_query, write_row
from kvfold.kernels.gpu.kinds import own_code
from kvfold.kernels.gpu.mean import STEPS_BLOCK, MeanTerm
from kvfold.kernels.gpu.queries import QUERY_TOP, Queries, logit_factor
from kvfold.kernels.gpu.records import KeyTransform, PagedCache, PageFormat, Regions
from kvfold.kernels.gpu.tables import format_tables, table_length, warps_for
from kvfold.kernels.kinds.storage import FIELDS
from kvfold.kernels.pages import UNIT, anchor

UNROLL: tl.constexpr = tl.constexpr(2)  # fields of a page at a time
# of a thread: steps that write no page, nearly all, want many programs at once and not what a page
# takes
REGISTERS = 96
NO_TRANSFORM = KeyTransform()
UNMARKED = 2**63 - 1  # of a sequence whose keys and values were all finite


def empty_marks(batch: int, device: torch.device) -> Tensor:
    """int64 [batch], for `append_step`: no sequence has had a key or value that is NaN or
    infinite."""
    return torch.full((batch,), UNMARKED, dtype=torch.int64, device=device)


def read_mark(mark: int) -> tuple[int, int, str]:
    """(token, layer, "key" or "value") of a mark other than UNMARKED."""
    token, label = divmod(mark, LABELS.value)
    return token, label // 2, ("key", "value")[label % 2]


# numbers that vary from layer to layer, or from format to format, must not each compile a kernel of
# their own
@triton.jit(
    do_not_specialize=[
        "label", "k_clip_r", "k_clip_h", "k_clip_g", "v_clip_r", "v_clip_h", "v_clip_g", "rung_count", "given_rungs",
        "table_width", "sinks", "window", "ring", "key_stride_b", "key_stride_h", "value_stride_b", "value_stride_h",
        "raw_stride_b", "raw_stride_h", "raw_stride_t", "bias_steps",
    ],
    do_not_specialize_on_alignment=[
        "table", "state", "marks", "new_keys", "new_values", "raw_keys", "raw_values", "rungs", "k_clip", "v_clip",
        "coefficients", "bias", "spans", "within", "steps", "pairs", "channels",
    ],
)  # fmt: skip
def _append_kernel(
    anchor_ptr, table, state, marks, new_keys, new_values, query, raw_keys, raw_values, q_out, q_scale, q_shift,
    matrix, offset, query_matrix, formats, rungs, k_clip, v_clip, k_clip_r, k_clip_h, k_clip_g,
    v_clip_r, v_clip_h, v_clip_g,
    rung_count, given_rungs, label, factor, scaling,
    table_width, sinks, window, ring, key_stride_b, key_stride_h, value_stride_b, value_stride_h,
    query_stride_b, query_stride_h, raw_stride_b, raw_stride_h, raw_stride_t,
    coefficients, bias, spans, within, steps, pairs, channels, bias_steps,
    DIM: tl.constexpr, ROWS: tl.constexpr, TABLE: tl.constexpr, MATRIX: tl.constexpr, OFFSET: tl.constexpr,
    SHIFT: tl.constexpr, MARKS: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, TOP: tl.constexpr,
    MEAN: tl.constexpr, BIAS: tl.constexpr, OWN: tl.constexpr,
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
            tl.program_id(2) - 2, place, state + 2 * b, sinks, q, query_stride_h, q_out, q_scale, q_shift,
            query_matrix + head * (DIM * DIM), offset + head * DIM, coefficients, bias, steps, pairs,
            factor, scaling, bias_steps,
            DIM, GROUP, N, TOP, MATRIX, SHIFT, MEAN, BIAS,
        )  # fmt: skip
    else:
        token = tl.load(state + 2 * b)
        pages = tl.load(state + 2 * b + 1)
        row = tl.where(token < sinks, token, sinks + tl.maximum(token - sinks, 0) % ring)
        at = b.to(tl.int64) * raw_stride_b + head.to(tl.int64) * raw_stride_h
        if tl.program_id(2) == 0:
            # keys and values may be of two types, under autocast: names of their own keep them apart
            k = new_keys + b.to(tl.int64) * key_stride_b + head * key_stride_h
            out = raw_keys + at + row.to(tl.int64) * raw_stride_t
            mu = offset + head * DIM
            write_row(
                out, k, matrix + head * (DIM * DIM), mu, marks + b, token, label, token - sinks, spans, within,
                steps, channels,
                DIM, MATRIX, OFFSET, MARKS, MEAN,
            )  # fmt: skip
        else:
            v = new_values + b.to(tl.int64) * value_stride_b + head * value_stride_h
            out = raw_values + at + row.to(tl.int64) * raw_stride_t
            write_row(
                out, v, matrix, offset, marks + b, token, label + 1, token, spans, within, steps, channels,
                DIM, False, False, MARKS, 0,
            )  # fmt: skip
        due = tl.maximum(token + 1 - sinks - window, 0) // (8 * ROWS)
        if due > pages:
            tl.debug_barrier()  # without a window the page ends with the row just written
            rung = rung_count - 1
            if given_rungs > 0:
                rung = tl.load(rungs + b)
            own = formats + rung * TABLE
            block = anchor_ptr + tl.load(table + b.to(tl.int64) * table_width + pages) * 16
            if tl.program_id(2) == 0:
                src = raw_keys + at
                clip = k_clip + rung * k_clip_r + head * k_clip_h
                clipped = k_clip_h
                clip_step = k_clip_g
            else:
                block += heads * tl.load(own + NBYTES)
                own += rung_count * TABLE
                src = raw_values + at
                clip = v_clip + rung * v_clip_r + head * v_clip_h
                clipped = v_clip_h
                clip_step = v_clip_g
            block += head * tl.load(own + NBYTES)
            start = sinks + (pages * (8 * ROWS)) % ring
            rows = RawRows(src, raw_stride_t, start, sinks + ring, ring)
            write_block(block, own, clip, clip_step, clipped, rows, ROWS, False, OWN, UNROLL)


def append_step(
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    cache: PagedCache,
    queries: Queries,
    formats: Sequence[PageFormat],
    regions: Regions,
    *,
    scaling: float,
    softcap: float | None = None,
    transform: KeyTransform = NO_TRANSFORM,
    rungs: Tensor | None = None,
    marks: Tensor | None = None,
    layer: int = 0,
) -> None:
    """Appends one token to every sequence and prepares its queries; the cache's state is not moved
    on.

    z = M(k − m_t) in float32, saturated to float16, and v go to row sinks + (t − sinks) mod ring of
    the 16-bit rows (row t for t < sinks), t being the sequence's length. If the window and the
    sinks leave a page's worth of tokens unpacked, page number `pages` of the sequence is written to
    its address in the table; no step brings more than one. Nothing is read by the host.

    Args:
        keys, values: new ones after RoPE, [B, Hkv, 1, head_dim], float16, bfloat16 or float32.
        query: [B, num_heads, 1, head_dim].
        cache: before this token, its table with the address of the page that may come due; its
            16-bit rows are sinks and a ring of at least window + page_tokens.
        queries: written; from `empty_queries`, and to be given to `attention`. With a shift or a
            mean there must be an offset; with a mean that is the mean of keys before RoPE, and the
            token's rotating mean is taken off its key (key_mean.py).
        formats: of the page that may come due, one, or one for each rung where pages differ. Clips
            are contiguous, and not written to afterwards: those of several rungs are copied side by
            side once.
        regions: of the cache; the ring is what the rows have room for.
        scaling, softcap: of the model's attention.
        transform: of keys and queries.
        rungs: int32 [B], contiguous: which of the formats the page has that comes due; None for the
            last. Read on the device, so it may change between replays of a CUDA graph.
        marks: int64 [B] from `empty_marks`, for all layers of a cache, contiguous. A sequence's
            becomes that of its earliest key or value that is NaN or infinite, as `read_mark` tells;
            None: nobody looks.
        layer: number of the layer, for marks.
    Raises:
        KvfoldError: the rows have no room for a page beside the window, a matrix comes without its
            inverse, a shift without an offset, rungs are no int32 [B], or a tensor lies otherwise
            in memory.
    """
    batch, kv_heads, _, dim = keys.shape
    sinks, window, page_tokens = regions.sinks, regions.window, regions.page_tokens
    ring = cache.raw_keys.shape[2] - sinks
    if ring < window + page_tokens:
        raise KvfoldError(
            f"The ring has {ring} rows, but a window of {window} and a page of {page_tokens} must fit."
        )
    _check(keys, values, query, cache, rungs)
    check_transform(transform, queries)
    shift, mean = queries.shift, queries.mean
    none = queries.scale  # in place of what is not there, of the same type: nothing reads it
    matrix, offset, query_matrix = (none if x is None else x for x in transform)
    term, bias_steps = mean_arguments(mean, none)
    k_clip, *k_strides = clips_of([x.key_clip for x in formats], [x.key for x in formats], kv_heads)
    v_clip, *v_strides = clips_of(
        [x.value_clip for x in formats], [x.value for x in formats], kv_heads
    )
    tables = format_tables(
        [[x.key for x in formats], [x.value for x in formats]], page_tokens, keys.device
    )
    launch(
        _append_kernel, (batch, kv_heads, 3 + bias_steps // STEPS_BLOCK),
        # cache and new tokens
        anchor(keys.device), cache.table, cache.state, cache.table if marks is None else marks,
        keys, values, query, cache.raw_keys, cache.raw_values,
        # queries
        queries.data, queries.scale, none if shift is None else shift, matrix, offset, query_matrix,
        # formats
        tables, cache.state if rungs is None else rungs, none if k_clip is None else k_clip,
        none if v_clip is None else v_clip, *k_strides, *v_strides, len(formats), int(rungs is not None),
        # numbers
        2 * layer, logit_factor(scaling, softcap), scaling, cache.table.stride(0), sinks, window, ring,
        *keys.stride()[:2], *values.stride()[:2], *query.stride()[:2], *cache.raw_keys.stride()[:3], *term, bias_steps,
        DIM=dim, ROWS=page_tokens // FIELDS, TABLE=table_length(dim), MATRIX=transform.matrix is not None,
        OFFSET=transform.offset is not None, SHIFT=shift is not None, MARKS=marks is not None, GROUP=queries.group,
        N=queries.data.shape[3], TOP=QUERY_TOP, MEAN=0 if mean is None else mean.tables.within.shape[1],
        BIAS=STEPS_BLOCK, OWN=own_code([side for x in formats for side in (x.key, x.value)]),
        num_warps=warps_for(page_tokens), maxnreg=REGISTERS, enable_fp_fusion=False,
    )  # fmt: skip


def mean_arguments(mean: MeanTerm | None, none: Tensor) -> tuple[list[Tensor], int]:
    """(tensors of a rotating mean that a step's kernel writes and reads, steps of its bias).

    Args:
        none: in place of each where there is no such mean.
    """
    if mean is None:
        return [none] * 7, 0
    turns = mean.tables
    tensors = [turns.spans, turns.within, turns.steps, turns.pairs, turns.channels]
    return [mean.coefficients, mean.bias, *tensors], mean.bias.shape[3]


def check_transform(transform: KeyTransform, queries: Queries) -> None:
    """Raises KvfoldError where a step's transform is not as its kernel reads it, or is not that of
    its queries."""
    if (transform.matrix is None) != (transform.query_matrix is None):
        raise KvfoldError("matrix and query_matrix belong together; give both or neither.")
    if queries.shift is not None and transform.offset is None:
        raise KvfoldError(
            "The queries have a shift, but the keys no offset; make them without, or give the offset."
        )
    if queries.mean is not None and (transform.offset is None or queries.shift is not None):
        raise KvfoldError(
            "A rotating mean of keys is made from their offset, and leaves no shift; give the first alone."
        )
    for x in transform:
        if x is not None and not (x.is_contiguous() and x.dtype == torch.float32):
            raise KvfoldError(
                "A key transform is not contiguous float32 (an inverse comes transposed); copy it once before."
            )


def _check(
    keys: Tensor, values: Tensor, query: Tensor, cache: PagedCache, rungs: Tensor | None
) -> None:
    """Raises KvfoldError where tensors of a step lie otherwise in memory than its kernel reads
    them."""
    rows = cache.raw_keys
    if rows.stride() != cache.raw_values.stride() or any(
        x.stride(-1) != 1 for x in (keys, values, query, rows)
    ):
        raise KvfoldError(
            "16-bit keys and values need the same strides, and every tensor its channels side by side."
        )
    for x in (rows, cache.raw_values):
        if x.data_ptr() % UNIT or any(step % (UNIT // 2) for step in x.stride()[:-1]):
            raise KvfoldError(
                f"16-bit rows with strides {x.stride()} do not all begin at multiples of {UNIT} bytes; "
                "allocate them as contiguous tensors of a head_dim that is a multiple of 8."
            )
    batch = len(keys)
    if rungs is not None and (
        rungs.shape != (batch,) or rungs.dtype != torch.int32 or not rungs.is_contiguous()
    ):
        raise KvfoldError(
            f"rungs are {rungs.dtype} {tuple(rungs.shape)}; give contiguous int32 ({batch},)."
        )
