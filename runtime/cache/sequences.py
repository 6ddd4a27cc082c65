"""What a layer does with whole sequences: cropping, choosing, forking, and pages that a sliding window has left behind."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.spec import LayerSpec
from kvfold.kernels.quantizer import to_float16
from kvfold.runtime.cache.pool import PASSED, PagePool
from kvfold.runtime.cache.view import Padding

if TYPE_CHECKING:
    from kvfold.runtime.cache.layer import PackedLayer


def slots_of(geometry: Geometry, positions: Tensor) -> Tensor:
    """Rows of the 16-bit buffers that tokens at int64 positions [n] stand in."""
    sinks = geometry.sinks
    return torch.where(positions < sinks, positions, sinks + (positions - sinks) % geometry.ring)


class Sequences:
    """The part of PackedLayer that removes, copies and orders sequences."""

    geometry: Geometry
    padding: Padding
    rungs: list[LayerSpec]
    pool: PagePool
    layer_idx: int
    sliding: int
    shares_pool: bool
    is_initialized: bool
    batch_size: int
    device: torch.device
    raw_keys: Tensor
    raw_values: Tensor
    state: Tensor
    segments: Tensor
    due: list[list[int]]
    bounds: list[list[int]]
    block_table: Tensor
    pages: list[list[int]]
    passed: list[int]
    oldest: list[int]
    slots: Any
    read_pages: Any
    _set_state: Any
    _fit_table: Any
    _columns: int
    _length: list[int]
    _counted: int  # of `padding.steps`

    def _catch_up(self) -> None:
        """Counts the steps that were prepared for all layers at once since this layer was last asked."""
        steps, self._counted = self.padding.steps - self._counted, self.padding.steps
        if steps and self.is_initialized:
            self._columns += steps
            self._length = [n + steps for n in self._length]

    @property
    def columns(self) -> int:
        """Tokens seen, padding included: what transformers calls the sequence length."""
        self._catch_up()
        return self._columns

    @columns.setter
    def columns(self, value: int) -> None:
        self._catch_up()
        self._columns = value

    @property
    def length(self) -> list[int]:
        """Tokens of each sequence."""
        self._catch_up()
        return self._length

    @length.setter
    def length(self, value: list[int]) -> None:
        self._catch_up()
        self._length = value

    def reset(self) -> None:
        """Forgets everything and frees it."""
        if self.is_initialized:
            self._disown()
            del self.pool, self.raw_keys, self.raw_values, self.state, self.block_table, self.segments, self.batch_size
            del self.pages, self.passed, self.oldest
        self.shares_pool = False
        self.columns, self.length = 0, []
        self.is_initialized = False
        self.due, self.bounds = [], []

    def _disown(self) -> None:
        """Gives back the pages of all sequences."""
        for ids in self.pages:
            self.pool.release([i for i in ids if i != PASSED])

    def __del__(self) -> None:
        if getattr(self, "shares_pool", False) and self.is_initialized:
            self._disown()  # else they would stay for as long as any fork does

    def release_passed(self) -> None:
        """Frees pages that lie behind a sliding window of every query to come; called once the latest queries have attended.

        Their block table entries become 0, which no kernel reads: it starts at the first visible page.
        """
        if not self.sliding or not self.is_initialized:
            return
        for b, length in enumerate(self.length):
            first, passed = self.passed[b], self.geometry.passed_pages(length, self.sliding)
            if passed > first:
                self.pool.release(self.pages[b][first:passed])
                self.pages[b][first:passed] = [PASSED] * (passed - first)
                self.block_table[b, first:passed] = 0
                self.passed[b] = passed

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises KvfoldError if a crop needs tokens that a sliding window has left behind."""
        g, remove = self.geometry, self._removed(tokens_to_remove)
        if not self.is_initialized or remove == 0:
            return
        for b, (length, passed) in enumerate(zip(self.length, self.passed, strict=True)):
            kept, gone = max(0, length - remove), g.sinks + passed * g.page_tokens
            if passed and kept > g.sinks and kept - self.sliding + 1 < gone:
                raise KvfoldError(
                    f"A crop of sequence {b} to {kept} tokens needs some of the first {gone}, which the sliding window "
                    f"of layer {self.layer_idx} ({self.sliding} tokens) has left behind; load with rollback={remove} or more."
                )

    def _removed(self, tokens_to_remove: int) -> int:
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.columns - tokens_to_remove)
        return min(remove, self.columns)

    def crop(self, tokens_to_remove: int, undo: bool = False) -> bool:
        """Removes the last |n| tokens for n ≤ 0; for n > 0 keeps the first n columns.

        To a length that is `rollback` below the longest so far, or less, that is as if the tokens had never come. Further
        back, a page that is cut through goes back to the window with its quantised values, and whole pages stay pages.

        Args:
            undo: as if they had never come also without a rollback, where the 16-bit rows happen to be there still.
        Returns:
            whether the tokens that are left stand as if the others had never come.
        Raises:
            KvfoldError: what is left would need tokens that a sliding window has left behind; nothing is removed.
        """
        self.check_crop(tokens_to_remove)
        remove = self._removed(tokens_to_remove)
        if not self.is_initialized or remove == 0:
            return True
        exact = undo or self.geometry.rollback > 0
        whole = [self._crop_row(b, remove, exact) for b in range(self.batch_size)]
        self.columns -= remove
        self._fit_table(0)
        return all(whole)

    def _crop_row(self, b: int, remove: int, exact: bool) -> bool:
        """Crops one sequence; whether no token that is left is quantised that would not be if the others had never come."""
        g = self.geometry
        length, pages = self.length[b], len(self.pages[b])
        kept = max(0, length - remove)
        oldest = max(g.sinks, self.oldest[b], length - g.ring)  # a slot was written anew when the ring came round
        whole = min(g.num_pages(kept), pages)
        same = True
        if whole == pages or (exact and g.sinks + whole * g.page_tokens >= oldest):  # the rows are still there
            self._drop_pages(b, whole)
        else:
            same = self._lossless(self.pages[b][whole : -(-max(0, kept - g.sinks) // g.page_tokens)])
            whole = min(max(0, kept - g.sinks) // g.page_tokens, pages)
            first = g.sinks + whole * g.page_tokens
            if whole < pages and kept > first:
                keys, values = self.read_pages(self.pages[b][whole : whole + 1])
                slots = self.slots(first, kept)
                self.raw_keys[b, :, slots] = to_float16(keys[:, : kept - first])
                self.raw_values[b, :, slots] = to_float16(values[:, : kept - first])
            self._drop_pages(b, whole)
            oldest = first
        self.oldest[b] = min(oldest, max(kept, g.sinks))
        self.length[b] = kept
        self._set_state(b)
        return same

    def _lossless(self, ids: list[int]) -> bool:
        """Whether pages hold all 16 bits."""
        rungs = [self.rungs[self.pool.rung(i)] for i in ids]
        return all(rung.key.format.params == rung.value.format.params == "none" for rung in rungs)

    def _drop_pages(self, b: int, whole: int) -> None:
        """Takes all pages from number `whole` on off sequence b."""
        ids = self.pages[b][whole:]
        del self.pages[b][whole:]
        self.passed[b] = min(self.passed[b], whole)
        self.pool.release([i for i in ids if i != PASSED])

    def extend_ring(self, geometry: Geometry) -> None:
        """Goes on with a geometry that differs in `rollback` alone; what the ring holds moves to one of the new size."""
        old, self.geometry = self.geometry, geometry
        if not self.is_initialized or old.ring == geometry.ring:
            return
        shape = (self.batch_size, geometry.num_kv_heads, geometry.raw_rows, geometry.head_dim)
        buffers = [torch.empty(shape, dtype=torch.float16, device=self.device) for _ in range(2)]
        for b, length in enumerate(self.length):
            self.oldest[b] = max(geometry.sinks, self.oldest[b], length - old.ring)
            held = [*range(min(geometry.sinks, length)), *range(self.oldest[b], length)]
            positions = torch.tensor(held, dtype=torch.int64)
            source, target = (slots_of(g, positions).to(self.device) for g in (old, geometry))
            for new, rows in zip(buffers, (self.raw_keys, self.raw_values), strict=True):
                new[b, :, target] = rows[b][:, source]
        self.raw_keys, self.raw_values = buffers

    def fork(self, padding: Padding) -> "PackedLayer":
        """A layer that goes on from here by itself: the pages are shared, 16-bit rows and tables are its own."""
        other = self._twin(padding)
        if self.is_initialized:
            for ids in self.pages:
                self.pool.share([i for i in ids if i != PASSED])
            self.shares_pool = other.shares_pool = True
            other._fit_table(0)
        return other

    def duplicate(self, padding: Padding) -> "PackedLayer":
        """A layer that goes on from here by itself, with pages of its own."""
        other = self._twin(padding)
        other.shares_pool = False
        if self.is_initialized:
            other.pool = self.pool.duplicate(self.pages)
            for b, (ids, passed) in enumerate(zip(other.pages, other.passed, strict=True)):
                other.enter(b, passed, ids[passed:])
        return other

    def _twin(self, padding: Padding) -> Any:
        """A layer with the same pages, and rows and tables of its own."""
        self._catch_up()
        other: Any = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.padding = padding
        if self.is_initialized:
            other.raw_keys, other.raw_values = self.raw_keys.clone(), self.raw_values.clone()
            other.state, other.block_table = self.state.clone(), self.block_table.clone()
            other.segments, other.due, other.bounds = self.segments.clone(), [], []
            other.length, other.pages = list(self.length), [list(ids) for ids in self.pages]
            other.passed, other.oldest = list(self.passed), list(self.oldest)
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise KvfoldError("A layer of a packed cache can't be copied by itself; copy the cache, or its fork(n).")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, int64 [n], in that order; an index may repeat. Pages are shared, not copied."""
        if not self.is_initialized:
            return
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        chosen = indices.tolist()
        for b in chosen:
            self.pool.share([i for i in self.pages[b] if i != PASSED])
        self._disown()
        index = indices.to(self.device)
        self.raw_keys, self.raw_values = self.raw_keys[index], self.raw_values[index]
        self.state, self.block_table = self.state[index], self.block_table[index]
        self.length = [self.length[b] for b in chosen]
        self.pages = [list(self.pages[b]) for b in chosen]
        self.passed, self.oldest = [self.passed[b] for b in chosen], [self.oldest[b] for b in chosen]
        self.batch_size = len(chosen)
        if self.batch_size:
            self._fit_table(0)
        else:
            self.block_table = self.block_table[:, :0]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))
