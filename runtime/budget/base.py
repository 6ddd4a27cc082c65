"""The contract of a policy: what a byte budget means for a cache, and who makes room in it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvfold.errors import KVBudgetExceeded
from kvfold.exports.account import RAW_NBYTES, Geometry, batch_nbytes, table_entries
from kvfold.exports.spec import LayerSpec
from kvfold.runtime.cache.layer import PackedLayer
from kvfold.runtime.cache.pool import PagePool

Layers = Sequence[PackedLayer]


class Policy(ABC):
    """What is done as the budget of one cache fills.

    Args:
        budget: bytes that the cache may never pass; None for no limit.

    Attributes:
        keeps_pages: a page that is written stays as it is, so that caches may share it and a file
            may hold it.
        moves_pages: pages may leave the device, so that no captured step finds them.
        floor: how `need` is to be read, for messages; `stored` the same of `hold`.
    """

    keeps_pages = True
    moves_pages = False
    floor = ""
    stored = ""

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget

    # -- the contract ------------------------------------------------------------------------------

    @abstractmethod
    def need(self, layers: Layers, batch_size: int, tokens: int) -> int:
        """The least bytes that the cache takes once `tokens` columns more have come."""

    @abstractmethod
    def admit(self, layers: Layers, batch_size: int, tokens: int) -> bool:
        """Before `tokens` columns come: makes room for them.

        Returns:
            whether nothing is left to be done for the pages that come due next.
        Raises:
            KVBudgetExceeded: there is none; nothing was changed.
        """

    @abstractmethod
    def regroup(self, layers: Layers, sequences: int) -> None:
        """Before a batch is put together anew from `sequences` of its own: a layer's 16-bit rows
        and tables then stand twice.

        Raises:
            KVBudgetExceeded: they don't fit; nothing was changed.
        """

    def spare(self, layers: Layers, more: int) -> bool:
        """Sees to it that `more` bytes besides pages fit; False if that can't be."""
        return self.budget is None or self.nbytes(layers) + more <= self.budget

    def admits_together(self, layers: Layers, due: list[int]) -> bool:
        """Whether all layers may take the new pages of the sequences `due` before any of them gives
        pages back."""
        return True

    def hold(self, layers: Layers, lengths: Sequence[int], pages: int) -> int:
        """Before a cache of sequences of these lengths, of `pages` distinct pages in one layer at
        the most, is restored: makes room.

        Returns:
            the bytes that it takes; if that is more than the budget, there is no room.
        """
        return batch_nbytes(layers[0].shared.geometry, [layer.formats for layer in layers], lengths)

    def specs(self, specs: Sequence[LayerSpec]) -> list[tuple[LayerSpec, ...]]:
        """What pages of each layer may stand in, floor first; `specs`: the artifact's own."""
        return [(spec,) for spec in specs]

    def new_pool(self, layer_idx: int, sizes: list[int], device: torch.device) -> PagePool:
        """The pages of a layer; `sizes`: bytes of a page on each rung, floor first."""
        return PagePool(sizes, device)

    def begin_anew(self) -> None:  # noqa: B027 - most have nothing to forget
        """The cache forgets everything."""

    def copy(self) -> "Policy":
        """The policy of a cache that goes on from here by itself and shares pages with this
        one's."""
        return type(self)(self.budget)

    # -- bytes -------------------------------------------------------------------------------------

    @property
    def host_nbytes(self) -> int:
        """Bytes in host memory."""
        return 0

    def tensors(self) -> list[Tensor]:
        """What is resident on the device besides the layers' tensors."""
        return []

    def nbytes(self, layers: Layers) -> int:
        """Resident bytes of the cache, on the device."""
        kept = layers[0].shared.states.nbytes
        return sum(layer.nbytes for layer in layers) + kept + sum(t.nbytes for t in self.tensors())

    # -- for all policies --------------------------------------------------------------------------

    def set_budget(self, budget: int | None) -> None:
        """The budget from here on."""
        self.budget = budget

    def check(self, layers: Layers, batch_size: int, tokens: int) -> None:
        """Refuses columns that the budget has no room for; changes nothing.

        Raises:
            KVBudgetExceeded: in a sentence with the numbers.
        """
        if self.budget is None:
            return
        need = self.need(layers, batch_size, tokens)
        if need > self.budget:
            raise self.exceeded(layers, layers[0].get_seq_length() + tokens, batch_size, need)

    def exceeded(self, layers: Layers, tokens: int, batch_size: int, need: int) -> KVBudgetExceeded:
        """The error that says what did not fit."""
        g = layers[0].geometry
        rows = g.raw_rows - replace(g, rollback=0).raw_rows
        saved = rows * sum(row_nbytes(x.geometry) for x in layers) * batch_size
        way = f", load with rollback=0, which saves {saved} bytes" if saved else ""
        return KVBudgetExceeded(
            f"{tokens} tokens in {batch_size} sequence(s) need a cache of {need} bytes{self.floor}, but kv_budget is "
            f"{self.budget}; raise kv_budget{way}, shorten the prompt or make the batch smaller."
        )


def coming(layers: Layers, batch_size: int, tokens: int) -> tuple[list[int], list[int], list[int]]:
    """Pages that each sequence has, its tokens once `tokens` columns have come, and the pages that
    it takes for them."""
    first = layers[0]
    lengths = first.lengths() or [0] * batch_size
    have = first.page_counts(batch_size)
    pads = first.shared.pads(batch_size)
    total = [
        n + tokens - min(max(pad - first.columns, 0), tokens)
        for n, pad in zip(lengths, pads, strict=True)
    ]
    return (
        have,
        total,
        [max(0, first.geometry.num_pages(n) - pages) for n, pages in zip(total, have, strict=True)],
    )


def fixed_nbytes(layers: Layers, batch_size: int, pages: Sequence[int]) -> int:
    """Bytes of the cache besides pages, once sequences have so many pages more. All layers have the
    same sequences, and so the same tables."""
    first = layers[0]
    g = first.geometry
    room = table_entries(
        max(n + more for n, more in zip(first.page_counts(batch_size), pages, strict=True))
    )
    if first.is_initialized:
        room = max(room, first.table.block_table.shape[1])
    fixed = sum(
        layer.geometry.table_nbytes(room) + g.segments_nbytes(len(layer.rungs)) for layer in layers
    )
    return batch_size * (fixed + g.state_nbytes)


def pages_nbytes(layers: Layers) -> int:
    """Bytes of the pages of all layers, of which no other cache has any."""
    return sum(layer.table.pool.nbytes for layer in layers if layer.is_initialized)


def floor_nbytes(layers: Layers, batch_size: int, pages: list[int]) -> int:
    """Bytes of the cache with so many more pages a sequence and all of them on the floor."""
    total, new = fixed_nbytes(layers, batch_size, pages), sum(pages)
    for layer in layers:
        if layer.is_initialized:
            pool = layer.table.pool
            total += (new + len(pool)) * pool.sizes[0]
        else:
            floor = layer.rungs[0]
            total += new * layer.geometry.pair_nbytes(floor.key.format, floor.value.format)
    return total


def row_nbytes(geometry: Geometry) -> int:
    """Bytes of one token's 16-bit rows in one layer, keys and values."""
    return 2 * RAW_NBYTES * geometry.num_kv_heads * geometry.head_dim


def rollback_nbytes(layers: Layers, tokens: int) -> int:
    """Bytes that stand beside what is resident while 16-bit rings grow to a rollback of `tokens`
    tokens."""
    held = [layer for layer in layers if layer.is_initialized]
    g = layers[0].geometry
    rows = replace(g, rollback=tokens).raw_rows - g.raw_rows
    if not held or not rows:
        return 0
    own = [row_nbytes(layer.geometry) for layer in held]
    # one layer's old ring stands beside its new one
    return held[0].batch_size * (rows * sum(own) + g.raw_rows * max(own))


def regroup_nbytes(layers: Layers, sequences: int) -> int:
    """Bytes that stand beside what is resident while a batch is put together anew from `sequences`
    sequences."""
    own = [sum(t.nbytes for t in layer.own_tensors()) for layer in layers]
    own += [t.nbytes for t in layers[0].shared.states.tensors()]
    before = layers[0].batch_size
    after = [nbytes // before * sequences for nbytes in own]
    more = sum(after) - sum(own) if sequences > before else 0
    return more + max(map(min, own, after))
