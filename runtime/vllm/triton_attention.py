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
from kvfold.kernels.gpu.mean import STEPS_BLOCK
from kvfold.kernels.gpu.prompt import SCRATCH_NBYTES
from kvfold.kernels.gpu.queries import Queries, empty_queries
from kvfold.kernels.gpu.records import KeyTransform
from kvfold.kernels.key_mean import STEP
from kvfold.kernels.pages import UNIT, anchor
from kvfold.kernels.quantizer import to_float16
from kvfold.runtime.backends.base import LayerTensors, LogitOptions, RowView
from kvfold.runtime.backends.triton import (
    QUERY_CHUNK,
    attend_prompt,
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
    _store(layer, blocks, batch, key, value)
    n, single = batch.singles, None
    if n:
        cache = _cache(layer, blocks, batch)
        single = _append(layer, cache, batch, query[:n], key[:n], value[:n], scaling, options)
    read = [_pack(layer, blocks, batch, chunk) for chunk in batch.chunks]
    if single is not None:
        formats = (layer.spec.key.format, layer.spec.value.format)
        attend_blocks(
            single, cache, formats, out[:n], kernel_regions(layer.geometry), kernel_logits(options)
        )
    for chunk, (record, row) in zip(batch.chunks, read, strict=True):
        queries = query[chunk.first : chunk.end].transpose(0, 1)[None]
        to = out[None, chunk.first : chunk.end]
        attend_prompt(record, 0, row, queries, to, scaling, options)


def scratch_nbytes(
    tokens: int, sequences: int, most_tokens: int, num_heads: int, layer: ServedLayer
) -> int:
    """Bytes, generously, that a step takes beside the pool, so that memory for them is left over.

    Args:
        tokens: new ones of the step; sequences: that have one each, at the most.
        most_tokens: that a sequence can have.
    """
    g = layer.geometry
    together = min(tokens, QUERY_CHUNK)
    queries = together * g.head_dim * (24 * num_heads + 128 * g.num_kv_heads)
    chunks = queries + 40 * tokens * g.num_kv_heads * g.head_dim + 3 * SCRATCH_NBYTES
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
    layer: ServedLayer, blocks: Blocks, batch: DeviceBatch, key: Tensor, value: Tensor
) -> None:
    """Writes the chunks' rows, in 16 bits and keys in their stored basis, into raw blocks."""
    if not batch.chunks:
        return
    new = slice(batch.chunks[0].first, batch.chunks[-1].end)
    size = layer.layout.raw_block_tokens
    places = batch.kept.get(("slots",))
    if places is None:
        positions = [torch.arange(x.before, x.length, device=key.device) for x in batch.chunks]
        slots = batch.raw_slots[new]
        kept = (slots >= 0, slots.clamp_min(0))
        places = torch.stack((torch.cat(positions), kept[1] // size, kept[1] % size, kept[0]))
        batch.kept[("slots",)] = places
    keys = layer.spec.key.apply(
        key[new].transpose(0, 1), places[0], layer.layout.sinks, max(x.length for x in batch.chunks)
    )
    rows = torch.cat((to_float16(keys), to_float16(value[new].transpose(0, 1).float())), -1)
    rows, old = rows.transpose(0, 1), blocks.raw[places[1], :, places[2]]
    blocks.raw[places[1], :, places[2]] = torch.where(places[3, :, None, None] > 0, rows, old)


def _pack(
    layer: ServedLayer, blocks: Blocks, batch: DeviceBatch, chunk: Chunk
) -> tuple[LayerTensors, RowView]:
    """Packs the pages that come due with a chunk's tokens, and says what its queries read: sinks,
    what was not packed before, and all pages."""
    g, size, device = layer.geometry, layer.layout.raw_block_tokens, blocks.raw.device
    first, last = (pages_of(layer, tokens) for tokens in (chunk.before, chunk.length))
    begin, sinks = (min(x, chunk.length) for x in (g.sinks + first * g.page_tokens, g.sinks))
    name = ("rows", chunk.request)
    if name not in batch.kept:
        tokens = [torch.arange(a, b, device=device) for a, b in ((0, sinks), (begin, chunk.length))]
        positions = torch.cat(tokens)
        numbers = batch.raw_table[chunk.request].long()[positions // size]
        batch.kept[name] = torch.stack((positions, numbers, positions % size))
    positions, numbers, places = batch.kept[name]
    rows = blocks.raw[numbers, :, places].unflatten(-1, (2, g.head_dim))
    keys, values = rows.permute(
        2, 1, 0, 3
    ).contiguous()  # of the same strides, as kernels read them
    addresses = _addresses(layer, blocks, batch, chunk, last)
    if first < last:
        starts = torch.arange(last - first, dtype=torch.int32, device=device) * g.page_tokens
        encode_pages(
            keys[None, :, sinks:], values[None, :, sinks:], page_format(layer.spec), addresses[first:],
            torch.zeros_like(starts), starts, page_tokens=g.page_tokens,
        )  # fmt: skip
    state = torch.full((1, 2), chunk.length, dtype=torch.int32, device=device)
    state[:, 1] = last
    record = LayerTensors(
        layer.index, g, [layer.spec], keys, values, state, addresses[None], state, None,
        BlockPages(layer, blocks.packed), layer.workspace, batch_invariant=False,
    )  # fmt: skip
    row = RowView(
        0, 0, positions, positions, keys, values, positions, list(range(last)), first * g.page_tokens, chunk.length, 0
    )  # fmt: skip
    return record, row


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
