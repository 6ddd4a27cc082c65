"""A step of an engine in plain torch, on any device: stores the new keys and values in blocks, packs
the pages that come due, attends. What kernels over an engine's block tables are to be measured by.

triton_attention.py has the same one function `attend_step`. This one loops over a step's requests on
the host; the arithmetic is the reference backend's, which reads pages and 16-bit rows wherever they
lie.

Nothing is kept beside the blocks and their tables: which tokens are packed follows from a request's
length alone. A page may be packed again, by another request that shares its block or after a draft
was rejected; it gets the same bytes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvfold.kernels.attention import packed_tokens
from kvfold.kernels.quantizer import to_float16
from kvfold.runtime.backends.base import LayerTensors, LogitOptions, RowView
from kvfold.runtime.backends.reference import REFERENCE
from kvfold.runtime.vllm.layer import ServedLayer


class Blocks(NamedTuple):
    """The memory of one layer in an engine's pool.

    Attributes:
        packed: uint8 [blocks, block_nbytes].
        raw: float16 [blocks, num_kv_heads, raw_block_tokens, 2·head_dim].
    """

    packed: Tensor
    raw: Tensor


class Batch(NamedTuple):
    """The requests of a step.

    Attributes:
        starts: first new token of each request among the step's, and their number at the end.
        lengths: tokens of each request, new ones included.
        packed_table, raw_table: int32 [requests, entries], blocks of each request.
        raw_slots: int64 [tokens], block · raw_block_tokens + place, where each new token's row goes;
            negative for no token.
    """

    starts: list[int]
    lengths: list[int]
    packed_table: Tensor
    raw_table: Tensor
    raw_slots: Tensor

    def tokens(self, request: int) -> tuple[int, int]:
        """(first new token, behind the last) of a request, counted from its own first token."""
        new = self.starts[request + 1] - self.starts[request]
        return self.lengths[request] - new, self.lengths[request]


class BlockPages:
    """The pages of one layer by number, which is block · pages_per_block + place in it; see
    runtime.backends.base.Pages."""

    def __init__(self, layer: ServedLayer, packed: Tensor) -> None:
        key, value = layer.spec.key.format, layer.spec.value.format
        self.sizes = [layer.geometry.pair_nbytes(key, value)]
        places = packed.unflatten(1, (layer.layout.pages_per_block, layer.page_stride))
        self._pages = places[..., : self.sizes[0]]

    def rung(self, number: int) -> int:
        """Always the floor."""
        return 0

    def page(self, number: int) -> Tensor:
        """A page's bytes, uint8 [size], to be written."""
        block, place = divmod(number, self._pages.shape[1])
        return self._pages[block, place]

    def readable(self, ids: list[int]) -> list[Tensor]:
        """The bytes of pages, uint8 [size] each."""
        return [self.page(number) for number in ids]

    def load(self, ids: list[int]) -> Tensor:
        """uint8 [len(ids), size], a copy."""
        numbers = torch.tensor(ids, device=self._pages.device)
        return self._pages[numbers // self._pages.shape[1], numbers % self._pages.shape[1]]

    def addresses(self, ids: list[int]) -> list[int]:
        """Not for this backend, which finds pages by number."""
        raise NotImplementedError


def attend_step(
    layer: ServedLayer,
    blocks: Blocks,
    batch: Batch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    options: LogitOptions,
    out: Tensor,
) -> None:
    """Stores a step's keys and values, and attends.

    Args:
        query: [tokens, num_heads, head_dim], after RoPE.
        key, value: [tokens, num_kv_heads, head_dim], keys after RoPE.
        out: [tokens, num_heads, head_dim], written.
    """
    record = _record(layer, blocks)
    _store(layer, blocks, batch, key, value)
    # all pages before any query: a request may share blocks that another one of this step fills
    _pack(layer, record, blocks, batch)
    for request in range(len(batch.lengths)):
        first, end = batch.starts[request : request + 2]
        if first == end:
            continue
        row = _row(layer, blocks, batch, request)
        mask = _sliding_mask(row, options.sliding)
        queries = query[first:end].transpose(0, 1)[None]
        found = REFERENCE.attend(record, [row], queries, scaling, options, mask)
        out[first:end] = found[0].transpose(0, 1).to(out.dtype)


def _record(layer: ServedLayer, blocks: Blocks) -> LayerTensors:
    """The layer as the reference backend takes it; it finds pages and rows through each row's
    view, so the tensors of a cache of its own stay empty."""
    none = blocks.raw.new_empty(0)
    keys, values = blocks.raw.chunk(2, -1)
    return LayerTensors(
        layer.index, layer.geometry, [layer.spec], keys, values, none, none, none, None,
        BlockPages(layer, blocks.packed), layer.workspace, batch_invariant=False,
    )  # fmt: skip


def _store(layer: ServedLayer, blocks: Blocks, batch: Batch, key: Tensor, value: Tensor) -> None:
    """Writes the step's rows, in 16 bits and keys in their stored basis, into raw blocks."""
    ranges = [torch.arange(*batch.tokens(i)) for i in range(len(batch.lengths))]
    positions = torch.cat(ranges).to(key.device)
    keys = layer.spec.key.apply(
        key.transpose(0, 1), positions, layer.layout.sinks, max(batch.lengths)
    )
    rows = torch.cat((to_float16(keys), to_float16(value.transpose(0, 1).float())), -1)
    size = layer.layout.raw_block_tokens
    real = batch.raw_slots >= 0
    slots = batch.raw_slots[real]
    blocks.raw[slots // size, :, slots % size] = rows.transpose(0, 1)[real]


def _rows(layer: ServedLayer, blocks: Blocks, table: Tensor, positions: Tensor) -> Tensor:
    """16-bit rows of a request at int64 positions [n] → float16 [num_kv_heads, n, 2·head_dim]."""
    size = layer.layout.raw_block_tokens
    numbers = table.long()[positions // size]
    return blocks.raw[numbers, :, positions % size].transpose(0, 1)


def _pack(layer: ServedLayer, record: LayerTensors, blocks: Blocks, batch: Batch) -> None:
    """Packs the pages that the step's tokens have pushed out of the window."""
    layout, ids, rows = layer.layout, [], []
    for request in range(len(batch.lengths)):
        first, last = (pages_of(layer, length) for length in batch.tokens(request))
        if first == last:
            continue
        begin = layout.sinks + first * layout.page_tokens
        end = layout.sinks + last * layout.page_tokens
        positions = torch.arange(begin, end, device=blocks.raw.device)
        rows.append(_rows(layer, blocks, batch.raw_table[request], positions))
        ids += _numbers(layer, batch.packed_table[request], range(first, last))
    if ids:
        keys, values = torch.cat(rows, 1).chunk(2, -1)
        REFERENCE.write_pages(record, ids, keys, values)


def pages_of(layer: ServedLayer, length: int) -> int:
    """Pages of a request of so many tokens."""
    g = layer.geometry
    return packed_tokens(length, g.sinks, g.window, g.page_tokens) // g.page_tokens


def _numbers(layer: ServedLayer, table: Tensor, pages: range) -> list[int]:
    """Numbers of a request's pages."""
    places = [layer.layout.place(page) for page in pages]
    entries = table.tolist() if places else []
    return [entries[entry] * layer.layout.pages_per_block + place for entry, place in places]


def _row(layer: ServedLayer, blocks: Blocks, batch: Batch, request: int) -> RowView:
    """What a request's queries read: sinks, what its first query does not read packed, and all
    pages that its last one does."""
    g, device = layer.geometry, blocks.raw.device
    before, length = batch.tokens(request)
    begin = g.sinks + pages_of(layer, before + 1) * g.page_tokens
    sinks, window = range(min(g.sinks, length)), range(begin, length)
    raw = torch.tensor([*sinks, *window], device=device)
    keys, values = _rows(layer, blocks, batch.raw_table[request], raw).chunk(2, -1)
    positions = torch.arange(before, length, device=device)
    behind = (positions + 1 - g.sinks - g.window).clamp_min(0)
    limit = g.sinks + behind // g.page_tokens * g.page_tokens
    pages = _numbers(layer, batch.packed_table[request], range(pages_of(layer, length)))
    packed_before = pages_of(layer, before) * g.page_tokens
    return RowView(0, 0, positions, limit, keys, values, raw, pages, packed_before, length, 0)


def _sliding_mask(row: RowView, sliding: int) -> Tensor | None:
    """bool [1, 1, queries, tokens], what a window of `sliding` tokens leaves visible; None without
    one."""
    if not sliding:
        return None
    columns = torch.arange(row.length, device=row.positions.device)
    behind = row.positions[:, None] - columns
    return ((behind >= 0) & (behind < sliding))[None, None]
