"""One layer of the packed cache: a 16-bit window (sinks, then a ring) and pages, for each sequence
of a batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.exports.spec import LayerSpec
from kvfold.kernels.quantizer import to_float16
from kvfold.runtime.backends.base import (
    Backend,
    LogitOptions,
    RowBackend,
    RowView,
    StepBackend,
)
from kvfold.runtime.backends.reference import REFERENCE
from kvfold.runtime.cache.ambient import neutrally
from kvfold.runtime.cache.nan_check import check_finite
from kvfold.runtime.cache.page_table import PageTable, take_pages
from kvfold.runtime.cache.pool import PagePool
from kvfold.runtime.cache.sequence import new_sequences
from kvfold.runtime.cache.shared import SharedState
from kvfold.runtime.cache.sized import SizedLayer
from kvfold.runtime.cache.store import LayerStore
from kvfold.runtime.cache.upload import on_device
from kvfold.runtime.cache.view import DeferredView, LayerView, StoredView
from kvfold.runtime.cache.window import RawWindow

NewPool = Callable[[int, list[int], torch.device], PagePool]


def new_pool(layer_idx: int, sizes: list[int], device: torch.device) -> PagePool:
    """A pool of pages that stay on the device; `sizes`: bytes of a page on each rung, floor
    first."""
    return PagePool(sizes, device)


class PackedLayer(SizedLayer):
    """Packed keys and values of one layer.

    Args:
        rungs: what pages may be stored in, floor first, on any device; moved to the keys' device at
            first use. New pages go on the last one unless a policy plans otherwise.
        shared: by all layers of the cache.
        layer_idx: number of the layer.
        backend: reads and writes the tensors.
        new_pool: makes the pool of pages at first use.
    """

    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        rungs: Sequence[LayerSpec],
        shared: SharedState,
        layer_idx: int,
        backend: Backend = REFERENCE,
        new_pool: NewPool = new_pool,
    ) -> None:
        super().__init__(rungs, shared, layer_idx)
        self.backend, self._new_pool = backend, new_pool
        self.steps = (
            backend if isinstance(backend, StepBackend) else None
        )  # takes a decoding step in one go
        # other layers of the model read it too, behind its own attention
        self.is_shared = layer_idx in shared.geometry.shared
        self._planned: list[list[int]] = []  # before there are sequences

    @neutrally
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        g, batch = self.geometry, key_states.shape[0]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rungs = [rung.to(self.device) for rung in self.rungs]
        sizes = [g.pair_nbytes(r.key.format, r.value.format) for r in self.rungs]
        pool = self._new_pool(self.layer_idx, sizes, self.device)
        sequences = new_sequences(batch, self.shared.clock, g.sinks)
        table = PageTable(pool, len(self.rungs), sequences, self.device)
        table.plan(self._planned)
        window = RawWindow(g, batch, self.device)
        self.held = LayerStore(window, table, self.rungs, self.shared, self.layer_idx, self.backend)
        self._columns.set(0)
        self.is_initialized = True

    # -- append ------------------------------------------------------------------------------------

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[LayerView, LayerView]:
        """Takes keys (after RoPE) and values [B, num_kv_heads, T, head_dim] and returns the handle
        to attend with, twice.

        What transformers calls so is two things here. `store` stores them now. A decoding step that
        the backend takes in one go is deferred (`defer`): the host counts the token at once, and
        the tensors are written when the handle attends.

        Raises:
            FloatingPointError: a key or value is NaN or infinite; nothing of this layer is stored.
                A step that is deferred leaves that to the cache (runtime.cache.nan_check).
        """
        if self.shared.stepping:  # the host's part is done for all layers (runtime.generate.steps)
            view: LayerView = self._deferred(key_states, value_states, self.columns)
            return view, view
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.release_passed()
        self.table.pool.written()
        tokens = key_states.shape[2]
        pads = self.shared.pads(self.batch_size)
        skips = [min(max(pad - self.columns, 0), tokens) for pad in pads]
        one = tokens == 1 and not any(skips) and not self.is_shared and not self.cut(tokens)
        if self.steps is not None and self.shared.plain and one:
            view = self.defer(key_states, value_states)
        else:
            view = self.store(key_states, value_states, skips, pads)
        return view, view

    def cut(self, tokens: int = 0) -> bool:
        """Whether queries see less than the tokens before them or the latest of these, once `tokens`
        columns more have come: the layer attends in chunks, and a sequence has more than one."""
        if not self.geometry.chunked or not self.sliding:
            return False
        return max(self.lengths(), default=0) + tokens > self.sliding

    def plan(self, rungs: list[list[int]]) -> None:
        """Says which rungs each sequence's next pages are written on, oldest first; [] for the
        highest."""
        if self.is_initialized:
            self.table.plan(rungs)
        else:
            self._planned = rungs

    def defer(self, key_states: Tensor, value_states: Tensor) -> DeferredView:
        """The host's part of a decoding step of one token a sequence: counts it and makes room for
        the pages that come due. Nothing is stored until the handle attends."""
        take_pages([self.table], self.due())
        for sequence in self.table.sequences:
            sequence.set_length(sequence.length + 1)
        self._columns.set(self.columns + 1)
        return self._deferred(key_states, value_states, self.columns)

    def _deferred(self, keys: Tensor, values: Tensor, columns: int) -> DeferredView:
        shape = torch.Size((*keys.shape[:2], columns, keys.shape[3]))
        return DeferredView(self, shape, keys.dtype, keys.device, new=(keys, values))

    def due(self) -> list[int]:
        """Sequences whose next token brings a page."""
        g = self.geometry
        return [
            b
            for b, s in enumerate(self.table.sequences)
            if g.num_pages(s.length + 1) > len(s.pages)
        ]

    def store(
        self, key_states: Tensor, value_states: Tensor, skips: list[int], pads: list[int]
    ) -> StoredView:
        """Stores keys and values.

        Args:
            skips: leading columns of each sequence that are padding, of these keys.
            pads: the same of the whole sequence.
        Raises:
            FloatingPointError: a key or value is NaN or infinite; nothing is stored.
        """
        end = self.columns + key_states.shape[2]
        number = self.shared.states.number_of(self.layer_idx)
        check_finite(number, key_states, value_states, self.columns, skips)
        keys, values = self._rows(key_states, value_states, skips, end)
        rows = [
            self.held.append(b, keys[b, :, skip:], values[b, :, skip:], skip, pad)
            for b, (skip, pad) in enumerate(zip(skips, pads, strict=True))
        ]
        self._columns.set(end)
        self.table.publish()
        shape = torch.Size((*key_states.shape[:2], end, key_states.shape[3]))
        return StoredView(self, shape, key_states.dtype, key_states.device, rows=rows)

    def _rows(
        self, keys: Tensor, values: Tensor, skips: list[int], end: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the next columns as 16-bit rows."""
        key, sinks = self.spec.key, self.geometry.sinks
        if isinstance(self.backend, RowBackend):
            places = self._positions(keys.shape[2], skips)
            return self.backend.rows(self.spec, sinks, keys, values, places, end)
        positions = self._positions(keys.shape[2], skips) if key.turns else None
        return to_float16(key.apply(keys, positions, sinks, end)), to_float16(values.float())

    def _positions(self, tokens: int, skips: list[int]) -> Tensor:
        """Positions of the next columns, counted from each sequence's first token: int64 [B,
        tokens], 0 where padded."""
        starts = [length - skip for length, skip in zip(self.lengths(), skips, strict=True)]
        columns = torch.arange(tokens, device=self.device)
        return (columns + on_device(starts, torch.int64, self.device)[:, None]).clamp_min(0)

    # -- read --------------------------------------------------------------------------------------

    def attend(
        self,
        rows: list[RowView],
        query: Tensor,
        scaling: float,
        options: LogitOptions,
        mask: Tensor | None,
    ) -> Tensor:
        """Attention over what `store` stored; see Backend.attend."""
        plain = self.shared.plain and not self.cut()
        backend = self.backend if plain or self.backend.reads_masks else REFERENCE
        if backend.reads_addresses:
            self.table.bring()
        out = backend.attend(self.held.record(), rows, query, scaling, options, mask)
        self.table.pool.written()
        if not self.is_shared:
            self.release_passed()
        return out

    def append_and_attend(
        self, keys: Tensor, values: Tensor, query: Tensor, scaling: float, options: LogitOptions
    ) -> Tensor:
        """Stores a step that was deferred and attends; see StepBackend.append_and_attend."""
        assert self.steps is not None
        if self.backend.reads_addresses:
            self.table.bring()
        marks = self.shared.marks.on(query.shape[0], query.device)
        out = self.steps.append_and_attend(
            self.held.record(marks), keys, values, query, scaling, options
        )
        if not self.shared.stepping:
            self.table.pool.written()
            self.release_passed()
        return out

    # -- pages come and go
    # -------------------------------------------------------------------------------------------------

    def release_passed(self) -> None:
        """Frees pages that lie behind a sliding window of every query to come; called once the
        latest queries have attended, those of other layers included."""
        if self.sliding and self.is_initialized:
            self.table.drop_passed(self.geometry, self.sliding)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises KvfoldError if a crop needs tokens that a sliding window has left behind."""
        g, remove = self.geometry, self.removed(tokens_to_remove)
        if not self.is_initialized or remove == 0:
            return
        for b, sequence in enumerate(self.table.sequences):
            kept, gone = max(0, sequence.length - remove), g.sinks + sequence.passed * g.page_tokens
            if sequence.passed and kept > g.sinks and kept - self.sliding + 1 < gone:
                raise KvfoldError(
                    f"A crop of sequence {b} to {kept} tokens needs some of the first {gone}, which the sliding window "
                    f"of layer {self.layer_idx} ({self.sliding} tokens) has left behind; load "
                    f"with rollback={remove} or more."
                )

    def removed(self, tokens_to_remove: int) -> int:
        """Columns that `crop` would remove."""
        remove = (
            -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.columns - tokens_to_remove)
        )
        return min(remove, self.columns)

    def crop(self, tokens_to_remove: int, undo: bool = False) -> bool:
        """Removes the last |n| tokens for n ≤ 0; for n > 0 keeps the first n columns.

        To a length that is `rollback` below the longest so far, or less, that is as if the tokens
        had never come. Further back, a page that is cut through goes back to the window with its
        quantised values, and whole pages stay pages.

        Args:
            undo: as if they had never come also without a rollback, where the 16-bit rows happen to
                be there still.
        Returns:
            whether the tokens that are left stand as if the others had never come.
        Raises:
            KvfoldError: what is left would need tokens that a sliding window has left behind;
                nothing is removed.
        """
        self.check_crop(tokens_to_remove)
        remove = self.removed(tokens_to_remove)
        if not self.is_initialized or remove == 0:
            return True
        exact = undo or self.geometry.rollback > 0
        whole = [self.held.crop(b, remove, exact) for b in range(self.batch_size)]
        self._columns.set(self.columns - remove)
        self.table.fit()
        return all(whole)

    # -- whole sequences ---------------------------------------------------------------------------

    def extend_ring(self) -> None:
        """Follows the cache's geometry, whose `rollback` has grown: what the ring holds moves to
        one of the new size."""
        if self.is_initialized:
            self.window.extend(self.geometry, self.table.sequences)

    def reset(self) -> None:
        """Forgets everything and frees it."""
        if self.is_initialized:
            self.table.close()
            del self.held
        self.is_initialized = False
        self._columns.set(0)
        self._planned = []

    def copy(self, shared: SharedState, new_pool: NewPool, shares_pages: bool) -> "PackedLayer":
        """A layer that goes on from here by itself: with the same pages, and 16-bit rows and tables
        of its own, or with all its own."""
        other = PackedLayer(self.rungs, shared, self.layer_idx, self.backend, new_pool)
        if self.is_initialized:
            other.adopt(self.held.copy(shared, shares_pages), self.columns, self.dtype, self.device)
        return other

    def adopt(
        self, held: LayerStore, columns: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Goes on with what is there already.

        Args:
            columns: tokens seen, padding included.
            dtype, device: of keys as the model computes them.
        """
        self.held, self.dtype, self.device = held, dtype, device
        self.is_initialized = True
        self.count(columns)

    def count(self, columns: int) -> None:
        """Tokens seen, padding included, from here on."""
        self._columns.set(columns)

    def __reduce_ex__(self, protocol: object) -> str:
        raise KvfoldError(
            "A layer of a packed cache can't be copied by itself; copy the cache, or its fork(n)."
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, int64 [n], in that order; an index may repeat. Pages are
        shared, not copied."""
        if not self.is_initialized:
            return
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.held.select(indices, self.device)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))
