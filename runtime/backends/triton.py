"""The packed cache's reads and writes by Triton kernels: what PackedLayer and LayerView do when `use_triton` is set."""

from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec
from kvfold.kernels.attention import packed_tokens
from kvfold.kernels.key_mean import STEP
from kvfold.kernels.pages import page_address
from kvfold.kernels.quantizer import to_float16
from kvfold.kernels.triton_append import append_step, empty_queries
from kvfold.kernels.triton_attention import attention, prepare_queries
from kvfold.kernels.triton_encode import encode_pages, lower_pages
from kvfold.kernels.triton_mean import MeanOf
from kvfold.kernels.triton_prompt import PageRun
from kvfold.runtime.cache.nan_check import marks_of
from kvfold.runtime.cache.upload import on_device
from kvfold.runtime.generate.steps import due_rungs

if TYPE_CHECKING:
    from kvfold.runtime.cache.layer import PackedLayer
    from kvfold.runtime.cache.view import LayerView, RowView

QUERY_CHUNK = 4096  # queries of a prompt at a time: what all of them read is decoded once
LEAST_PACKED = 1024  # tokens in pages, and
LEAST_ROWS = 256  # queries times heads of a group, from which on decoding pays


def regions(geometry: Geometry) -> dict[str, Any]:
    """The regions of a cache as kernels take them."""
    return {"sinks": geometry.sinks, "window": geometry.window, "page_tokens": geometry.page_tokens}


def formats_of(layer: "PackedLayer", b: int | None = None) -> dict[str, Any]:
    """What `attention` must know of pages that stand on several rungs, of all sequences or of b; {} where there is one."""
    if len(layer.rungs) == 1:
        return {}
    segments = layer.segments if b is None else layer.segments[b : b + 1].clone()
    return {"formats": [(rung.key.format, rung.value.format) for rung in layer.rungs], "segments": segments}


def attend_triton(
    view: "LayerView", query: Tensor, scaling: float, sliding: int, softcap: float | None, sinks_logit: Tensor | None
) -> Tensor:
    """LayerView.attend by kernels: query [B, num_heads, T, head_dim] → the same shape and type."""
    layer = view.layer
    layer.bring()
    # a softmax alone does not see what an offset of the keys takes off every logit
    key = layer.spec.key
    shifted = key.offset is not None and not key.turns and (softcap is not None or sinks_logit is not None)
    bends = {"sliding": sliding, "softcap": softcap or 0.0, "aux": sinks_logit}
    batch, heads, tokens, dim = query.shape
    out = torch.empty(batch, tokens, heads, dim, dtype=query.dtype, device=query.device)
    if view.rows is None:
        assert view.new is not None
        _decode(layer, *view.new, query, out, scaling, shifted, bends)
    else:
        if any(row.skip for row in view.rows):
            out.zero_()  # what padding attends to is read by nobody, but must be finite
        for b, row in enumerate(view.rows):
            if row.positions.numel():
                queries = query[b : b + 1, :, row.skip :]
                _prompt(layer, b, row, queries, out[b : b + 1, row.skip :], scaling, shifted, bends)
    return out.transpose(1, 2)


def _decode(
    layer: "PackedLayer", keys: Tensor, values: Tensor, query: Tensor, out: Tensor, scaling: float, shifted: bool,
    bends: dict[str, Any],
) -> None:  # fmt: skip
    """One step of every sequence: appends, packs the page that came due, attends, and moves the device's state on."""
    spec, geometry = layer.spec, layer.geometry
    shape = (query.shape[0], query.shape[1], geometry.num_kv_heads, query.shape[3], query.device, shifted)
    tokens = geometry.raw_rows + layer.block_table.shape[1] * geometry.page_tokens if spec.key.turns else 0
    name = (*shape, spec.key.frequencies if spec.key.turns else None, tokens)
    scratch = layer.padding.scratch
    if name not in scratch:
        tables = spec.key.tables(geometry.sinks) if spec.key.turns else None
        scratch[name] = empty_queries(*shape, tables, tokens)
    queries = scratch[name]
    several = len(layer.rungs) > 1
    append_step(
        keys.contiguous(), values.contiguous(), query.contiguous(), layer.raw_keys, layer.raw_values, layer.block_table,
        layer.state, queries, [rung.key.format for rung in layer.rungs], [rung.value.format for rung in layer.rungs],
        scaling=scaling, matrix=spec.key.matrix, offset=spec.key.offset, query_matrix=spec.key.query_matrix,
        key_clips=[rung.key.clip for rung in layer.rungs], value_clips=[rung.value.clip for rung in layer.rungs],
        rungs=due_rungs(layer)[0] if several else None,
        softcap=bends["softcap"], marks=marks_of(layer.padding, query.shape[0], query.device), layer=layer.layer_idx,
        **regions(geometry),
    )  # fmt: skip
    attention(
        queries, spec.key.format, spec.value.format, layer.block_table, layer.state, layer.raw_keys, layer.raw_values, out,
        ring=geometry.ring, new=1, advance=True, batch_invariant=layer.padding.batch_invariant, **formats_of(layer), **bends,
        **regions(geometry),
    )  # fmt: skip


def _prompt(
    layer: "PackedLayer", b: int, row: "RowView", query: Tensor, out: Tensor, scaling: float, shifted: bool,
    bends: dict[str, Any],
) -> None:  # fmt: skip
    """The queries [1, num_heads, T, head_dim] of one sequence, whose keys and values were appended before."""
    spec, geometry = layer.spec, layer.geometry
    device = query.device
    before = torch.tensor([row.packed_before], dtype=torch.int32, device=device)
    table = layer.block_table[
        b : b + 1, : max(1, len(row.pages))
    ]  # of this sequence alone, whatever the batch has room for
    # a copy: where it begins decides how it is aligned, and each alignment would compile a kernel of its own
    state = layer.state[b : b + 1].clone()
    bent = bool(bends["softcap"] or bends["sliding"])
    keys, mean = row.keys, None
    if spec.key.turns:  # a prompt's kernel reads its 16-bit rows with their mean, and pages without
        assert spec.key.offset is not None
        mean = partial(_stored_mean, spec.key, geometry)
        keys = to_float16(keys.float() + _stored(spec.key, row.raw_positions, geometry.sinks, layer.length[b]))
    for start in range(0, query.shape[2], QUERY_CHUNK):
        chunk = query[:, :, start : start + QUERY_CHUNK]
        position = layer.length[b] - query.shape[2] + start
        first = torch.tensor([position], dtype=torch.int32, device=device)
        shift = spec.key.shift(chunk) if shifted else None
        rows = chunk.shape[2] * chunk.shape[1] // geometry.num_kv_heads
        together = [] if bent else page_runs(layer, row, position, rows)
        term = None
        if spec.key.turns:
            first_page = together[-1].end if together else layer.passed[b]
            packed = packed_tokens(layer.length[b], geometry.sinks, geometry.window, geometry.page_tokens)
            steps = first_page * geometry.page_tokens // STEP, max(packed, row.packed_before) // STEP + 1
            assert spec.key.offset is not None
            term = MeanOf(spec.key.tables(geometry.sinks), spec.key.offset, chunk, *steps)
        queries = prepare_queries(
            spec.key.apply_query(chunk), geometry.num_kv_heads, scaling, bends["softcap"], shift, term
        )
        attention(
            queries, spec.key.format, spec.value.format, table, state, keys[None], row.values[None],
            out[:, start : start + QUERY_CHUNK], first_query=first, packed_before=before,
            together=together, together_mean=mean, **formats_of(layer, b), **bends, **regions(geometry),
        )  # fmt: skip


def _stored(key: KeySpec, positions: Tensor, sinks: int, end: int) -> Tensor:
    """The mean that keys at int64 positions [n], all below `end`, were stored without, in their stored basis: float32
    [Hkv, n, head_dim]."""
    mean = key.mean(positions, sinks, end)
    assert mean is not None
    return key.transform(mean)


def _stored_mean(key: KeySpec, geometry: Geometry, first: int, end: int) -> Tensor:
    """`_stored` of pages first … end − 1."""
    assert key.offset is not None
    tokens = torch.arange(first * geometry.page_tokens, end * geometry.page_tokens, device=key.offset.device)
    return _stored(key, geometry.sinks + tokens, geometry.sinks, geometry.sinks + end * geometry.page_tokens)


def page_runs(layer: "PackedLayer", row: "RowView", position: int, rows: int) -> list[PageRun]:
    """The pages that every query from `position` on reads, as runs of one rung; none where it would not pay to decode them.

    rows: queries times heads of a group.
    """
    g = layer.geometry
    count = max(row.packed_before, packed_tokens(position + 1, g.sinks, g.window, g.page_tokens)) // g.page_tokens
    if count * g.page_tokens < LEAST_PACKED or rows < LEAST_ROWS:
        return []
    runs, first = [], 0
    for rung, pages in groupby(row.pages[:count], layer.pool.rung):
        end = first + len(list(pages))
        spec = layer.rungs[rung]
        runs.append(PageRun(spec.key.format, spec.value.format, first, end))
        first = end
    return runs


def store_pages(layer: "PackedLayer", keys: Tensor, values: Tensor, ids: list[int], spec: LayerSpec) -> None:
    """Packs 16-bit rows [Hkv, len(ids)·page_tokens, head_dim] into pages of one rung, whose formats `spec` has."""
    device, size = keys.device, layer.geometry.page_tokens
    pages = on_device(layer.pool.addresses(ids), torch.int64, device)
    tokens = torch.arange(len(ids), dtype=torch.int32, device=device) * size
    encode_pages(
        keys[None].contiguous(), values[None].contiguous(), spec.key.format, spec.value.format, pages,
        torch.zeros_like(tokens), tokens, page_tokens=size, key_clip=spec.key.clip, value_clip=spec.value.clip,
    )  # fmt: skip


def lower(layer: "PackedLayer", old: list[Tensor], new: list[Tensor], source: LayerSpec, target: LayerSpec) -> None:
    """Re-quantises pages: uint8 tensors of the formats of `source` into those of `target`."""
    device = layer.device
    addresses = [[page_address(page) for page in pages] for pages in (old, new)]
    sources, pages = on_device(addresses, torch.int64, device)
    lower_pages(
        sources, pages, (source.key.format, source.value.format), (target.key.format, target.value.format),
        num_kv_heads=layer.geometry.num_kv_heads, page_tokens=layer.geometry.page_tokens,
        key_clip=target.key.clip, value_clip=target.value.clip,
    )  # fmt: skip
