"""Small numbers on their way to the device, from pinned memory, so that the host never waits for
it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(numbers: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, nested as for torch.tensor, as a tensor on the device."""
    pinned = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


class Upload:
    """Collects what several tensors on a device are to hold, and sends it in one copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._news: dict[torch.dtype, tuple[list[Tensor], list[list[int]]]] = {
            dtype: ([], []) for dtype in (torch.int64, torch.int32)
        }

    def add(self, target: Tensor, numbers: list[int]) -> None:
        """`target`, int64 or int32 of one dimension, will hold these numbers; of int32 none is
        negative."""
        targets, values = self._news[target.dtype]
        targets.append(target)
        values.append(numbers)

    def send(self) -> None:
        """Does so, in the order of the device's stream."""
        wide, narrow = ([x for row in rows for x in row] for _, rows in self._news.values())
        if not wide and not narrow:
            return
        halves = [*narrow, 0] if len(narrow) % 2 else narrow
        words = [low | high << 32 for low, high in zip(halves[::2], halves[1::2], strict=True)]
        there = on_device([*wide, *words], torch.int64, self.device)
        parts = there[: len(wide)], there[len(wide) :].view(torch.int32)[: len(narrow)]
        for (targets, rows), part in zip(self._news.values(), parts, strict=True):
            if targets:
                torch._foreach_copy_(targets, list(part.split([len(row) for row in rows])))
                targets.clear()
                rows.clear()
