"""What the layers of one cache share."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.runtime.backends.base import Workspace
from kvfold.runtime.cache.nan_check import NanMarks
from kvfold.runtime.cache.sequence import Clock
from kvfold.runtime.cache.states import States
from kvfold.runtime.calls.masks import read_columns, settle

log = logging.getLogger("kvfold")


def say(key: str, message: str, *args: Any) -> None:
    """A warning of a cache that belongs to no model."""
    log.warning(message, *args)


class SharedState:
    """State of a cache that all its layers read.

    Args:
        geometry: sinks, window, page size and head shape.
        padding: left padding of each sequence, in columns.
        batch_invariant: kernels divide a sequence's pages by its own length alone, not by the
            batch's.
        states: of the layers of a hybrid model; none by default.

    Attributes:
        plain: the current call's mask hides left padding, the future and what lies behind a sliding
            window, and nothing else: what kernels know. Other calls are the reference's.
        clock: decoding steps that the host has prepared for all layers at once
            (runtime.generate.steps).
        stepping: such a step is being run, or captured: layers leave their host's state alone.
        marks: of keys and values that are NaN or infinite.
        workspace: buffers of the backend.
    """

    def __init__(
        self,
        geometry: Geometry,
        padding: list[int] | None = None,
        batch_invariant: bool = False,
        states: States | None = None,
    ) -> None:
        self.geometry, self.padding, self.batch_invariant = geometry, padding or [], batch_invariant
        self.states = States() if states is None else states
        self.plain, self.stepping = True, False
        self.clock, self.marks, self.workspace = Clock(), NanMarks(), Workspace()

    def pads(self, batch_size: int) -> list[int]:
        """The left padding of each of `batch_size` sequences."""
        return self.padding or [0] * batch_size

    def set_padding(self, padding: list[int]) -> None:
        """The left padding from here on."""
        self.padding = padding

    def set_plain(self, plain: bool) -> None:
        """Whether kernels can read the current call's mask."""
        self.plain = plain

    def note_padding(
        self, mask: Tensor | None, batch_size: int, seen: int, tokens: int | None
    ) -> None:
        """See QuantizedKVCache.note_padding; `seen`: columns of the cache."""
        if len(self.padding) != batch_size:
            self.padding = [0] * batch_size
        if mask is None:
            self.padding, self.plain = self.padding if seen else [0] * batch_size, True
            return
        if len(mask) != batch_size:
            raise KvfoldError(
                f"attention_mask is of {len(mask)} sequence(s), but this call has {batch_size}; give it a row for each."
            )
        columns = read_columns(mask, mask.shape[1] if tokens is None else seen + tokens)
        self.padding, self.plain = settle(columns, self.padding, seen)

    def positions(self, seen: int, tokens: int, device: torch.device) -> Tensor:
        """Positions int64 [B, tokens] of the tokens after `seen` columns, counted from each
        sequence's first real one."""
        columns = torch.arange(tokens, device=device) + seen
        return (columns - torch.tensor(self.padding, device=device)[:, None]).clamp_min(0)

    def extend_rollback(self, tokens: int) -> None:
        """Crops of up to `tokens` tokens will be exact."""
        self.geometry = replace(self.geometry, rollback=tokens)

    def copy(self) -> "SharedState":
        """That of a cache that goes on from here by itself, with buffers of its own."""
        states = self.states.copy()
        other = SharedState(self.geometry, list(self.padding), self.batch_invariant, states)
        other.set_plain(self.plain)
        return other

    @contextmanager
    def step(self) -> Iterator[None]:
        """Layers leave their host's state alone while this lasts."""
        self.stepping = True
        try:
            yield
        finally:
            self.stepping = False
