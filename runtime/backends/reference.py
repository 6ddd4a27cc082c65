"""Packs, unpacks and lowers pages of one layer: the reference's bytes, or by Triton kernels."""

from bisect import bisect_left
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec, clip_rows
from kvfold.kernels.codes import Codes, scratch
from kvfold.kernels.quantizer import decode, encode
from kvfold.runtime.cache.upload import Upload

if TYPE_CHECKING:
    from kvfold.runtime.cache.layer import PackedLayer


def pack(keys: Tensor, values: Tensor, spec: LayerSpec, page_tokens: int) -> Tensor:
    """Rows [Hkv, n·page_tokens, head_dim], keys in their stored basis → uint8 [n, bytes of a page]."""

    def side(x: Tensor, spec: KeySpec | ValueSpec) -> Tensor:
        blocks = x.unflatten(1, (-1, page_tokens)).transpose(0, 1)  # [n, Hkv, page, D]
        return encode(blocks, spec.format, clip_rows(spec.clip)).flatten(1)

    return torch.cat((side(keys, spec.key), side(values, spec.value)), 1)


def unpack(data: Tensor, spec: LayerSpec, heads: int, page_tokens: int) -> tuple[Tensor, Tensor]:
    """Inverse of `pack` up to quantisation: uint8 [n, bytes] → two float32 [Hkv, n·page_tokens, head_dim]."""
    split = heads * spec.key.format.nbytes(page_tokens)

    def side(part: Tensor, spec: KeySpec | ValueSpec) -> Tensor:
        blocks = decode(part.unflatten(1, (heads, -1)), spec.format, page_tokens)  # [n, Hkv, page, D]
        return blocks.transpose(0, 1).flatten(1, 2)

    return side(data[:, :split], spec.key), side(data[:, split:], spec.value)


def read_pages(layer: "PackedLayer", ids: list[int]) -> tuple[Tensor, Tensor]:
    """Decodes pages of a layer, of any rungs: (keys, values), float32 [Hkv, len(ids)·page_tokens, head_dim]."""
    g = layer.geometry
    parts = []
    for rung, run in groupby(ids, layer.pool.rung):
        parts.append(unpack(layer.pool.load(list(run)), layer.rungs[rung], g.num_kv_heads, g.page_tokens))
    if len(parts) == 1:
        return parts[0]
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, 1), torch.cat(values, 1)


def read_codes(layer: "PackedLayer", ids: list[int]) -> tuple[Codes, Codes]:
    """Packed pages of a layer, all of one rung, to multiply with: (keys, values)."""
    g = layer.geometry
    rung = layer.rungs[layer.pool.rung(ids[0])]
    buffers = layer.padding.scratch.setdefault("codes", {})
    data = scratch(buffers, (len(ids) * layer.pool.sizes[layer.pool.rung(ids[0])],), torch.uint8, layer.device)
    data = torch.cat(layer.pool.readable(ids), out=data).unflatten(0, (len(ids), -1))
    split = g.num_kv_heads * rung.key.format.nbytes(g.page_tokens)
    parts = [part.unflatten(1, (g.num_kv_heads, -1)) for part in (data[:, :split], data[:, split:])]
    formats = rung.key.format, rung.value.format
    keys, values = (Codes(x, fmt, g.page_tokens, buffers) for x, fmt in zip(parts, formats, strict=True))
    return keys, values


def write_pages(layer: "PackedLayer", ids: list[int], keys: Tensor, values: Tensor) -> None:
    """Packs float16 rows [Hkv, len(ids)·page_tokens, head_dim] into pages of a layer, of any rungs."""
    size = layer.geometry.page_tokens
    start = 0
    for rung, group in groupby(ids, layer.pool.rung):
        run = list(group)
        rows = slice(start * size, (start + len(run)) * size)
        start += len(run)
        if layer.use_triton:
            from kvfold.runtime.backends.triton import store_pages

            store_pages(layer, keys[:, rows], values[:, rows], run, layer.rungs[rung])
            continue
        packed = pack(keys[:, rows], values[:, rows], layer.rungs[rung], size)
        for number, data in zip(run, packed, strict=True):
            layer.pool.page(number).copy_(data)


def oldest(layer: "PackedLayer", rung: int, count: int) -> list[int]:
    """Up to `count` pages of a rung, the oldest of all sequences first."""
    starts = [bisect_left(ids, rung, key=layer.pool.rung) for ids in layer.pages]
    ends = [bisect_left(ids, rung + 1, key=layer.pool.rung) for ids in layer.pages]
    found: dict[int, None] = {}  # a page may be several sequences'
    for i in range(min(starts, default=0), max(ends, default=0)):
        for ids, start, end in zip(layer.pages, starts, ends, strict=True):
            if start <= i < end and len(found) < count:
                found[ids[i]] = None
        if len(found) == count:
            break
    return list(found)


def lower(layer: "PackedLayer", ids: list[int]) -> None:
    """Re-quantises pages of one rung to the next lower one, once for all their owners. Both stand for a moment."""
    g = layer.geometry
    rung = layer.pool.rung(ids[0])
    old, new = layer.pool.lower(ids)
    if layer.use_triton:
        from kvfold.runtime.backends import triton

        triton.lower(layer, old, new, layer.rungs[rung], layer.rungs[rung - 1])
    else:
        keys, values = unpack(torch.stack(old), layer.rungs[rung], g.num_kv_heads, g.page_tokens)
        packed = pack(keys, values, layer.rungs[rung - 1], g.page_tokens)
        for page, data in zip(new, packed, strict=True):
            page.copy_(data)
    lowered = set(ids)
    for b, row in enumerate(layer.pages):  # a run in each sequence: the last of the pages that are now on this rung
        end = bisect_left(row, rung, key=layer.pool.rung)
        start = end
        while start and row[start - 1] in lowered:
            start -= 1
        layer.enter(b, start, row[start:end])


def set_segments(layer: "PackedLayer", upload: Upload | None = None) -> None:
    """Brings `layer.segments` up to date, where pages have rungs: int32 [B, R + 1], pages segments[b, r] … segments[b, r + 1] − 1
    of sequence b stand on rung r. Along a sequence rungs never fall: old pages have the fewest bits. With `upload`, once that is sent."""
    count = len(layer.rungs)
    if count == 1:
        return
    rung = layer.pool.rung
    bounds = [[*(bisect_left(ids, r, key=rung) for r in range(count)), len(ids)] for ids in layer.pages]
    if bounds == layer.bounds and len(layer.segments):
        return
    layer.bounds = bounds
    if len(layer.segments) != layer.batch_size:
        layer.segments = layer.segments.new_zeros(0)  # the old one goes before the new one comes
        layer.segments = layer.segments.new_zeros(layer.batch_size, count + 1)
    news = upload or Upload(layer.device)
    news.add(layer.segments.view(-1), [start for row in bounds for start in row])
    if upload is None:
        news.send()
