"""A step of an engine with the Triton kernels. Like torch_attention.py, which says what is computed
and is what this one is measured by.

Requests with one new token come first and go together through two kernels that read block tables
themselves; the host is asked for nothing, so a step of such requests alone can be captured in a
CUDA graph. The others, prompts and their chunks, are taken one by one: their lengths are known on
the host (which waits for them where tokens are drafted), their rows are gathered, and addresses of
their pages computed, on the device, for the kernels that kvfold's own runtime has.

Block 0 is nobody's, and its numbers are read and multiplied by 0 where a request has no page: it is
never written.
"""

import torch
from torch import Tensor

from kvfold.kernels.compile.launch import multiprocessors
from kvfold.kernels.gpu.append_blocks import append_blocks
from kvfold.kernels.gpu.attention import WAVE
from kvfold.kernels.gpu.blocks import WAVES, BlockCache, attend_blocks, check_blocks
from kvfold.kernels.gpu.encode import encode_pages
from kvfold.kernels.gpu.mean import STEPS_BLOCK, StoredMean, stored_mean
from kvfold.kernels.gpu.prompt import SCRATCH_NBYTES, PromptRows
from kvfold.kernels.gpu.queries import Queries, empty_queries
from kvfold.kernels.gpu.records import KeyTransform
from kvfold.kernels.gpu.rows import GatheredRows, gather_rows, store_rows
from kvfold.kernels.key_mean import STEP
from kvfold.kernels.pages import UNIT, anchor
from kvfold.runtime.backends.base import LayerTensors, LogitOptions, RowView
from kvfold.runtime.backends.triton import (
    QUERY_CHUNK,
    attend_decoded,
    attend_few,
    by_channels,
    is_few,
    is_shifted,
    kernel_logits,
    kernel_regions,
    page_format,
)
from kvfold.runtime.vllm.batch import Chunk, DeviceBatch
from kvfold.runtime.vllm.layer import ServedLayer
from kvfold.runtime.vllm.torch_attention import BlockPages, Blocks, pages_of


def attend_step(
    layer: ServedLayer,
    blocks: Blocks,
    batch: DeviceBatch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    options: LogitOptions,
    out: Tensor,
) -> None:
    """Stores a step's keys and values, packs the pages that come due, and attends; arguments are
    those of torch_attention.attend_step, but that tokens behind the step's own are padding, whose
    `out` is not written."""
    # 16-bit rows of chunks before any page, and all pages before any query: a request may share
    # blocks that another one of this step fills
    mean = _mean(layer, batch) if batch.chunks and layer.spec.key.turns else None
    _store(layer, blocks, batch, key, value, mean)
    n, single = batch.singles, None
    read: tuple[Tensor, GatheredRows] | None = None
    if n:
        cache = _cache(layer, blocks, batch)
        single = _append(layer, cache, batch, query[:n], key[:n], value[:n], scaling, options)
    for chunk in batch.chunks:  # rows of one at a time, whatever their number
        if pages_of(layer, chunk.before) < pages_of(layer, chunk.length):
            read = _rows(layer, blocks, batch, chunk, mean)
            _pack(layer, blocks, batch, chunk, read[1])
    if single is not None:
        formats = (layer.spec.key.format, layer.spec.value.format)
        attend_blocks(
            single, cache, formats, out[:n], kernel_regions(layer.geometry), kernel_logits(options)
        )
    for chunk in batch.chunks:
        if read is None or len(batch.chunks) > 1:
            read = _rows(layer, blocks, batch, chunk, mean)
        new = slice(chunk.first, chunk.end)
        _attend_chunk(
            layer, blocks, batch, chunk, read, mean, query[new], out[new], scaling, options
        )


def scratch_nbytes(
    tokens: int, sequences: int, most_tokens: int, num_heads: int, layer: ServedLayer
) -> int:
    """Bytes, generously, that a step takes beside the pool, so that memory for them is left over.

    Args:
        tokens: new ones of the step; sequences: that have one each, at the most.
        most_tokens: that a sequence can have.
    """
    g = layer.geometry
    width = g.num_kv_heads * g.head_dim
    queries = 12 * min(tokens, QUERY_CHUNK) * num_heads * g.head_dim
    slow = 4 * width * (most_tokens // STEP + 2)  # the mean's slow pairs at every step
    rows = 16 * width * (tokens + g.sinks + g.window + g.page_tokens)
    chunks = queries + rows + slow + 2 * SCRATCH_NBYTES
    columns = max(8, 2 * num_heads // g.num_kv_heads)  # queries of a KV head, to a power of two
    places = sequences * g.num_kv_heads
    parts = places + WAVES * WAVE * multiprocessors(torch.device("cuda"))
    single = columns * (4 * parts * (g.head_dim + 2) + 6 * places * g.head_dim)
    if layer.spec.key.turns:  # the bias of the slow pairs, at every step of every sequence
        single += 4 * columns * places * (most_tokens // STEP + STEPS_BLOCK)
    return chunks + single


def _cache(layer: ServedLayer, blocks: Blocks, batch: DeviceBatch) -> BlockCache:
    """The blocks of the requests with one new token."""
    n = batch.singles
    cache = BlockCache(
        blocks.packed, blocks.raw, batch.packed_table[:n], batch.raw_table[:n], batch.lengths[:n], batch.raw_slots,
        layer.page_stride, layer.layout.pages_per_block, layer.layout.first_place,
    )  # fmt: skip
    check_blocks(cache)
    return cache


def _append(
    layer: ServedLayer, cache: BlockCache, batch: DeviceBatch, query: Tensor, key: Tensor, value: Tensor,
    scaling: float, options: LogitOptions,
) -> Queries:  # fmt: skip
    """Stores one token of each request, packs what comes due, and prepares the queries."""
    spec, g = layer.spec.key, layer.geometry
    queries = empty_queries(
        len(query), query.shape[1], g.num_kv_heads, g.head_dim, query.device, is_shifted(spec, options),
        spec.tables(g.sinks) if spec.turns else None, batch.most_tokens, stays=False,
    )  # fmt: skip
    append_blocks(
        key, value, query, cache, queries, page_format(layer.spec), kernel_regions(layer.geometry),
        scaling=scaling, softcap=options.softcap,
        transform=KeyTransform(spec.matrix, spec.offset, spec.query_matrix),
    )  # fmt: skip
    return queries


def _store(
    layer: ServedLayer,
    blocks: Blocks,
    batch: DeviceBatch,
    key: Tensor,
    value: Tensor,
    mean: StoredMean | None,
) -> None:
    """Writes the chunks' rows, in 16 bits and keys in their stored basis, into raw blocks."""
    if not batch.chunks:
        return
    spec, raw = layer.spec.key, blocks.raw
    new = slice(batch.chunks[0].first, batch.chunks[-1].end)
    positions = batch.kept.get(("positions",))
    if positions is None:
        tokens = [torch.arange(x.before, x.length, device=key.device) for x in batch.chunks]
        positions = batch.kept[("positions",)] = torch.cat(tokens)
    name = ("places", *raw.stride())
    places = batch.kept.get(name)
    if places is None:
        slots = batch.raw_slots[new]
        places = torch.where(slots >= 0, _row_places(layer, raw, slots), -1)
        batch.kept[name] = places
    keys, values = raw.chunk(2, -1)
    offset = None if spec.turns else spec.offset
    store_rows(
        by_channels(key[new]), by_channels(value[new]), positions, places, spec.matrix, offset, mean,
        layer.layout.sinks, keys, values, raw.stride(1),
    )  # fmt: skip


def _row_places(layer: ServedLayer, raw: Tensor, slots: Tensor) -> Tensor:
    """Numbers from the beginning of `raw` to the rows of slots, block · raw_block_tokens + place."""
    size = layer.layout.raw_block_tokens
    return slots // size * raw.stride(0) + slots % size * raw.stride(2)


def _mean(layer: ServedLayer, batch: DeviceBatch) -> StoredMean:
    """What the keys of all requests of a step with several new tokens are stored without."""
    spec = layer.spec.key
    tokens = max(x.length for x in batch.chunks)
    return stored_mean(spec.tables(layer.layout.sinks), spec.mean_bases, tokens)


def _rows(
    layer: ServedLayer, blocks: Blocks, batch: DeviceBatch, chunk: Chunk, mean: StoredMean | None
) -> tuple[Tensor, GatheredRows]:
    """(positions int64 [R], 16-bit rows) of what a chunk's queries read so: sinks, and what was not
    packed before."""
    g, size, raw = layer.geometry, layer.layout.raw_block_tokens, blocks.raw
    first = pages_of(layer, chunk.before) * g.page_tokens
    begin, sinks = (min(x, chunk.length) for x in (g.sinks + first, g.sinks))
    name = ("rows", chunk.request, *raw.stride())
    if name not in batch.kept:
        tokens = [
            torch.arange(a, b, device=raw.device) for a, b in ((0, sinks), (begin, chunk.length))
        ]
        positions = torch.cat(tokens)
        numbers = batch.raw_table[chunk.request].long()[positions // size]
        places = _row_places(layer, raw, numbers * size + positions % size)
        batch.kept[name] = torch.stack((positions, places))
    positions, places = batch.kept[name]
    keys, values = raw.chunk(2, -1)
    rows = gather_rows(
        keys, values, raw.stride(1), positions, places, g.num_kv_heads, g.head_dim, mean, g.sinks, copy=True
    )  # fmt: skip
    return positions, rows


def _pack(
    layer: ServedLayer, blocks: Blocks, batch: DeviceBatch, chunk: Chunk, rows: GatheredRows
) -> None:
    """Packs the pages that come due with a chunk's tokens."""
    g, device = layer.geometry, blocks.raw.device
    first, last = (pages_of(layer, tokens) for tokens in (chunk.before, chunk.length))
    addresses = _addresses(layer, blocks, batch, chunk, last)
    starts = torch.arange(last - first, dtype=torch.int32, device=device) * g.page_tokens
    sinks = min(g.sinks, chunk.length)
    encode_pages(
        rows.keys[None, :, sinks:], rows.values[None, :, sinks:], page_format(layer.spec), addresses[first:],
        torch.zeros_like(starts), starts, page_tokens=g.page_tokens,
    )  # fmt: skip


def _attend_chunk(
    layer: ServedLayer, blocks: Blocks, batch: DeviceBatch, chunk: Chunk, read: tuple[Tensor, GatheredRows],
    mean: StoredMean | None, query: Tensor, out: Tensor, scaling: float, options: LogitOptions,
) -> None:  # fmt: skip
    """The queries [T, num_heads, head_dim] of a chunk, whose pages are all there; `read`: from
    `_rows`."""
    g, device = layer.geometry, blocks.raw.device
    first, last = (pages_of(layer, tokens) for tokens in (chunk.before, chunk.length))
    table = _addresses(layer, blocks, batch, chunk, last)[None]
    name = ("state", chunk.request)
    if name not in batch.kept:
        state = torch.full((1, 2), chunk.length, dtype=torch.int32, device=device)
        state[:, 1] = last
        batch.kept[name] = state
    state = batch.kept[name]
    positions, rows = read
    record = LayerTensors(
        layer.index, g, [layer.spec], rows.keys, rows.values, state, table, state, None,
        BlockPages(layer, blocks.packed), layer.workspace, batch_invariant=False,
    )  # fmt: skip
    before = first * g.page_tokens
    row = RowView(
        0, 0, positions, positions, rows.keys, rows.values, positions, list(range(last)), before, chunk.length, 0
    )  # fmt: skip
    queries = query.transpose(0, 1)[None]
    raw = PromptRows(rows.read_keys, rows.values, before)
    if is_few(record, row, queries):  # drafts
        attend_few(record, 0, row, raw, table, queries, out[None], scaling, options)
    else:
        attend_decoded(record, row, raw, table, mean, queries, out[None], scaling, options)


def _addresses(
    layer: ServedLayer, blocks: Blocks, batch: DeviceBatch, chunk: Chunk, count: int
) -> Tensor:
    """int64 [max(1, count)], addresses of a request's first pages (kernels.pages); of memory that
    is nobody's where the table names no block."""
    per_block, base = layer.layout.pages_per_block, blocks.packed
    name = ("pages", chunk.request)
    if name not in batch.kept:
        places = torch.arange(max(1, count), device=base.device) + layer.layout.first_place
        entries = batch.packed_table[chunk.request].long()[places // per_block]
        batch.kept[name] = torch.stack((entries, places % per_block))
    entries, places = batch.kept[name]
    begin = base.data_ptr() - anchor(base.device).data_ptr()
    steps = (base.stride(0) // UNIT, layer.page_stride // UNIT)
    spare = batch.kept.get(("spare", layer.page_stride))
    if spare is None:
        spare = torch.zeros(layer.page_stride, dtype=torch.uint8, device=base.device)
        batch.kept[("spare", layer.page_stride)] = spare
    nowhere = (spare.data_ptr() - anchor(base.device).data_ptr()) // UNIT
    found = entries * steps[0] + places * steps[1] + begin // UNIT
    return torch.where(entries > 0, found, nowhere)
