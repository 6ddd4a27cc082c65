"""The window and the pages of a layer together: tokens come in 16 bits, are packed, and go."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.exports.account import Geometry
from kvfold.exports.spec import LayerSpec
from kvfold.kernels.attention import packed_tokens
from kvfold.kernels.quantizer import to_float16
from kvfold.runtime.backends.base import Backend, LayerTensors, LoweredPages, RowView
from kvfold.runtime.backends.reference import read_pages
from kvfold.runtime.cache.page_table import PageTable
from kvfold.runtime.cache.sequence import PASSED
from kvfold.runtime.cache.shared import SharedState
from kvfold.runtime.cache.window import RawWindow


class LayerStore:
    """What a layer holds of its sequences, once it holds anything.

    Args:
        window: 16-bit rows.
        table: sequences and their pages.
        rungs: what pages may be stored in, floor first, on the device.
        shared: by all layers of the cache.
        layer_idx: number of the layer.
        backend: reads and writes the tensors.
    """

    def __init__(
        self,
        window: RawWindow,
        table: PageTable,
        rungs: Sequence[LayerSpec],
        shared: SharedState,
        layer_idx: int,
        backend: Backend,
    ) -> None:
        self.window, self.table, self.rungs, self.shared = window, table, rungs, shared
        self.layer_idx, self.backend = layer_idx, backend

    @property
    def geometry(self) -> Geometry:
        """Sinks, window, page size and the layer's head shape."""
        return self.shared.geometry.of_layer(self.layer_idx)

    def record(self, marks: Tensor | None = None) -> LayerTensors:
        """The layer's tensors, for a backend."""
        window, table = self.window, self.table
        return LayerTensors(
            self.layer_idx,
            self.geometry,
            self.rungs,
            window.keys,
            window.values,
            table.state,
            table.block_table,
            table.segments,
            table.next_rungs()[0],
            table.pool,
            self.shared.workspace,
            self.shared.batch_invariant,
            marks,
        )

    def tensors(self) -> list[Tensor]:
        """Every resident tensor on the device."""
        table, pool = self.table, self.table.pool
        if not table.shares_pool:
            return [*self.own_tensors(), *pool.tensors()]
        return [
            *self.own_tensors(),
            *(pool.page(i) for i in sorted(table.own_pages()) if pool.on_device(i)),
        ]

    def own_tensors(self) -> list[Tensor]:
        """Every resident tensor but the pages."""
        return [*self.window.tensors(), *self.table.tensors()]

    @property
    def nbytes(self) -> int:
        """Resident bytes, on the device."""
        if self.table.shares_pool:
            return sum(t.nbytes for t in self.tensors())
        return sum(t.nbytes for t in self.own_tensors()) + self.table.pool.nbytes

    # -- tokens come -------------------------------------------------------------------------------

    def append(self, b: int, keys: Tensor, values: Tensor, skip: int, pad: int) -> RowView:
        """Appends keys in their stored basis and values, float16 [Hkv, n, D], to sequence b, and
        says what their queries read.

        Args:
            skip: leading columns of this call that are padding, left out here.
            pad: the same of the whole sequence.
        """
        one = keys.shape[1] == 1
        rows, packed = (
            self._append_token(b, keys, values) if one else self._append_chunk(b, keys, values)
        )
        return self._grown(b, keys.shape[1], skip, pad, rows, packed)

    def _packed_after(self, b: int, total: int) -> tuple[int, int]:
        """Tokens in pages of sequence b, before and after it has `total` tokens."""
        g = self.geometry
        packed = len(self.table.sequences[b].pages) * g.page_tokens
        return packed, max(packed, packed_tokens(total, g.sinks, g.window, g.page_tokens))

    def _append_token(
        self, b: int, keys: Tensor, values: Tensor
    ) -> tuple[tuple[Tensor, Tensor], int]:
        """One token: (16-bit rows that its query reads, first tokens that it reads from pages)."""
        g, window = self.geometry, self.window
        length = self.table.sequences[b].length
        total = length + 1
        packed, packed_after = self._packed_after(b, total)
        self.backend.append(self.record(), b, window.slots(length, total), keys, values)
        if packed_after > packed:
            self._write_pages(b, *window.page(b, packed // g.page_tokens))
        sinks = min(g.sinks, total)
        held = torch.cat(
            (window.slots(0, sinks), window.slots(max(sinks, g.sinks + packed_after), total))
        )
        return window.read(b, held), packed_after

    def _append_chunk(
        self, b: int, keys: Tensor, values: Tensor
    ) -> tuple[tuple[Tensor, Tensor], int]:
        """A prompt or a chunk, whose queries still read in 16 bits what this very call packs;
        returns as `_append_token`."""
        g, window, sequence = self.geometry, self.window, self.table.sequences[b]
        length = sequence.length
        total = length + keys.shape[1]
        packed, packed_after = self._packed_after(b, total)
        sinks = min(g.sinks, length)
        held = torch.cat(
            (window.slots(0, sinks), window.slots(max(sinks, g.sinks + packed), length))
        )
        rows = [
            torch.cat(parts, 1) for parts in zip(window.read(b, held), (keys, values), strict=True)
        ]
        if packed_after > packed:
            end = g.sinks + packed_after - packed
            self._write_pages(b, rows[0][:, g.sinks : end], rows[1][:, g.sinks : end])
        # first new token whose row is kept: of the window, or what a crop of `rollback` tokens
        # would bring back there
        least = packed_tokens(max(0, total - g.rollback), g.sinks, g.window, g.page_tokens)
        kept = max(length, g.sinks + least)
        if kept > length:
            sequence.keep_rows_from(max(sequence.oldest, kept))
        new_sinks = range(length, min(g.sinks, total))
        slots = torch.cat((window.slots(length, min(g.sinks, total)), window.slots(kept, total)))
        source = torch.tensor([*new_sinks, *range(kept, total)], dtype=torch.int64) - length
        source = source.to(keys.device)
        self.backend.append(self.record(), b, slots, keys[:, source], values[:, source])
        return (rows[0], rows[1]), packed

    def _grown(
        self, b: int, new: int, skip: int, pad: int, rows: tuple[Tensor, Tensor], packed: int
    ) -> RowView:
        """Counts sequence b's new tokens and says what their queries read: 16-bit rows, and the
        first `packed` tokens from pages."""
        g, sequence, (keys, values) = self.geometry, self.table.sequences[b], rows
        length, device = sequence.length, keys.device
        total = length + new
        sequence.set_length(total)
        self.table.note_state(b)
        positions = torch.arange(length, total, device=device)
        seen = positions + 1 - g.sinks - g.window
        limit = g.sinks + (seen.clamp_min(0) // g.page_tokens * g.page_tokens).clamp_min(packed)
        raw_positions = torch.arange(keys.shape[1], device=device)
        raw_positions[g.sinks :] += packed
        ids = list(sequence.pages)
        return RowView(
            skip,
            pad,
            positions,
            limit,
            keys,
            values,
            raw_positions,
            ids,
            packed,
            total,
            sequence.passed,
        )

    def _write_pages(self, b: int, keys: Tensor, values: Tensor) -> None:
        """Packs whole pages of float16 [Hkv, n·page_tokens, D] behind the pages that sequence b
        has, as many at a time as may wait for their bytes together."""
        size, most = self.geometry.page_tokens, self.table.pool.most
        step = keys.shape[1] if most is None else most * size
        for part in zip(*(x.split(step, 1) for x in (keys, values)), strict=True):
            ids = self.table.append(b, part[0].shape[1] // size)
            self.backend.write_pages(self.record(), ids, *part)
            self.table.pool.written()

    # -- pages are read and change -----------------------------------------------------------------

    def read_pages(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Decodes pages: (keys, values), float32 [Hkv, len(ids)·page_tokens, D], keys in their
        stored basis."""
        return read_pages(self.table.pool, ids, self.rungs, self.geometry)

    def take_down(self, ids: list[int], to: int | None = None) -> LoweredPages:
        """Gives pages of one rung memory on a lower one, once for all their owners; what they held
        is then the backend's to re-quantise. The oldest of their rung in each sequence, with no
        page between the two rungs.

        Args:
            to: the lower rung; None for the next.
        """
        table, rung = self.table, self.table.pool.rung(ids[0])
        to = rung - 1 if to is None else to
        table.cuts()  # as they are before
        old, new = table.pool.lower(ids, to)
        table.note_lowered(ids, rung, to)
        return LoweredPages(old, new, self.rungs[rung], self.rungs[to])

    # -- tokens go ---------------------------------------------------------------------------------

    def crop(self, b: int, remove: int, exact: bool) -> bool:
        """Crops one sequence; whether no token that is left is quantised that would not be if the
        others had never come."""
        g, sequence = self.geometry, self.table.sequences[b]
        kept, pages = max(0, sequence.length - remove), len(sequence.pages)
        oldest = self.window.oldest(sequence)
        whole = min(g.num_pages(kept), pages)
        same = True
        if whole == pages or (
            exact and g.sinks + whole * g.page_tokens >= oldest
        ):  # the rows are still there
            self.table.drop(b, whole)
        else:
            same = self._lossless(
                sequence.pages[whole : -(-max(0, kept - g.sinks) // g.page_tokens)]
            )
            whole = min(max(0, kept - g.sinks) // g.page_tokens, pages)
            first = g.sinks + whole * g.page_tokens
            if whole < pages and kept > first:
                cut = (
                    to_float16(x[:, : kept - first])
                    for x in self.read_pages(sequence.pages[whole : whole + 1])
                )
                self.window.write(b, self.window.slots(first, kept), *cut)
            self.table.drop(b, whole)
            oldest = first
        sequence.keep_rows_from(min(oldest, max(kept, g.sinks)))
        sequence.set_length(kept)
        self.table.note_state(b)
        return same

    def _lossless(self, ids: list[int]) -> bool:
        """Whether pages hold all 16 bits."""
        rungs = [self.rungs[self.table.pool.rung(i)] for i in ids]
        return all(rung.key.format.raw and rung.value.format.raw for rung in rungs)

    # -- whole sequences ---------------------------------------------------------------------------

    def select(self, chosen: Tensor, device: torch.device) -> None:
        """Keeps the sequences `chosen`, int64 [n], in that order; an index may repeat. Pages are
        shared, not copied."""
        index = chosen.to(device)
        self.window.select(index)
        self.table.select(chosen.tolist(), index)

    def copy(self, shared: SharedState, shares_pages: bool) -> "LayerStore":
        """The same for a cache that goes on from here by itself, with the same pages or with copies
        of them."""
        table = (
            self.table.fork(shared.clock) if shares_pages else self.table.duplicate(shared.clock)
        )
        return LayerStore(
            self.window.copy(), table, self.rungs, shared, self.layer_idx, self.backend
        )

    def restore(
        self,
        sequences: list[tuple[int, int, list[int]]],
        rows: list[tuple[Tensor, Tensor]],
        pages: list[Tensor],
    ) -> None:
        """Fills a new store with what was saved of one.

        Args:
            sequences: (tokens, first token of the ring that is there, pages), pages as places in
                `pages`, of each.
            rows: keys and values [num_kv_heads, n, head_dim] of each: sinks, then the ring from
                that token on.
            pages: uint8 [page size] each.
        """
        g, table = self.geometry, self.table
        for b, ((length, oldest, _), (keys, values)) in enumerate(
            zip(sequences, rows, strict=True)
        ):
            slots = (self.window.slots(0, min(g.sinks, length)), self.window.slots(oldest, length))
            self.window.write(b, torch.cat(slots), keys.to(table.device), values.to(table.device))
        numbers = []
        for page in pages:
            numbers += table.pool.allocate(1)
            table.pool.page(numbers[-1]).copy_(page)
            table.pool.written()
        for sequence, (length, oldest, places) in zip(table.sequences, sequences, strict=True):
            sequence.restore(
                length, oldest, [PASSED if place == PASSED else numbers[place] for place in places]
            )
            table.pool.share([i for i in sequence.pages if i != PASSED])
        table.pool.release(numbers)  # each sequence owns them now
        table.fit()
        for b, sequence in enumerate(table.sequences):
            table.enter(b, sequence.passed)
            table.note_state(b)


class Lowering:
    """Pages of any layers of a cache that go down together, in one launch where kernels do it.
    While this is entered they wait, and stand on both rungs; they are through when it is left,
    however it is left."""

    def __init__(self) -> None:
        self._backend: Backend | None = None
        # by the layers' heads, of which a launch has one number
        self._work: dict[int, tuple[Geometry, list[LoweredPages]]] = {}
        self._pages: set[tuple[int, int]] = set()  # layers, and pages of theirs, that wait
        self._nbytes = 0

    def __enter__(self) -> "Lowering":
        return self

    def __exit__(self, *args: object) -> None:
        self.carry_out()

    def add(self, held: LayerStore, ids: list[int], to: int | None = None) -> int:
        """Takes the oldest pages of one rung of a layer. Pages that have yet to come down to that
        rung do so first.

        Args:
            to: the rung where they go; None for the next lower one. Re-quantised once, they lose
                less than from rung to rung.
        Returns:
            bytes that were freed by that.
        """
        pages = {(held.layer_idx, i) for i in ids}
        freed = 0 if self._pages.isdisjoint(pages) else self.carry_out()
        work = held.take_down(ids, to)
        self._backend, g = held.backend, held.geometry
        self._work.setdefault(g.num_kv_heads, (g, []))[1].append(work)
        self._pages |= pages
        self._nbytes += len(ids) * work.old[0].nbytes
        return freed

    def carry_out(self) -> int:
        """Re-quantises what waits, and returns how many bytes that has freed."""
        if self._backend is None:
            return 0
        work, freed, backend = self._work, self._nbytes, self._backend
        self._work, self._nbytes, self._backend = {}, 0, None
        self._pages.clear()
        for geometry, pages in work.values():
            backend.lower_pages(geometry, pages)
        return freed
