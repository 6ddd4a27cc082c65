"""One layer of the packed cache: a 16-bit buffer (sinks, then window) and pages, for each sequence of a batch."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvfold.exports.account import TABLE_STEP, Geometry
from kvfold.exports.spec import LayerSpec, clip_rows
from kvfold.kernels.attention import Tile, attend, packed_tokens
from kvfold.kernels.quantizer import decode, encode, to_float16
from kvfold.runtime.pool import PagePool

TILE_TOKENS = 1024  # packed tokens decoded at a time while attending


@dataclass
class Padding:
    """Left padding of each sequence in columns, shared by the layers of a cache."""

    columns: list[int]


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


@dataclass
class LayerView:
    """The handle that `update` returns in place of keys and values; the attention function hands it back.

    `dtype`, `device` and `shape` answer what model code may ask of a key tensor.
    """

    layer: "PackedLayer"
    rows: list[RowView]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def attend(self, query: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
        """Attention of query [B, num_heads, T, head_dim] → float32 of the same shape.

        mask: bool [B, 1, T, columns] or None for plain causal over what is not padding.
        """
        spec, geometry = self.layer.spec, self.layer.geometry
        out = torch.zeros(query.shape, device=query.device)
        q = spec.key.apply_query(query)
        for b, row in enumerate(self.rows):
            if row.positions.numel() == 0:
                continue
            row_mask = None
            if mask is not None:
                columns = row.pad + int(row.positions[-1]) + 1
                row_mask = mask[min(b, mask.shape[0] - 1), 0, row.skip :, row.pad : columns]
            out[b, :, row.skip :] = attend(
                q[b, :, row.skip :], row.positions, row.limit, self.layer.tiles(row),
                sinks=geometry.sinks, scaling=scaling, mask=row_mask,
            )  # fmt: skip
        return out


class PackedLayer(CacheLayerMixin):
    """Packed keys and values of one layer.

    Args:
        spec: formats and transforms, on any device; moved to the keys' device at first use.
        geometry: sinks, window, page size and head shape.
        padding: shared by all layers of the cache.
        layer_idx: for messages.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, spec: LayerSpec, geometry: Geometry, padding: Padding, layer_idx: int) -> None:
        super().__init__()
        self.spec, self.geometry, self.padding, self.layer_idx = spec, geometry, padding, layer_idx
        self.columns = 0  # tokens seen, padding included: what transformers calls the sequence length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        g = self.geometry
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        self.spec = self.spec.to(self.device)
        page = g.page_nbytes(self.spec.key.format) + g.page_nbytes(self.spec.value.format)
        self.pool = PagePool(page, self.device)
        shape = (self.batch_size, g.num_kv_heads, g.raw_rows, g.head_dim)
        self.raw_keys = torch.empty(shape, dtype=torch.float16, device=self.device)
        self.raw_values = torch.empty(shape, dtype=torch.float16, device=self.device)
        self.state = torch.zeros(self.batch_size, 2, dtype=torch.int32, device=self.device)  # length, pages
        self.block_table = torch.zeros(self.batch_size, 0, dtype=torch.int32, device=self.device)
        self.is_initialized = True

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """Every tensor that grows with the number of sequences or tokens."""
        if not self.is_initialized:
            return []
        return [self.raw_keys, self.raw_values, self.state, self.block_table, *self.pool.tensors()]

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return sum(t.nbytes for t in self.tensors())

    def lengths(self) -> list[int]:
        """Tokens of each sequence, without padding."""
        return self.state[:, 0].tolist() if self.is_initialized else []

    def num_pages(self) -> int:
        """Distinct resident pages."""
        return len(self.pool.tensors()) if self.is_initialized else 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    # -- append --------------------------------------------------------------------------------------------------------

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[LayerView, LayerView]:
        """Appends keys (after RoPE) and values [B, num_kv_heads, T, head_dim] and returns the handle to attend with, twice.

        Raises:
            FloatingPointError: a key or value is NaN or infinite; nothing of this layer is stored.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        pads = self.padding.columns or [0] * self.batch_size
        skips = [min(max(pad - self.columns, 0), tokens) for pad in pads]
        self._check_finite(key_states, value_states, skips)
        keys = to_float16(self.spec.key.apply(key_states))
        values = to_float16(value_states.float())
        rows = [self._append(b, keys[b, :, skip:], values[b, :, skip:], skip, pads[b]) for b, skip in enumerate(skips)]
        self.columns += tokens
        shape = torch.Size((*key_states.shape[:2], self.columns, key_states.shape[3]))
        view = LayerView(self, rows, shape, key_states.dtype, key_states.device)
        return view, view

    def _check_finite(self, keys: Tensor, values: Tensor, skips: list[int]) -> None:
        for name, states in (("key", keys), ("value", values)):
            if bool(torch.isfinite(states).all()):
                continue
            for b, skip in enumerate(skips):
                bad = (~torch.isfinite(states[b, :, skip:])).any(-1).any(0).nonzero()
                if len(bad):
                    raise FloatingPointError(
                        f"Layer {self.layer_idx} computed a {name} that is NaN or infinite at position "
                        f"{self.columns + skip + int(bad[0])} of sequence {b}; it was not cached."
                    )

    def _append(self, b: int, keys: Tensor, values: Tensor, skip: int, pad: int) -> RowView:
        """Appends keys in their stored basis and values, float16 [Hkv, n, D], to sequence b."""
        g = self.geometry
        length, pages = self.state[b].tolist()
        packed, new = pages * g.page_tokens, keys.shape[1]
        total = length + new
        packed_after = max(packed, packed_tokens(total, g.sinks, g.window, g.page_tokens))
        held = length - packed  # raw rows in use
        if total - packed <= g.raw_rows and (new <= 1 or packed_after == packed):
            self.raw_keys[b, :, held : held + new] = keys
            self.raw_values[b, :, held : held + new] = values
            if packed_after > packed:
                end = g.sinks + packed_after - packed
                self._store_pages(b, self.raw_keys[b, :, g.sinks : end], self.raw_values[b, :, g.sinks : end], pages)
                for raw in (self.raw_keys, self.raw_values):
                    raw[b, :, g.sinks : total - packed_after] = raw[b, :, end : total - packed].clone()
            view_keys = self.raw_keys[b, :, : total - packed_after]
            view_values = self.raw_values[b, :, : total - packed_after]
            view_packed = packed_after
        else:  # a prompt or a chunk: its queries still read raw what this very call packs
            view_keys = torch.cat((self.raw_keys[b, :, :held], keys), 1)
            view_values = torch.cat((self.raw_values[b, :, :held], values), 1)
            view_packed = packed
            end = g.sinks + packed_after - packed
            if packed_after > packed:
                self._store_pages(b, view_keys[:, g.sinks : end], view_values[:, g.sinks : end], pages)
            for raw, view in ((self.raw_keys, view_keys), (self.raw_values, view_values)):
                kept = view if packed_after == packed else torch.cat((view[:, : g.sinks], view[:, end:]), 1)
                raw[b, :, : kept.shape[1]] = kept
        self.state[b, 0] = total
        device = keys.device
        positions = torch.arange(length, total, device=device)
        seen = positions + 1 - g.sinks - g.window
        limit = g.sinks + (seen.clamp_min(0) // g.page_tokens * g.page_tokens).clamp_min(view_packed)
        raw_positions = torch.arange(view_keys.shape[1], device=device)
        raw_positions[g.sinks :] += view_packed
        table = self.block_table[b, : int(self.state[b, 1])].tolist()
        return RowView(skip, pad, positions, limit, view_keys, view_values, raw_positions, table)

    def _store_pages(self, b: int, keys: Tensor, values: Tensor, pages: int) -> None:
        """Packs whole pages of float16 [Hkv, n·page_tokens, D] behind the `pages` pages that sequence b has."""
        size = self.geometry.page_tokens

        def pack(x: Tensor, spec) -> Tensor:
            blocks = x.unflatten(1, (-1, size)).transpose(0, 1)  # [n, Hkv, page, D]
            return encode(blocks, spec.format, clip_rows(spec.clip)).flatten(1)

        packed = torch.cat((pack(keys, self.spec.key), pack(values, self.spec.value)), 1)
        ids = self.pool.store(packed)
        self._fit_table(max(pages + len(ids), int(self.state[:, 1].max())))
        self.block_table[b, pages : pages + len(ids)] = torch.tensor(ids, dtype=torch.int32, device=self.device)
        self.state[b, 1] = pages + len(ids)

    def _fit_table(self, entries: int) -> None:
        """Gives the block table room for `entries` pages a sequence, in whole steps."""
        room = -(-entries // TABLE_STEP) * TABLE_STEP
        if room != self.block_table.shape[1]:
            table = self.block_table.new_zeros(self.batch_size, room)
            kept = min(room, self.block_table.shape[1])
            table[:, :kept] = self.block_table[:, :kept]
            self.block_table = table

    # -- read ----------------------------------------------------------------------------------------------------------

    def read_pages(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Decodes pages: (keys, values), float32 [Hkv, len(ids)·page_tokens, D], keys in their stored basis."""
        g = self.geometry
        data = self.pool.load(ids)
        split = g.page_nbytes(self.spec.key.format)

        def unpack(part: Tensor, spec) -> Tensor:
            blocks = decode(part.unflatten(1, (g.num_kv_heads, -1)), spec.format, g.page_tokens)  # [n, Hkv, page, D]
            return blocks.transpose(0, 1).flatten(1, 2)

        return unpack(data[:, :split], self.spec.key), unpack(data[:, split:], self.spec.value)

    def tiles(self, row: RowView):
        """Yields what the queries of one sequence read, a tile at a time."""
        g = self.geometry
        raw = row.keys.shape[1]
        # for a prompt the sinks come apart: later runs of raw tokens are then skipped by the queries that read them packed
        cuts = [0, raw] if row.positions.numel() == 1 else [0, *range(min(g.sinks, raw), raw, TILE_TOKENS // 2), raw]
        for start, end in pairwise(cuts):
            part = slice(start, end)
            yield Tile(row.keys[:, part], row.values[:, part], row.raw_positions[part], False)
        step = max(1, TILE_TOKENS // g.page_tokens)
        for start in range(0, len(row.pages), step):
            ids = row.pages[start : start + step]
            first = g.sinks + start * g.page_tokens
            keys, values = self.read_pages(ids)
            yield Tile(keys, values, torch.arange(first, first + keys.shape[1], device=keys.device), True)

    # -- whole sequences -----------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets everything and frees it."""
        if self.is_initialized:
            del self.pool, self.raw_keys, self.raw_values, self.state, self.block_table, self.batch_size
        self.is_initialized = False
        self.columns = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last |n| tokens for n ≤ 0; for n > 0 keeps the first n columns.

        A page that is cut through goes back to the window with its quantised values.
        """
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.columns - tokens_to_remove)
        remove = min(remove, self.columns)
        if not self.is_initialized or remove == 0:
            return
        for b in range(self.batch_size):
            self._crop_row(b, remove)
        self.columns -= remove
        self._fit_table(int(self.state[:, 1].max()))

    def _crop_row(self, b: int, remove: int) -> None:
        g = self.geometry
        length, pages = self.state[b].tolist()
        kept = max(0, length - remove)
        if kept < g.sinks + pages * g.page_tokens:
            whole = max(0, kept - g.sinks) // g.page_tokens
            ids = self.block_table[b, whole:pages].tolist()
            rest = kept - g.sinks - whole * g.page_tokens
            if rest > 0:
                keys, values = self.read_pages(ids[:1])
                self.raw_keys[b, :, g.sinks : g.sinks + rest] = to_float16(keys[:, :rest])
                self.raw_values[b, :, g.sinks : g.sinks + rest] = to_float16(values[:, :rest])
            self.pool.release(ids)
            self.state[b, 1] = whole
        self.state[b, 0] = kept

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, int64 [n], in that order; an index may repeat. Pages are shared, not copied."""
        if not self.is_initialized:
            return
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        old = [self.block_table[b, :n].tolist() for b, n in enumerate(self.state[:, 1].tolist())]
        for b in indices.tolist():
            self.pool.share(old[b])
        for ids in old:
            self.pool.release(ids)
        index = indices.to(self.device)
        self.raw_keys, self.raw_values = self.raw_keys[index], self.raw_values[index]
        self.state, self.block_table = self.state[index], self.block_table[index]
        self.batch_size = len(index)
        self._fit_table(int(self.state[:, 1].max()) if self.batch_size else 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))
