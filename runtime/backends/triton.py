"""The Triton kernels as a backend. All calls of kernels' host functions are here, but for those over
an engine's blocks (runtime/vllm/triton_attention.py)."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec
from kvfold.kernels.attention import packed_tokens
from kvfold.kernels.formats import Format
from kvfold.kernels.gpu import records
from kvfold.kernels.gpu.append import LABELS, UNMARKED, append_step, empty_marks, read_mark
from kvfold.kernels.gpu.attention import Prompt, attention
from kvfold.kernels.gpu.dense import query_rows
from kvfold.kernels.gpu.encode import encode_pages, lower_jobs, lower_pages
from kvfold.kernels.gpu.mean import MeanOf, StoredMean, stored_mean
from kvfold.kernels.gpu.prompt import PageRun, PromptRows, attend_queries
from kvfold.kernels.gpu.queries import Queries, empty_queries, prepare_queries
from kvfold.kernels.gpu.records import FormatChange, KeyTransform, PagedCache, PageFormat, Regions
from kvfold.kernels.gpu.rows import gather_rows, store_rows
from kvfold.kernels.key_mean import STEP
from kvfold.kernels.pages import page_address
from kvfold.runtime.backends.base import LayerTensors, LogitOptions, LoweredPages, RowView
from kvfold.runtime.backends.reference import runs_of
from kvfold.runtime.cache.upload import on_device

__all__ = [
    "LABELS",
    "UNMARKED",
    "TritonKernels",
    "empty_marks",
    "read_mark",
]  # the marks are read by cache.nan_check

QUERY_CHUNK = 8192  # queries of a prompt at a time: what they read is decoded once
LEAST_ROWS = 256  # queries times heads of a group from which on decoding pages pays


class TritonKernels:
    """The backend of the Triton kernels, on a GPU or by Triton's interpreter."""

    reads_masks = False
    reads_addresses = True

    def rows(
        self, spec: LayerSpec, sinks: int, keys: Tensor, values: Tensor, positions: Tensor, end: int
    ) -> tuple[Tensor, Tensor]:
        key = spec.key
        batch, heads, tokens, dim = keys.shape
        mean = stored_mean(key.tables(sinks), key.mean_bases, end) if key.turns else None
        shape = (batch, heads, tokens, dim)
        out, value_out = (
            torch.empty(shape, dtype=torch.float16, device=keys.device) for _ in range(2)
        )
        places = torch.arange(tokens, device=keys.device) * dim
        keys, values = (by_channels(x) for x in (keys, values))
        for b in range(batch):
            store_rows(
                keys[b].transpose(0, 1), values[b].transpose(0, 1), positions[b], places, key.matrix,
                None if key.turns else key.offset, mean, sinks, out[b], value_out[b], tokens * dim,
            )  # fmt: skip
        return out, value_out

    def append(
        self, layer: LayerTensors, b: int, slots: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        layer.raw_keys[b, :, slots] = keys
        layer.raw_values[b, :, slots] = values

    def write_pages(
        self, layer: LayerTensors, ids: list[int], keys: Tensor, values: Tensor
    ) -> None:
        for rung, run, rows in runs_of(layer, ids):
            _encode(layer, keys[:, rows], values[:, rows], run, layer.rungs[rung])

    def lower_pages(self, geometry: Geometry, work: Sequence[LoweredPages]) -> None:
        if not work:
            return
        steps = [
            FormatChange(
                [page_address(page) for page in pages.old],
                [page_address(page) for page in pages.new],
                page_format(pages.source),
                page_format(pages.target),
            )
            for pages in work
        ]
        shape = {"num_kv_heads": geometry.num_kv_heads, "page_tokens": geometry.page_tokens}
        for jobs in lower_jobs(steps, **shape, device=work[0].old[0].device):
            lower_pages(jobs, **shape)

    def attend(
        self,
        layer: LayerTensors,
        rows: Sequence[RowView],
        query: Tensor,
        scaling: float,
        options: LogitOptions,
        mask: Tensor | None,
    ) -> Tensor:
        batch, heads, tokens, dim = query.shape
        out = torch.empty(batch, tokens, heads, dim, dtype=query.dtype, device=query.device)
        if any(row.skip for row in rows):
            out.zero_()  # what padding attends to is read by nobody, but must be finite
        for b, row in enumerate(rows):
            if row.positions.numel():
                queries = query[b : b + 1, :, row.skip :]
                attend_prompt(layer, b, row, queries, out[b : b + 1, row.skip :], scaling, options)
        return out.transpose(1, 2)

    def append_and_attend(
        self,
        layer: LayerTensors,
        keys: Tensor,
        values: Tensor,
        query: Tensor,
        scaling: float,
        options: LogitOptions,
    ) -> Tensor:
        batch, heads, tokens, dim = query.shape
        out = torch.empty(batch, tokens, heads, dim, dtype=query.dtype, device=query.device)
        spec, geometry = layer.spec, layer.geometry
        queries = _queries(layer, query, is_shifted(spec.key, options))
        segments = layer.segments if len(layer.rungs) > 1 else None
        cache = PagedCache(
            layer.block_table, layer.state, layer.raw_keys, layer.raw_values, segments
        )
        regions = kernel_regions(geometry, geometry.ring)
        append_step(
            keys.contiguous(),
            values.contiguous(),
            query.contiguous(),
            cache,
            queries,
            [page_format(rung) for rung in layer.rungs],
            regions,
            scaling=scaling,
            softcap=options.softcap or 0.0,
            transform=KeyTransform(spec.key.matrix, spec.key.offset, spec.key.query_matrix),
            rungs=layer.next_rungs,
            marks=layer.marks,
            layer=layer.layer_idx,
        )
        attention(
            queries,
            cache,
            _formats(layer),
            out,
            regions,
            kernel_logits(options),
            new=1,
            # the last kernel moves `state` on by the token and the page: all was read by then
            advance=True,
            batch_invariant=layer.batch_invariant,
        )
        return out.transpose(1, 2)


TRITON = TritonKernels()


def kernel_regions(geometry: Geometry, ring: int = 0) -> Regions:
    """The regions of a cache as kernels take them; with a ring of 16-bit rows, its length."""
    return Regions(geometry.sinks, geometry.window, geometry.page_tokens, ring)


def kernel_logits(options: LogitOptions) -> records.LogitOptions:
    """What a model does to its logits as kernels take it."""
    return records.LogitOptions(options.softcap or 0.0, options.sinks_logit, options.sliding)


def _formats(layer: LayerTensors) -> list[tuple[Format, Format]]:
    """Of the pages of each rung."""
    return [(rung.key.format, rung.value.format) for rung in layer.rungs]


def page_format(spec: LayerSpec) -> PageFormat:
    """How pages of a rung are written."""
    return PageFormat(spec.key.format, spec.value.format, spec.key.clip, spec.value.clip)


def is_shifted(key: KeySpec, options: LogitOptions) -> bool:
    """Whether kernels must add what an offset of the keys takes off every logit, which a softmax
    alone does not see."""
    return (
        key.offset is not None
        and not key.turns
        and (options.softcap is not None or options.sinks_logit is not None)
    )


def _queries(layer: LayerTensors, query: Tensor, shifted: bool) -> Queries:
    """Room for the queries of a step of [B, num_heads, 1, head_dim], which stays."""
    key, g = layer.spec.key, layer.geometry
    shape = (query.shape[0], query.shape[1], g.num_kv_heads, query.shape[3], query.device, shifted)
    tokens = g.raw_rows + layer.block_table.shape[1] * g.page_tokens if key.turns else 0
    name = (*shape, (key.frequencies, key.pairs) if key.turns else None, tokens)
    kept = layer.workspace.queries
    if name not in kept:
        kept[name] = empty_queries(*shape, key.tables(g.sinks) if key.turns else None, tokens)
    return kept[name]


def _encode(
    layer: LayerTensors, keys: Tensor, values: Tensor, ids: list[int], spec: LayerSpec
) -> None:
    """Packs 16-bit rows [Hkv, len(ids)·page_tokens, head_dim] into pages of one rung, whose formats
    `spec` has."""
    device, size = keys.device, layer.geometry.page_tokens
    pages = on_device(layer.pages.addresses(ids), torch.int64, device)
    tokens = torch.arange(len(ids), dtype=torch.int32, device=device) * size
    encode_pages(
        keys[None].contiguous(),
        values[None].contiguous(),
        page_format(spec),
        pages,
        torch.zeros_like(tokens),
        tokens,
        page_tokens=size,
    )


def attend_prompt(
    layer: LayerTensors,
    b: int,
    row: RowView,
    query: Tensor,
    out: Tensor,
    scaling: float,
    options: LogitOptions,
) -> None:
    """The queries [1, num_heads, T, head_dim] of one sequence, whose keys and values were appended
    before."""
    key, g = layer.spec.key, layer.geometry
    # of this sequence alone, whatever the batch has room for
    table = layer.block_table[b : b + 1, : max(1, len(row.pages))]
    mean = None
    if key.turns:
        mean = stored_mean(key.tables(g.sinks), key.mean_bases, row.length)
    keys = row.keys
    if mean is not None:
        places = torch.arange(len(row.raw_positions), device=query.device) * keys.stride(1)
        keys = gather_rows(
            keys, row.values, keys.stride(0), row.raw_positions, places, g.num_kv_heads, g.head_dim, mean, g.sinks,
            copy=False,
        ).read_keys  # fmt: skip
    raw = PromptRows(keys, row.values, row.packed_before)
    if is_few(layer, row, query):
        attend_few(layer, b, row, raw, table, query, out, scaling, options)
    else:
        attend_decoded(layer, row, raw, table, mean, query, out, scaling, options)


def by_channels(x: Tensor) -> Tensor:
    """With channels next to each other, as kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def is_few(layer: LayerTensors, row: RowView, query: Tensor) -> bool:
    """Whether queries [1, num_heads, T, head_dim] are so few that pages are best read as they are
    packed, as in a step: drafts for instance."""
    rows = query.shape[1] * query.shape[2] // layer.geometry.num_kv_heads
    return rows < LEAST_ROWS and bool(row.pages)


def attend_decoded(
    layer: LayerTensors,
    row: RowView,
    raw: PromptRows,
    table: Tensor,
    mean: StoredMean | None,
    query: Tensor,
    out: Tensor,
    scaling: float,
    options: LogitOptions,
) -> None:
    """`attend_prompt` with pages decoded once for many queries.

    Args:
        raw: the sequence's 16-bit rows.
        table: int64 [1, entries], addresses of its pages.
        mean: that keys are stored without, where it turns.
    """
    key, g = layer.spec.key, layer.geometry
    for start in range(0, query.shape[2], QUERY_CHUNK):
        chunk = query[:, :, start : start + QUERY_CHUNK]
        first = row.length - query.shape[2] + start
        end = first + chunk.shape[2]
        shift = key.shift(chunk) if is_shifted(key, options) else None
        queries = query_rows(
            by_channels(chunk[0]), g.num_kv_heads, key.query_matrix, scaling, options.softcap,
            None if shift is None else shift[0],
        )  # fmt: skip
        attend_queries(
            queries, first, page_runs(layer, row, first, end, options.sliding), table[0], raw, kernel_regions(g),
            kernel_logits(options), out[0, start : start + QUERY_CHUNK], mean,
        )  # fmt: skip


def page_runs(
    layer: LayerTensors, row: RowView, first: int, end: int, sliding: int
) -> list[PageRun]:
    """The pages that queries at first … end − 1 read, as runs of one rung."""
    g = layer.geometry
    packed = max(row.packed_before, packed_tokens(end, g.sinks, g.window, g.page_tokens))
    lowest = max(first - sliding + 1 - g.sinks, 0) // g.page_tokens if sliding else 0
    begin, count = max(lowest, row.passed), packed // g.page_tokens
    runs = []
    for rung, pages in groupby(row.pages[begin:count], layer.pages.rung):
        after = begin + len(list(pages))
        spec = layer.rungs[rung]
        runs.append(PageRun(spec.key.format, spec.value.format, begin, after))
        begin = after
    return runs


def attend_few(
    layer: LayerTensors,
    b: int,
    row: RowView,
    raw: PromptRows,
    table: Tensor,
    query: Tensor,
    out: Tensor,
    scaling: float,
    options: LogitOptions,
) -> None:
    """`attend_prompt` where `is_few`; `raw` and `table` as in `attend_decoded`."""
    key, g, device = layer.spec.key, layer.geometry, query.device
    # filled on the device: a copy from the host would be waited for
    before = torch.full((1,), raw.before, dtype=torch.int32, device=device)
    # a copy: where it begins decides how it is aligned, and each alignment would compile a kernel
    # of its own
    state = layer.state[b : b + 1].clone()
    segments = layer.segments[b : b + 1].clone() if len(layer.rungs) > 1 else None
    cache = PagedCache(table, state, raw.keys[None], raw.values[None], segments)
    position = row.length - query.shape[2]
    first = torch.full((1,), position, dtype=torch.int32, device=device)
    shift = key.shift(query) if is_shifted(key, options) else None
    term = None
    if key.turns:
        assert key.offset is not None
        packed = packed_tokens(row.length, g.sinks, g.window, g.page_tokens)
        steps = (
            row.passed * g.page_tokens // STEP,
            max(packed, raw.before) // STEP + 1,
        )
        term = MeanOf(key.tables(g.sinks), key.offset, query, *steps)
    queries = prepare_queries(
        key.apply_query(query), g.num_kv_heads, scaling, options.softcap or 0.0, shift, term
    )
    attention(
        queries,
        cache,
        _formats(layer),
        out,
        kernel_regions(g, 0),
        kernel_logits(options),
        prompt=Prompt(first, before),
    )
