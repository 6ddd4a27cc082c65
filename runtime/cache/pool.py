"""Pages of packed tokens of one layer, shared by reference count between sequences (beams, forked
prompts)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.kernels.pages import page_address
from kvfold.runtime.cache.sequence import PASSED


class PagePool:
    """Pages of bytes, each of the size of its rung. A full page never changes its tokens, so
    sequences may share it.

    A page is a tensor of its own, so that growing copies nothing and moves nothing, and freeing
    returns memory.

    Args:
        page_nbytes: bytes of a page, a multiple of 16; of one on each rung, floor first, where
            pages come in several formats.
        device: where pages live.
    """

    moves = 0  # changes of pages' addresses so far

    def __init__(self, page_nbytes: int | Sequence[int], device: torch.device) -> None:
        self.sizes = (page_nbytes,) if isinstance(page_nbytes, int) else tuple(page_nbytes)
        self.counts = [0] * len(self.sizes)  # pages with an owner, by rung
        self._nbytes = 0  # of them
        self.device = device
        self._pages: dict[int, Tensor] = {}
        self._addresses: dict[int, int] = {}
        self._rungs: dict[int, int] = {}
        self._owners: dict[int, int] = {}
        self._free_ids: list[int] = []  # numbers of pages that were given back

    def duplicate(self, pages: Sequence[Sequence[int]]) -> "PagePool":
        """A pool with copies of the pages of some sequences, under the same numbers, each owned as
        often as it is listed."""
        other = PagePool(self.sizes, self.device)
        other._adopt([i for ids in pages for i in ids if i != PASSED], self)
        return other

    def _adopt(self, ids: list[int], source: "PagePool") -> None:
        """Copies another pool's pages to this one, which is empty; each has as many owners as it is
        listed times."""
        for number in ids:
            if number in self._pages:
                self._owners[number] += 1
                continue
            rung = source._rungs[number]
            self._place(number, rung, self._new(rung).copy_(source._pages[number]))
            self._owners[number] = 1
            self._count(rung, 1)
        self._free_ids = [i for i in range(max(self._pages, default=-1)) if i not in self._pages]

    @property
    def page_nbytes(self) -> int:
        """Bytes of a page on the highest rung, which new pages have unless `allocate` is told
        otherwise."""
        return self.sizes[-1]

    def allocate(self, count: int, rung: int = -1) -> list[int]:
        """`count` new pages of undefined bytes on a rung, default the highest, with one owner each;
        returns their numbers."""
        rung %= len(self.sizes)
        ids = []
        for _ in range(count):
            number = self._free_ids.pop() if self._free_ids else len(self._pages)
            self._place(number, rung, self._new(rung))
            self._owners[number] = 1
            ids.append(number)
        self._count(rung, count)
        return ids

    def _count(self, rung: int, pages: int) -> None:
        """So many pages more on a rung."""
        self.counts[rung] += pages
        self._nbytes += pages * self.sizes[rung]

    def _new(self, rung: int) -> Tensor:
        return torch.empty(self.sizes[rung], dtype=torch.uint8, device=self.device)

    def _place(self, number: int, rung: int, page: Tensor) -> None:
        self._pages[number], self._rungs[number], self._addresses[number] = (
            page,
            rung,
            page_address(page),
        )

    def page(self, number: int) -> Tensor:
        """A page's bytes, uint8 [size of its rung]."""
        return self._pages[number]

    @property
    def most(self) -> int | None:
        """New pages that may wait for their bytes together; None for any number."""
        return None

    @property
    def host_nbytes(self) -> int:
        """Bytes in host memory."""
        return 0

    def on_device(self, number: int) -> bool:
        """Whether a page is where kernels read it without `bring`."""
        return True

    def bring(self) -> None:
        """Makes all pages readable at their addresses, until another layer's are brought."""

    def written(self) -> None:
        """All pages have their bytes."""

    def rung(self, number: int) -> int:
        """The rung that a page stands on, 0 for the floor and for a page that is gone."""
        return self._rungs.get(number, 0)

    def addresses(self, ids: list[int]) -> list[int]:
        """Block table entries of pages; 0 for a page that is gone."""
        return [self._addresses.get(i, 0) for i in ids]

    def readable(self, ids: list[int]) -> list[Tensor]:
        """The bytes of pages on the device, uint8 [page size] each, until other pages are asked
        for."""
        return [self._pages[i] for i in ids]

    def load(self, ids: list[int]) -> Tensor:
        """uint8 [len(ids), page size], a copy of the packed bytes of pages of one rung."""
        return torch.stack(self.readable(ids))

    def lower(self, ids: list[int], to: int) -> tuple[list[Tensor], list[Tensor]]:
        """Takes memory on a lower rung for pages of one rung. The numbers stay, and so do the
        owners.

        Returns:
            (old, new): the bytes as they were, freed when the caller lets go of them, and the
            undefined bytes that replace them.
        """
        old, rung = [self._pages[i] for i in ids], self._rungs[ids[0]]
        assert 0 <= to < rung and all(self._rungs[i] == rung for i in ids)
        new = [self._new(to) for _ in ids]  # all of them before any page is replaced
        for i, page in zip(ids, new, strict=True):
            self._place(i, to, page)
        self._count(rung, -len(ids))
        self._count(to, len(ids))
        return old, new

    def share(self, ids: list[int]) -> None:
        """Adds one owner to each page."""
        for i in ids:
            self._owners[i] += 1

    def release(self, ids: list[int]) -> None:
        """Takes one owner off each page; a page without owners is freed."""
        for i in ids:
            self._owners[i] -= 1
            if self._owners[i] == 0:
                del self._owners[i], self._pages[i], self._addresses[i]
                self._count(self._rungs.pop(i), -1)
                self._free_ids.append(i)

    def __len__(self) -> int:
        """Pages that have an owner."""
        return len(self._pages)

    @property
    def nbytes(self) -> int:
        """Resident bytes, as counted: what `tensors` add up to."""
        return self._nbytes

    def tensors(self) -> list[Tensor]:
        """Every resident tensor."""
        return list(self._pages.values())
