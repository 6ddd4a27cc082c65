"""Plain torch on any device: what packed pages mean, and what the kernels are measured by."""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor

from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec, clip_rows
from kvfold.kernels.attention import KeyMean, Tile, attend
from kvfold.kernels.codes import Codes, field_order, scratch
from kvfold.kernels.quantizer import decode, encode
from kvfold.runtime.backends.base import LayerTensors, LogitOptions, LoweredPages, Pages, RowView

TILE_TOKENS = 1024  # packed tokens decoded at a time while attending
CODE_TOKENS = (
    2**14
)  # packed tokens that one query attends to at a time, and the most bytes that are copied for that
CODE_NBYTES = 2**21


def pack(keys: Tensor, values: Tensor, spec: LayerSpec, page_tokens: int) -> Tensor:
    """Rows [Hkv, n·page_tokens, head_dim], keys in their stored basis → uint8 [n, bytes of a
    page]."""

    def side(x: Tensor, spec: KeySpec | ValueSpec) -> Tensor:
        blocks = x.unflatten(1, (-1, page_tokens)).transpose(0, 1)  # [n, Hkv, page, D]
        return encode(blocks, spec.format, clip_rows(spec.clip)).flatten(1)

    return torch.cat((side(keys, spec.key), side(values, spec.value)), 1)


def unpack(data: Tensor, spec: LayerSpec, heads: int, page_tokens: int) -> tuple[Tensor, Tensor]:
    """Inverse of `pack` up to quantisation: uint8 [n, bytes] → two float32 [Hkv, n·page_tokens,
    head_dim]."""
    split = heads * spec.key.format.nbytes(page_tokens)

    def side(part: Tensor, spec: KeySpec | ValueSpec) -> Tensor:
        blocks = decode(
            part.unflatten(1, (heads, -1)), spec.format, page_tokens
        )  # [n, Hkv, page, D]
        return blocks.transpose(0, 1).flatten(1, 2)

    return side(data[:, :split], spec.key), side(data[:, split:], spec.value)


def read_pages(
    pages: Pages, ids: list[int], rungs: Sequence[LayerSpec], geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Decodes pages of any rungs: (keys, values), float32 [Hkv, len(ids)·page_tokens, head_dim],
    keys in their stored basis."""
    parts = []
    for rung, run in groupby(ids, pages.rung):
        parts.append(
            unpack(pages.load(list(run)), rungs[rung], geometry.num_kv_heads, geometry.page_tokens)
        )
    if len(parts) == 1:
        return parts[0]
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, 1), torch.cat(values, 1)


class Reference:
    """The backend of plain torch."""

    reads_masks = True
    reads_addresses = False

    def append(
        self, layer: LayerTensors, b: int, slots: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        layer.raw_keys[b, :, slots] = keys
        layer.raw_values[b, :, slots] = values

    def write_pages(
        self, layer: LayerTensors, ids: list[int], keys: Tensor, values: Tensor
    ) -> None:
        size = layer.geometry.page_tokens
        for rung, run, rows in runs_of(layer, ids):
            packed = pack(keys[:, rows], values[:, rows], layer.rungs[rung], size)
            for number, data in zip(run, packed, strict=True):
                layer.pages.page(number).copy_(data)

    def lower_pages(self, geometry: Geometry, work: Sequence[LoweredPages]) -> None:
        heads, size = geometry.num_kv_heads, geometry.page_tokens
        for old, new, source, target in work:
            rows = unpack(torch.stack(old), source, heads, size)
            for page, data in zip(new, pack(*rows, target, size), strict=True):
                page.copy_(data)

    def attend(
        self,
        layer: LayerTensors,
        rows: Sequence[RowView],
        query: Tensor,
        scaling: float,
        options: LogitOptions,
        mask: Tensor | None,
    ) -> Tensor:
        key, sinks = layer.spec.key, layer.geometry.sinks
        out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        q = key.apply_query(query)
        # a softmax alone does not see what an offset of the keys takes off every logit
        shifted = options.softcap is not None or options.sinks_logit is not None
        shift = key.shift(query) if shifted else None
        tables = key.tables(sinks) if key.turns else None
        for b, row in enumerate(rows):
            if row.positions.numel() == 0:
                continue
            row_mask = None
            if mask is not None:
                columns = row.pad + int(row.positions[-1]) + 1
                row_mask = mask[min(b, mask.shape[0] - 1), 0, row.skip :, row.pad : columns]
            mean = None
            if tables is not None:
                assert key.offset is not None
                mean = KeyMean(tables, tables.coefficients(key.offset, query[b, :, row.skip :]))
            out[b, :, row.skip :] = attend(
                q[b, :, row.skip :],
                row.positions,
                row.limit,
                tiles(layer, row),
                sinks=sinks,
                scaling=scaling,
                mask=row_mask,
                softcap=options.softcap,
                sinks_logit=options.sinks_logit,
                shift=None if shift is None else shift[b, :, row.skip :],
                mean=mean,
            )
        return out


REFERENCE = Reference()


def runs_of(layer: LayerTensors, ids: list[int]) -> Iterator[tuple[int, list[int], slice]]:
    """Pages in runs of one rung: (rung, pages, their tokens among those of all)."""
    size, start = layer.geometry.page_tokens, 0
    for rung, group in groupby(ids, layer.pages.rung):
        run = list(group)
        yield rung, run, slice(start * size, (start + len(run)) * size)
        start += len(run)


def tiles(layer: LayerTensors, row: RowView) -> Iterator[Tile]:
    """What the queries of one sequence read, a tile at a time."""
    g, sliding = layer.geometry, layer.geometry.sliding_of(layer.layer_idx)
    raw, one = row.keys.shape[1], row.positions.numel() == 1
    # for a prompt the sinks come apart: later runs of raw tokens are then skipped by the queries
    # that read them packed
    cuts = [0, raw] if one else [0, *range(min(g.sinks, raw), raw, TILE_TOKENS // 2), raw]
    for start, end in pairwise(cuts):
        part = slice(start, end)
        yield Tile(row.keys[:, part], row.values[:, part], row.raw_positions[part], False)
    unseen = 0  # pages behind the first query's sliding window, be they gone already or not
    if sliding and row.positions.numel():
        unseen = max(0, int(row.positions[0]) - sliding + 1 - g.sinks) // g.page_tokens
    for start, ids in _tile_runs(layer, row.pages, unseen, one):
        first = g.sinks + start * g.page_tokens
        positions = torch.arange(first, first + len(ids) * g.page_tokens, device=row.keys.device)
        if one:
            yield Tile(*_read_codes(layer, ids), field_order(positions, g.page_tokens), True)
        else:
            yield Tile(*read_pages(layer.pages, ids, layer.rungs, g), positions, True)


def _tile_runs(
    layer: LayerTensors, pages: list[int], start: int, one: bool
) -> Iterator[tuple[int, list[int]]]:
    """Cuts the pages from number `start` on into tiles, of one rung each for one query: (first
    number, pages)."""
    size = layer.geometry.page_tokens
    step = max(1, TILE_TOKENS // size)
    if not one:
        yield from ((i, pages[i : i + step]) for i in range(start, len(pages), step))
        return
    for rung, run in groupby(range(start, len(pages)), lambda i: layer.pages.rung(pages[i])):
        held = list(run)
        step = max(1, min(CODE_TOKENS // size, CODE_NBYTES // layer.pages.sizes[rung]))
        for i in range(held[0], held[-1] + 1, step):
            yield i, pages[i : min(i + step, held[-1] + 1)]


def _read_codes(layer: LayerTensors, ids: list[int]) -> tuple[Codes, Codes]:
    """Packed pages, all of one rung, to multiply with: (keys, values)."""
    g, number = layer.geometry, layer.pages.rung(ids[0])
    rung, buffers = layer.rungs[number], layer.workspace.codes
    data = scratch(
        buffers, (len(ids) * layer.pages.sizes[number],), torch.uint8, layer.raw_keys.device
    )
    data = torch.cat(layer.pages.readable(ids), out=data).unflatten(0, (len(ids), -1))
    split = g.num_kv_heads * rung.key.format.nbytes(g.page_tokens)
    parts = [part.unflatten(1, (g.num_kv_heads, -1)) for part in (data[:, :split], data[:, split:])]
    formats = rung.key.format, rung.value.format
    keys, values = (
        Codes(x, fmt, g.page_tokens, buffers) for x, fmt in zip(parts, formats, strict=True)
    )
    return keys, values
