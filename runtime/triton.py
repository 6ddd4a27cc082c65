"""The packed cache's reads and writes by Triton kernels: what PackedLayer and LayerView do when `use_triton` is set."""

from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfold.exports.account import Geometry
from kvfold.exports.spec import LayerSpec
from kvfold.kernels.attention import packed_tokens
from kvfold.kernels.pages import page_address
from kvfold.kernels.triton_append import append_step, empty_queries
from kvfold.kernels.triton_attention import Queries, attention, prepare_queries
from kvfold.kernels.triton_encode import encode_pages, lower_pages
from kvfold.kernels.triton_prompt import PageRun
from kvfold.runtime.marks import marks_of
from kvfold.runtime.steps import due_rungs
from kvfold.runtime.upload import on_device

if TYPE_CHECKING:
    from kvfold.runtime.layer import PackedLayer
    from kvfold.runtime.view import LayerView, RowView

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
    shifted = layer.spec.key.offset is not None and (softcap is not None or sinks_logit is not None)
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
    name = (query.shape[0], query.shape[1], geometry.num_kv_heads, query.shape[3], query.device, shifted)
    scratch = layer.padding.scratch
    if name not in scratch:
        scratch[name] = empty_queries(*name)
    queries = scratch[name]
    _append(
        layer, keys.contiguous(), values.contiguous(), query.contiguous(), queries, scaling=scaling, matrix=spec.key.matrix,
        offset=spec.key.offset, query_matrix=spec.key.query_matrix,
        softcap=bends["softcap"], marks=marks_of(layer.padding, query.shape[0], query.device), layer_idx=layer.layer_idx,
        **regions(geometry),
    )  # fmt: skip
    attention(
        queries, spec.key.format, spec.value.format, layer.block_table, layer.state, layer.raw_keys, layer.raw_values, out,
        ring=geometry.ring, new=1, advance=True, batch_invariant=layer.padding.batch_invariant, **formats_of(layer), **bends,
        **regions(geometry),
    )  # fmt: skip


def _append(
    layer: "PackedLayer",
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    queries: Queries,
    *,
    layer_idx: int,
    **options: Any,
) -> None:
    """append_step with the formats of the rung that each sequence's page is written on, by what the host knows: to be replaced by
    one launch that selects them on the device, from `due_rungs(layer)[0]`."""
    rungs = due_rungs(layer)[1] or [0] * len(keys)
    marks, rest = options.pop("marks"), {**options, "layer": layer_idx}

    def append(rung: LayerSpec, rows: slice) -> None:
        shift = None if queries.shift is None else queries.shift[rows]
        part = replace(queries, data=queries.data[rows], scale=queries.scale[rows], shift=shift)
        append_step(
            keys[rows], values[rows], query[rows], layer.raw_keys[rows], layer.raw_values[rows], layer.block_table[rows],
            layer.state[rows], part, rung.key.format, rung.value.format, key_clip=rung.key.clip,
            value_clip=rung.value.clip, marks=marks[rows], **rest,
        )  # fmt: skip

    if len(set(rungs)) == 1:
        append(layer.rungs[rungs[0]], slice(None))
    else:
        for b, rung in enumerate(rungs):
            append(layer.rungs[rung], slice(b, b + 1))


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
    for start in range(0, query.shape[2], QUERY_CHUNK):
        chunk = query[:, :, start : start + QUERY_CHUNK]
        position = layer.length[b] - query.shape[2] + start
        first = torch.tensor([position], dtype=torch.int32, device=device)
        shift = spec.key.shift(chunk) if shifted else None
        queries = prepare_queries(spec.key.apply_query(chunk), geometry.num_kv_heads, scaling, bends["softcap"], shift)
        attention(
            queries, spec.key.format, spec.value.format, table, state, row.keys[None], row.values[None],
            out[:, start : start + QUERY_CHUNK], first_query=first, packed_before=before,
            together=() if bent else page_runs(layer, row, position, queries), **formats_of(layer, b), **bends,
            **regions(geometry),
        )  # fmt: skip


def page_runs(layer: "PackedLayer", row: "RowView", position: int, queries: Queries) -> list[PageRun]:
    """The pages that every query from `position` on reads, as runs of one rung; none where it would not pay to decode them."""
    g = layer.geometry
    count = max(row.packed_before, packed_tokens(position + 1, g.sinks, g.window, g.page_tokens)) // g.page_tokens
    if count * g.page_tokens < LEAST_PACKED or queries.tokens * queries.group < LEAST_ROWS:
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
