"""The offload policy: as the budget, then of bytes on the device, fills, the oldest pages go to
host memory, packed as they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.runtime.budget.base import Layers, Policy, coming, fixed_nbytes, regroup_nbytes
from kvfold.runtime.cache.pager import Pager, PagingPool
from kvfold.runtime.cache.pool import PagePool


class Offload(Policy):
    """Moves pages to host memory.

    Args:
        budget: bytes on the device that the cache may never pass.
        pager: moves them; shared by the caches that share pages.
    """

    moves_pages = True
    floor = stored = " on the device, with all pages in host memory"

    def __init__(self, budget: int, pager: Pager) -> None:
        super().__init__(budget)
        self.pager = pager

    @property
    def limit(self) -> int:
        """The budget, of which this policy always has one."""
        assert self.budget is not None
        return self.budget

    def new_pool(self, layer_idx: int, sizes: list[int], device: torch.device) -> PagePool:
        return PagingPool(sizes[0], device, self.pager, layer_idx)

    def begin_anew(self) -> None:
        """Forks go on with the old pager."""
        self.pager.leave(self)
        self.pager = self.pager.new()

    def copy(self) -> Policy:
        other = Offload(self.limit, self.pager)
        self.pager.join(other, self)
        return other

    @property
    def host_nbytes(self) -> int:
        return self.pager.host_nbytes

    def tensors(self) -> list[Tensor]:
        return self.pager.tensors()

    def need(self, layers: Layers, batch_size: int, tokens: int) -> int:
        due = coming(layers, batch_size, tokens)[2]
        fixed = fixed_nbytes(layers, batch_size, due)
        waiting = (
            sum(due) if tokens == 1 else min(1, sum(due))
        )  # the kernel of a step fills all pages at once
        return self.pager.most_fixed(self, fixed) + self.pager.needed(sum(due), waiting)

    def admit(self, layers: Layers, batch_size: int, tokens: int) -> bool:
        self.check(layers, batch_size, tokens)
        due = coming(layers, batch_size, tokens)[2]
        fixed = fixed_nbytes(layers, batch_size, due)
        self.pager.admit(self, fixed, self.limit, sum(due))
        return True

    def regroup(self, layers: Layers, sequences: int) -> None:
        if not layers[0].is_initialized:
            return
        peak = regroup_nbytes(layers, sequences)
        if not self._push_out(layers, peak) and sequences > layers[0].batch_size:
            raise self.exceeded(
                layers, layers[0].get_seq_length(), sequences, self.nbytes(layers) + peak
            )

    def spare(self, layers: Layers, more: int) -> bool:
        return super().spare(layers, more) or self._push_out(layers, more)

    def hold(self, layers: Layers, lengths: Sequence[int], pages: int) -> int:
        g = layers[0].shared.geometry
        fixed = len(lengths) * g.all_fixed_nbytes(max(lengths), len(layers))
        need = fixed + self.pager.needed(pages, min(1, pages))
        if need <= self.limit:
            self.pager.admit(self, fixed, self.limit, pages)
        return need

    def _push_out(self, layers: Layers, nbytes: int) -> bool:
        """Moves pages to host memory until the cache has `nbytes` left in its budget; False if that
        can't be."""
        fixed = layers[0].shared.states.nbytes + sum(
            t.nbytes for layer in layers if layer.is_initialized for t in layer.own_tensors()
        )
        self.pager.reserve(self, fixed, self.limit)
        return self.pager.spare(nbytes)
