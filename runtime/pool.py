"""Pages of packed tokens of one layer, shared by reference count between sequences (beams, forked prompts)."""

import torch
from torch import Tensor

from kvfold.kernels.pages import page_address


class PagePool:
    """Fixed-size pages of bytes. A full page is never changed, so sequences may share it.

    A page is a tensor of its own, so that growing copies nothing and freeing returns memory; `reserve` takes many at once
    from one tensor, which stays until the pool goes.

    Args:
        page_nbytes: bytes of a page, a multiple of 16.
        device: where pages live.
    """

    def __init__(self, page_nbytes: int, device: torch.device) -> None:
        self.page_nbytes = page_nbytes
        self.device = device
        self._pages: dict[int, Tensor] = {}
        self._owners: dict[int, int] = {}
        self._free_ids: list[int] = []  # numbers of pages that were given back
        self._slab: Tensor | None = None
        self._slab_free: list[int] = []  # pages of the slab that nobody owns
        self._slab_size = 0

    def reserve(self, count: int) -> None:
        """Takes memory for `count` pages at once; only on a pool without pages."""
        assert not self._pages and self._slab is None
        self._slab = torch.empty(count, self.page_nbytes, dtype=torch.uint8, device=self.device)
        self._slab_size = count
        self._slab_free = list(range(count - 1, -1, -1))

    def allocate(self, count: int) -> list[int]:
        """`count` new pages of undefined bytes with one owner each; returns their numbers."""
        ids = []
        for _ in range(count):
            if self._slab_free:
                number = self._slab_free.pop()
                assert self._slab is not None
                self._pages[number] = self._slab[number]
            else:
                number = self._free_ids.pop() if self._free_ids else self._slab_size + self._own_pages()
                self._pages[number] = torch.empty(self.page_nbytes, dtype=torch.uint8, device=self.device)
            self._owners[number] = 1
            ids.append(number)
        return ids

    def _own_pages(self) -> int:
        """Pages that are tensors of their own."""
        return sum(number >= self._slab_size for number in self._pages) if self._slab_size else len(self._pages)

    def page(self, number: int) -> Tensor:
        """A page's bytes, uint8 [page_nbytes]."""
        return self._pages[number]

    def addresses(self, ids: list[int]) -> list[int]:
        """Block table entries of pages."""
        return [page_address(self._pages[i]) for i in ids]

    def load(self, ids: list[int]) -> Tensor:
        """uint8 [len(ids), page_nbytes], a copy of the packed bytes."""
        return torch.stack([self._pages[i] for i in ids])

    def share(self, ids: list[int]) -> None:
        """Adds one owner to each page."""
        for i in ids:
            self._owners[i] += 1

    def release(self, ids: list[int]) -> None:
        """Takes one owner off each page; a page without owners is freed."""
        for i in ids:
            self._owners[i] -= 1
            if self._owners[i] == 0:
                del self._owners[i], self._pages[i]
                (self._slab_free if i < self._slab_size else self._free_ids).append(i)

    def __len__(self) -> int:
        """Pages that have an owner."""
        return len(self._pages)

    def tensors(self) -> list[Tensor]:
        """Every resident tensor."""
        own = [page for number, page in self._pages.items() if number >= self._slab_size]
        return own if self._slab is None else [self._slab, *own]
