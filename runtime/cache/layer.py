"""One layer of the packed cache: a 16-bit buffer (sinks, then window) and pages, for each sequence of a batch."""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvfold.exports.account import Geometry, table_entries
from kvfold.exports.spec import LayerSpec
from kvfold.kernels.attention import Tile, packed_tokens
from kvfold.kernels.codes import field_order
from kvfold.kernels.quantizer import to_float16
from kvfold.runtime.cache.ambient import neutrally
from kvfold.runtime.cache.nan_check import not_finite
from kvfold.runtime.cache.pager import Pager, PagingPool
from kvfold.runtime.cache.pages import read_codes, read_pages, set_segments, write_pages
from kvfold.runtime.cache.pool import PagePool
from kvfold.runtime.cache.sequences import PASSED, Sequences, slots_of
from kvfold.runtime.cache.upload import on_device
from kvfold.runtime.cache.view import LayerView, Padding, RowView
from kvfold.runtime.generate.steps import due_in, take_pages

TILE_TOKENS = 1024  # packed tokens decoded at a time while attending
CODE_TOKENS = 2**14  # packed tokens that one query attends to at a time, and the most bytes that are copied for that
CODE_NBYTES = 2**21


class PackedLayer(Sequences, CacheLayerMixin):
    """Packed keys and values of one layer.

    Args:
        spec: formats and transforms, on any device; moved to the keys' device at first use.
        geometry: sinks, window, page size and head shape.
        padding: shared by all layers of the cache.
        layer_idx: for messages.
        use_triton: read and write by Triton kernels instead of plain torch.
        rungs: what pages may be stored in, floor (`spec`) first; new pages go on the last one unless `due` says otherwise.
    """

    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        spec: LayerSpec,
        geometry: Geometry,
        padding: Padding,
        layer_idx: int,
        use_triton: bool = False,
        rungs: Sequence[LayerSpec] = (),
    ) -> None:
        super().__init__()
        self.rungs = list(rungs) or [spec]
        self.due: list[list[int]] = []  # rungs of each sequence's next pages, oldest first; [] for the highest
        self.spec, self.geometry, self.padding, self.layer_idx = spec, geometry, padding, layer_idx
        self.use_triton = use_triton
        self.sliding = geometry.sliding_of(layer_idx)
        self.shares_pool = False  # with forks
        self.bounds: list[list[int]] = []  # `segments` on the host
        self._columns, self._length, self._counted = 0, [], padding.steps
        self.pager: Pager | None = None  # where old pages may go to host memory

    @neutrally
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        g = self.geometry
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        self.rungs = [rung.to(self.device) for rung in self.rungs]
        self.spec = self.rungs[0]
        sizes = [g.pair_nbytes(r.key.format, r.value.format) for r in self.rungs]
        if self.pager is None:
            self.pool = PagePool(sizes, self.device)
        else:
            self.pool = PagingPool(sizes[0], self.device, self.pager, self.layer_idx)
        self.moves = 0  # of the pool's, that the block table knows
        shape = (self.batch_size, g.num_kv_heads, g.raw_rows, g.head_dim)
        self.raw_keys = torch.empty(shape, dtype=torch.float16, device=self.device)
        self.raw_values = torch.empty(shape, dtype=torch.float16, device=self.device)
        # on the device for kernels, and on the host so that nothing waits for the device
        self.state = torch.zeros(self.batch_size, 2, dtype=torch.int32, device=self.device)  # length, pages
        self.block_table = torch.zeros(self.batch_size, 0, dtype=torch.int64, device=self.device)  # addresses
        self.segments = torch.zeros(0, 0, dtype=torch.int32, device=self.device)  # see runtime.pages
        self.length = [0] * self.batch_size
        self.pages: list[list[int]] = [[] for _ in range(self.batch_size)]
        self.passed = [0] * self.batch_size  # leading pages that are gone
        # lowest token of the ring whose 16-bit row is there, unless the ring has come round since
        self.oldest = [self.geometry.sinks] * self.batch_size
        self.is_initialized = True

    def enter(self, b: int, first: int, ids: list[int]) -> None:
        """Writes pages into sequence b's block table from entry `first` on."""
        if ids:
            entries = on_device(self.pool.addresses(ids), torch.int64, self.device)
            self.block_table[b, first : first + len(ids)] = entries

    def _set_state(self, b: int) -> None:
        self.state[b] = on_device([self.length[b], len(self.pages[b])], torch.int32, self.device)

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """Every tensor on the device that grows with the number of sequences or tokens."""
        if not self.is_initialized:
            return []
        if not self.shares_pool:
            return [*self.own_tensors(), *self.pool.tensors()]
        return [*self.own_tensors(), *(self.pool.page(i) for i in sorted(self._own_pages()) if self.pool.on_device(i))]

    def own_tensors(self) -> list[Tensor]:
        """Every resident tensor but the pages."""
        return [self.raw_keys, self.raw_values, self.state, self.block_table, self.segments]

    def _own_pages(self) -> set[int]:
        """Distinct pages of these sequences."""
        return {i for ids in self.pages for i in ids if i != PASSED}

    @property
    def host_nbytes(self) -> int:
        """Bytes in host memory, whoever shares them."""
        return self.pool.host_nbytes if self.is_initialized else 0

    @property
    def nbytes(self) -> int:
        """Resident bytes, on the device."""
        if not self.is_initialized:
            return 0
        if self.shares_pool:
            return sum(t.nbytes for t in self.tensors())
        return sum(t.nbytes for t in self.own_tensors()) + self.pool.nbytes

    def lengths(self) -> list[int]:
        """Tokens of each sequence, without padding."""
        return list(self.length) if self.is_initialized else []

    def num_pages(self) -> int:
        """Distinct resident pages."""
        return len({i for ids in self.pages for i in ids} - {PASSED}) if self.is_initialized else 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + (0 if self.padding.stepping else query_length), 0

    # -- append --------------------------------------------------------------------------------------------------------

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[LayerView, LayerView]:
        """Appends keys (after RoPE) and values [B, num_kv_heads, T, head_dim] and returns the handle to attend with, twice.

        Raises:
            FloatingPointError: a key or value is NaN or infinite; nothing of this layer is stored. A decoding step by kernels
                leaves that to the cache (runtime.marks).
        """
        if self.padding.stepping:  # the host's part is done for all layers (runtime.steps)
            shape = torch.Size((*key_states.shape[:2], self.columns, key_states.shape[3]))
            view = LayerView(self, None, shape, key_states.dtype, key_states.device, (key_states, value_states))
            return view, view
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.release_passed()
        self.pool.written()
        tokens = key_states.shape[2]
        pads = self.padding.columns or [0] * self.batch_size
        skips = [min(max(pad - self.columns, 0), tokens) for pad in pads]
        shape = torch.Size((*key_states.shape[:2], self.columns + tokens, key_states.shape[3]))
        if self.use_triton and self.padding.plain and tokens == 1 and not any(skips):
            take_pages([self], due_in(self))
            self.length = [n + 1 for n in self.length]
            self.columns += 1
            view = LayerView(self, None, shape, key_states.dtype, key_states.device, (key_states, value_states))
            return view, view
        self._check_finite(key_states, value_states, skips)
        positions = self._positions(tokens, skips) if self.spec.key.turns else None
        keys = to_float16(self.spec.key.apply(key_states, positions, self.geometry.sinks, self.columns + tokens))
        values = to_float16(value_states.float())
        rows = [self._append(b, keys[b, :, skip:], values[b, :, skip:], skip, pads[b]) for b, skip in enumerate(skips)]
        self.columns += tokens
        set_segments(self)
        view = LayerView(self, rows, shape, key_states.dtype, key_states.device)
        return view, view

    def _positions(self, tokens: int, skips: list[int]) -> Tensor:
        """Positions of the next columns, counted from each sequence's first token: int64 [B, tokens], 0 where padded."""
        starts = [length - skip for length, skip in zip(self.length, skips, strict=True)]
        columns = torch.arange(tokens, device=self.device)
        return (columns + on_device(starts, torch.int64, self.device)[:, None]).clamp_min(0)

    def _check_finite(self, keys: Tensor, values: Tensor, skips: list[int]) -> None:
        for name, states in (("key", keys), ("value", values)):
            if bool(torch.isfinite(states).all()):
                continue
            for b, skip in enumerate(skips):
                bad = (~torch.isfinite(states[b, :, skip:])).any(-1).any(0).nonzero()
                if len(bad):
                    raise not_finite(self.layer_idx, name, self.columns + skip + int(bad[0]), b)

    def slots(self, start: int, end: int) -> Tensor:
        """Rows of the 16-bit buffers that tokens start … end − 1 stand in, int64 [end − start]."""
        return slots_of(self.geometry, torch.arange(start, max(start, end))).to(self.device, non_blocking=True)

    def _append(self, b: int, keys: Tensor, values: Tensor, skip: int, pad: int) -> RowView:
        """Appends keys in their stored basis and values, float16 [Hkv, n, D], to sequence b."""
        g = self.geometry
        length, pages = self.length[b], len(self.pages[b])
        packed, new = pages * g.page_tokens, keys.shape[1]
        total = length + new
        packed_after = max(packed, packed_tokens(total, g.sinks, g.window, g.page_tokens))
        raw = (self.raw_keys[b], self.raw_values[b])
        sinks = min(g.sinks, length)
        if new == 1:
            for buffer, row in zip(raw, (keys, values), strict=True):
                buffer[:, self.slots(length, total)] = row
            if packed_after > packed:
                first = g.sinks + packed % g.ring
                page = slice(first, first + g.page_tokens)
                self._store_pages(b, raw[0][:, page], raw[1][:, page])
            sinks = min(g.sinks, total)
            held = torch.cat((self.slots(0, sinks), self.slots(max(sinks, g.sinks + packed_after), total)))
            view_keys, view_values = raw[0][:, held], raw[1][:, held]
            view_packed = packed_after
        else:  # a prompt or a chunk: its queries still read raw what this very call packs
            held = torch.cat((self.slots(0, sinks), self.slots(max(sinks, g.sinks + packed), length)))
            view_keys = torch.cat((raw[0][:, held], keys), 1)
            view_values = torch.cat((raw[1][:, held], values), 1)
            view_packed = packed
            end = g.sinks + packed_after - packed
            if packed_after > packed:
                self._store_pages(b, view_keys[:, g.sinks : end], view_values[:, g.sinks : end])
            # first new token whose row is kept: of the window, or what a crop of `rollback` tokens would bring back there
            least = packed_tokens(max(0, total - g.rollback), g.sinks, g.window, g.page_tokens)
            kept = max(length, g.sinks + least)
            if kept > length:
                self.oldest[b] = max(self.oldest[b], kept)
            fresh = torch.cat((self.slots(length, min(g.sinks, total)), self.slots(kept, total)))
            new_sinks = range(length, min(g.sinks, total))
            source = torch.tensor([*new_sinks, *range(kept, total)], dtype=torch.int64) - length
            source = source.to(self.device)
            for buffer, row in zip(raw, (keys, values), strict=True):
                buffer[:, fresh] = row[:, source]
        self.length[b] = total
        self._set_state(b)
        device = keys.device
        positions = torch.arange(length, total, device=device)
        seen = positions + 1 - g.sinks - g.window
        limit = g.sinks + (seen.clamp_min(0) // g.page_tokens * g.page_tokens).clamp_min(view_packed)
        raw_positions = torch.arange(view_keys.shape[1], device=device)
        raw_positions[g.sinks :] += view_packed
        ids = list(self.pages[b])
        return RowView(skip, pad, positions, limit, view_keys, view_values, raw_positions, ids, view_packed)

    def _store_pages(self, b: int, keys: Tensor, values: Tensor) -> None:
        """Packs whole pages of float16 [Hkv, n·page_tokens, D] behind the pages that sequence b has."""
        most = self.pool.most
        if most is not None:
            for part in zip(*(x.split(most * self.geometry.page_tokens, 1) for x in (keys, values)), strict=True):
                self._store_run(b, *part)
        else:
            self._store_run(b, keys, values)

    def _store_run(self, b: int, keys: Tensor, values: Tensor) -> None:
        """_store_pages for pages that may all wait for their bytes together."""
        count = keys.shape[1] // self.geometry.page_tokens
        first = len(self.pages[b])
        rungs = self.due[b] if self.due else []
        ids = [i for n in range(count) for i in self.pool.allocate(1, rungs[n] if rungs else -1)]
        self._fit_table(max(first + count, *(len(ids) for ids in self.pages)))
        self.enter(b, first, ids)
        self.pages[b] += ids
        write_pages(self, ids, keys, values)
        self.pool.written()

    def bring(self) -> None:
        """Makes all pages readable by kernels, at the addresses that the block table has."""
        self.pool.bring()
        if self.moves != self.pool.moves:
            self.moves = self.pool.moves
            for b, (ids, passed) in enumerate(zip(self.pages, self.passed, strict=True)):
                self.enter(b, passed, ids[passed:])

    @neutrally
    def _fit_table(self, entries: int) -> None:
        """Gives the block table room for `entries` pages a sequence, in whole steps."""
        entries = max(entries, *(len(ids) for ids in self.pages), 0)
        room = table_entries(entries)
        if room != self.block_table.shape[1]:
            self.block_table = self.block_table.new_zeros(
                self.batch_size, 0
            )  # the old one goes before the new one comes
            self.block_table = self.block_table.new_zeros(self.batch_size, room)
            for b in range(self.batch_size):
                self.enter(b, 0, self.pages[b])

    # -- read ----------------------------------------------------------------------------------------------------------

    def read_pages(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Decodes pages: (keys, values), float32 [Hkv, len(ids)·page_tokens, D], keys in their stored basis."""
        return read_pages(self, ids)

    def tiles(self, row: RowView):
        """Yields what the queries of one sequence read, a tile at a time."""
        g = self.geometry
        raw = row.keys.shape[1]
        # for a prompt the sinks come apart: later runs of raw tokens are then skipped by the queries that read them packed
        cuts = [0, raw] if row.positions.numel() == 1 else [0, *range(min(g.sinks, raw), raw, TILE_TOKENS // 2), raw]
        for start, end in pairwise(cuts):
            part = slice(start, end)
            yield Tile(row.keys[:, part], row.values[:, part], row.raw_positions[part], False)
        unseen = 0  # pages behind the first query's sliding window, be they gone already or not
        if self.sliding and row.positions.numel():
            unseen = max(0, int(row.positions[0]) - self.sliding + 1 - g.sinks) // g.page_tokens
        one = row.positions.numel() == 1
        for start, ids in self._runs(row.pages, unseen, one):
            first = g.sinks + start * g.page_tokens
            positions = torch.arange(first, first + len(ids) * g.page_tokens, device=self.device)
            if one:
                yield Tile(*read_codes(self, ids), field_order(positions, g.page_tokens), True)
            else:
                yield Tile(*self.read_pages(ids), positions, True)

    def _runs(self, pages: list[int], start: int, one: bool) -> Iterator[tuple[int, list[int]]]:
        """Cuts the pages from number `start` on into tiles, of one rung each for one query: (first number, pages)."""
        g = self.geometry
        step = max(1, TILE_TOKENS // g.page_tokens)
        if not one:
            yield from ((i, pages[i : i + step]) for i in range(start, len(pages), step))
            return
        for _, run in groupby(range(start, len(pages)), lambda i: self.pool.rung(pages[i])):
            held = list(run)
            size = min(CODE_TOKENS // g.page_tokens, CODE_NBYTES // self.pool.sizes[self.pool.rung(pages[held[0]])])
            for i in range(held[0], held[-1] + 1, max(1, size)):
                yield i, pages[i : min(i + max(1, size), held[-1] + 1)]
