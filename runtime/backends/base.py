"""What reads and writes the tensors of a layer: the contract of a backend.

A backend gets tensors and records of them, never a layer or a cache, and keeps nothing from one
call to the next but buffers in the workspace that it is given. Who owns the pages, how long
sequences are and what a budget allows is settled before it is called. A backend of one's own is one
class in one file with the four methods of `Backend`, or with one more those of `StepBackend` or
`RowBackend`;
`QuantizedKVCache` takes it as `backend`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvfold.exports.account import Geometry
from kvfold.exports.spec import LayerSpec

NAME = "kvfold"  # of the attention function, as transformers knows it


class Pages(Protocol):
    """Packed pages by number (runtime.cache.pool is one)."""

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of a page on each rung, floor first."""

    def rung(self, number: int) -> int:
        """The rung that a page stands on, 0 for the floor."""

    def page(self, number: int) -> Tensor:
        """A page's bytes, uint8 [size of its rung], to be written."""

    def readable(self, ids: list[int]) -> list[Tensor]:
        """The bytes of pages, uint8 [size of their rung] each, until other pages are asked for."""

    def load(self, ids: list[int]) -> Tensor:
        """uint8 [len(ids), page size], a copy of the bytes of pages of one rung."""

    def addresses(self, ids: list[int]) -> list[int]:
        """Block table entries of pages."""


@dataclass
class Workspace:
    """Buffers that the layers of a cache take turns with; no part of what is cached.

    Attributes:
        queries: prepared queries of a decoding step, by what decides their shape.
        codes: for unpacked codes, by type.
    """

    queries: dict[tuple, Any] = field(default_factory=dict)
    codes: dict[torch.dtype, Tensor] = field(default_factory=dict)


class LogitOptions(NamedTuple):
    """What a model does to its logits.

    Attributes:
        softcap: cap·tanh(logit / cap); None for none.
        sinks_logit: [num_heads], logits that join the denominator only; None for none.
        sliding: tokens that a query sees at the most, 0 for all.
    """

    softcap: float | None = None
    sinks_logit: Tensor | None = None
    sliding: int = 0


class LayerTensors(NamedTuple):
    """The tensors of one layer, for B sequences, and what says how to read them.

    Attributes:
        layer_idx: number of the layer.
        geometry: sinks, window, page size and head shape.
        rungs: formats and transforms that pages may stand in, floor first; all have the floor's
            basis.
        raw_keys, raw_values: float16 [B, num_kv_heads, sinks + ring, head_dim].
        state: int32 [B, 2], tokens and pages of each sequence.
        block_table: int64 [B, entries], addresses of pages (kernels.pages).
        segments: int32 [B, len(rungs) + 1]: which pages stand on which rung, where there are
            several.
        next_rungs: int32 [B], the rung of the page that comes due next; None where there is one.
        pages: the same pages by number.
        workspace: buffers that stay.
        batch_invariant: a sequence's pages are divided by its own length alone, not by the batch's.
        marks: int64 [B], what `append_and_attend` notes NaN and infinity in; None where it is not
            called.
    """

    layer_idx: int
    geometry: Geometry
    rungs: Sequence[LayerSpec]
    raw_keys: Tensor
    raw_values: Tensor
    state: Tensor
    block_table: Tensor
    segments: Tensor
    next_rungs: Tensor | None
    pages: Pages
    workspace: Workspace
    batch_invariant: bool
    marks: Tensor | None = None

    @property
    def spec(self) -> LayerSpec:
        """The floor's formats and transforms."""
        return self.rungs[0]


@dataclass
class RowView:
    """What the queries of one sequence read: 16-bit rows that live for this call, and pages."""

    skip: int  # leading columns of this call that are padding
    pad: int  # leading columns of the whole sequence that are padding
    positions: Tensor  # int64 [T - skip], of the queries
    limit: Tensor  # int64 [T - skip], see kernels.attention.attend
    keys: Tensor  # [Hkv, R, D] raw
    values: Tensor  # [Hkv, R, D] raw
    raw_positions: Tensor  # int64 [R]
    pages: list[int]
    packed_before: int  # tokens that were in pages before this call
    length: int  # tokens of the sequence, those of this call included
    passed: int  # leading pages that are gone


class LoweredPages(NamedTuple):
    """Pages of one layer that go down together.

    Attributes:
        old, new: uint8 [size of the rung] each, the pages as they are and the memory for them.
        source, target: formats of `old` and of `new`.
    """

    old: list[Tensor]
    new: list[Tensor]
    source: LayerSpec
    target: LayerSpec


class Backend(Protocol):
    """Reads and writes the tensors of layers.

    Attributes:
        reads_masks: `attend` computes any mask; else calls with other masks than causal over what
            is not padding are the reference's.
        reads_addresses: pages are found by the block table, so those in host memory must be brought
            before it attends.
    """

    reads_masks: bool
    reads_addresses: bool

    def append(
        self, layer: LayerTensors, b: int, slots: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Stores 16-bit rows.

        Args:
            b: sequence.
            slots: int64 [n], rows of the window.
            keys, values: float16 [num_kv_heads, n, head_dim], keys in their stored basis.
        """

    def attend(
        self,
        layer: LayerTensors,
        rows: Sequence[RowView],
        query: Tensor,
        scaling: float,
        options: LogitOptions,
        mask: Tensor | None,
    ) -> Tensor:
        """Attention of a call whose keys and values were appended before.

        Args:
            rows: what each sequence's queries read.
            query: [B, num_heads, T, head_dim].
            mask: bool [B, 1, T, columns] or None for plain causal over what is not padding; it says
                what `options.sliding` says too.
        Returns:
            [B, num_heads, T, head_dim], float32 or the query's own type.
        """

    def write_pages(
        self, layer: LayerTensors, ids: list[int], keys: Tensor, values: Tensor
    ) -> None:
        """Packs float16 rows [num_kv_heads, len(ids)·page_tokens, head_dim], keys in their stored
        basis, into pages, of any rungs."""

    def lower_pages(self, geometry: Geometry, work: Sequence[LoweredPages]) -> None:
        """Re-quantises pages of any layers of a cache. No page is read that is written."""


@runtime_checkable
class RowBackend(Backend, Protocol):
    """A backend that makes the 16-bit rows of many tokens by itself; else plain torch does."""

    def rows(
        self, spec: LayerSpec, sinks: int, keys: Tensor, values: Tensor, positions: Tensor, end: int
    ) -> tuple[Tensor, Tensor]:
        """Keys in their stored basis, and values, in 16 bits, saturating.

        Args:
            keys, values: [B, num_kv_heads, T, head_dim], keys after RoPE.
            positions: int64 [B, T], tokens counted from each sequence's first.
            end: a number that all positions are below.
        Returns:
            float16 [B, num_kv_heads, T, head_dim] each.
        """


@runtime_checkable
class StepBackend(Backend, Protocol):
    """A backend that takes a decoding step of one token a sequence in one go. A cache then defers
    the token: its `update` stores nothing, and `append_and_attend` does."""

    def append_and_attend(
        self,
        layer: LayerTensors,
        keys: Tensor,
        values: Tensor,
        query: Tensor,
        scaling: float,
        options: LogitOptions,
    ) -> Tensor:
        """Stores one token of every sequence, packs the page that came due (its memory is there,
        and its block table entry), moves `layer.state` on by the token and the page, and attends.
        The host is asked for nothing, as a CUDA graph needs.

        Args:
            keys, values: [B, num_kv_heads, 1, head_dim], after RoPE.
            query: [B, num_heads, 1, head_dim].
        Returns:
            [B, num_heads, 1, head_dim], float32 or the query's own type.
        """
