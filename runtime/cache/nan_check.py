"""Keys and values that are NaN or infinite in a decoding step. A kernel can't raise, so the one
that appends a row notes the first bad (token, layer, key or value) of each sequence in a tensor on
the device, and the host reads these marks before a page is packed.

A row is packed no sooner than a window after it came, so what is marked is reported before it
reaches a page. Only without a window a page ends with the row of its own step: there the host looks
once more, before the next step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvfold.exports.account import Geometry
from kvfold.runtime.cache.upload import on_device

# steps before a page that the host asks for the marks, so that they are there when it needs them
LEAD = 2


class Bad(NamedTuple):
    """A key or value that is not finite."""

    sequence: int
    token: int  # of the sequence, from its first real one
    layer: int
    name: str  # "key" or "value"


class _Asked(NamedTuple):
    """A copy of the marks on its way to the host."""

    columns: int  # whose marks it has
    host: Tensor
    event: torch.cuda.Event | None  # its end


class NanMarks:
    """The marks of a cache, for all its layers. Like a workspace, no part of what is cached."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        self._asked: _Asked | None = None

    def on(self, batch_size: int, device: torch.device) -> Tensor:
        """The marks int64 [B]; they stay where they are, as a CUDA graph needs."""
        from kvfold.runtime.backends.triton import empty_marks

        if self.tensor is None or len(self.tensor) != batch_size:
            self._asked = None
            self.tensor = empty_marks(batch_size, device)
        return self.tensor

    def clear(self) -> None:
        """Forgets all marks."""
        self.tensor, self._asked = None, None

    def lead(self, geometry: Geometry) -> int:
        """Steps before a page at which the marks are asked for; 0: they are read when the page is
        due."""
        assert self.tensor is not None
        return min(geometry.window, LEAD) if self.tensor.device.type == "cuda" else 0

    def before_packing(
        self, geometry: Geometry, lengths: Sequence[int], tokens: int, columns: int
    ) -> list[Bad]:
        """Sees to it that the host knows the marks of what the next `tokens` columns pack, and
        returns what is marked.

        On a GPU it asks for them some steps before a page is due, if the window is that long, and
        reads the answer when the page is due: by then the steps that it waits for are done. Without
        a window, and before a chunk, it is a `look`.

        Args:
            lengths: tokens of each sequence so far.
            columns: of the cache so far.
        """
        if self.tensor is None:
            return []
        g = geometry
        due = any(g.num_pages(n + tokens) > g.num_pages(n) for n in lengths)
        ahead = self.lead(g) if tokens == 1 else 0
        if ahead and due:
            return self._answer(g, columns)
        if ahead:
            soon = any(g.num_pages(n + 1 + ahead) > g.num_pages(n) for n in lengths)
            if soon and not self._asked_within(columns, ahead):
                self._ask(columns)
            return []
        ended = g.window == 0 and any(g.num_pages(n) > g.num_pages(max(0, n - 1)) for n in lengths)
        return self.look() if tokens > 1 or due or ended else []

    def asked_before(self, geometry: Geometry, steps: int, columns: int) -> int:
        """Of a page that comes due with the `steps`-th step from here: the number of the step
        before which the host looks or asks."""
        if self.tensor is None:
            return steps
        ahead = self.lead(geometry)
        if not ahead or (steps <= ahead and self._asked_within(columns, ahead)):
            return steps
        return max(1, steps - ahead)

    def look(self) -> list[Bad]:
        """Waits for the device and returns what is marked in all steps so far."""
        return [] if self.tensor is None else self._read(self.tensor)

    def _asked_within(self, columns: int, steps: int) -> bool:
        return self._asked is not None and 0 <= columns - self._asked.columns <= steps

    def _ask(self, columns: int) -> None:
        """Starts a copy of the marks of all columns so far to the host."""
        assert self.tensor is not None
        host, event = self.tensor.clone(), None
        if self.tensor.device.type == "cuda":
            host = torch.empty(len(self.tensor), dtype=torch.int64, pin_memory=True)
            host.copy_(self.tensor, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._asked = _Asked(columns, host, event)

    def _answer(self, geometry: Geometry, columns: int) -> list[Bad]:
        """Reads the copy, waiting for no step later than it; `look` if there is none, or one from
        before a row that is packed now."""
        asked = self._asked
        if asked is None or not 0 <= columns + 1 - asked.columns <= geometry.window:
            return self.look()
        if asked.event is not None:
            asked.event.synchronize()
        return self._read(asked.host)

    def _read(self, marks: Tensor) -> list[Bad]:
        from kvfold.runtime.backends.triton import UNMARKED, read_mark

        return [
            Bad(b, *read_mark(mark)) for b, mark in enumerate(marks.tolist()) if mark != UNMARKED
        ]

    def unmark(self, lengths: Sequence[int]) -> None:
        """After a crop to these lengths: marks of tokens that are gone go with them, without a
        wait."""
        self._asked = None
        if self.tensor is None or not lengths:
            return
        from kvfold.runtime.backends.triton import LABELS, UNMARKED

        ends = on_device([n * LABELS.value for n in lengths], torch.int64, self.tensor.device)
        self.tensor.masked_fill_(self.tensor >= ends, UNMARKED)


def check_finite(
    layer_idx: int, keys: Tensor, values: Tensor, columns: int, skips: Sequence[int]
) -> None:
    """Refuses keys and values [B, num_kv_heads, T, head_dim] that are about to be stored.

    Args:
        columns: of the cache before them.
        skips: leading columns of each sequence that are padding, which may hold anything.
    Raises:
        FloatingPointError: one is NaN or infinite.
    """
    for name, states in (("key", keys), ("value", values)):
        if bool(torch.isfinite(states).all()):
            continue
        for b, skip in enumerate(skips):
            bad = (~torch.isfinite(states[b, :, skip:])).any(-1).any(0).nonzero()
            if len(bad):
                raise not_finite(layer_idx, name, columns + skip + int(bad[0]), b)


def not_finite(
    layer_idx: int, name: str, position: int, sequence: int, end: str = ""
) -> FloatingPointError:
    """The error of a key or value, at a column, that is not finite."""
    return FloatingPointError(
        f"Layer {layer_idx} computed a {name} that is NaN or infinite at position {position} of sequence {sequence}; "
        + (end or "it was not cached.")
    )
