"""Pages of packed tokens of one layer, shared by reference count between sequences (beams, forked prompts)."""

import torch
from torch import Tensor


class PagePool:
    """Fixed-size pages of bytes. A page is written once and never changed, so sequences may share it.

    Args:
        page_nbytes: bytes of a page.
        device: where pages live.
    """

    def __init__(self, page_nbytes: int, device: torch.device) -> None:
        self.page_nbytes = page_nbytes
        self.device = device
        self._pages: dict[int, Tensor] = {}
        self._owners: dict[int, int] = {}
        self._free_ids: list[int] = []

    def store(self, pages: Tensor) -> list[int]:
        """Takes uint8 [n, page_nbytes] in, one owner each, and returns the n page ids."""
        ids = []
        for page in pages:
            page_id = self._free_ids.pop() if self._free_ids else len(self._pages)
            self._pages[page_id] = page.clone()
            self._owners[page_id] = 1
            ids.append(page_id)
        return ids

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
                self._free_ids.append(i)

    def tensors(self) -> list[Tensor]:
        """Every resident tensor."""
        return list(self._pages.values())
