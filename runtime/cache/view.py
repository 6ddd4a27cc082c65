"""The handles that a layer of the packed cache gives transformers in place of keys and values; the
attention function hands them back."""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from kvfold.runtime.backends.base import LogitOptions, RowView


class Attends(Protocol):
    """The layer behind a handle."""

    def attend(
        self,
        rows: list[RowView],
        query: Tensor,
        scaling: float,
        options: LogitOptions,
        mask: Tensor | None,
    ) -> Tensor:
        """Attention over what was stored."""

    def append_and_attend(
        self, keys: Tensor, values: Tensor, query: Tensor, scaling: float, options: LogitOptions
    ) -> Tensor:
        """Stores a deferred step and attends."""


@dataclass
class LayerView:
    """A handle. `dtype`, `device` and `shape` answer what model code may ask of a key tensor.

    Attributes:
        layer: that attends.
        sources: keys and values whose gradients somebody may ask for.
    """

    layer: Attends
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    sources: tuple[Tensor, ...] = ()

    def with_sources(self, sources: tuple[Tensor, ...]) -> Self:
        """The same handle, with these sources."""
        return replace(self, sources=sources) if sources else self

    def attend(
        self,
        query: Tensor,
        scaling: float,
        mask: Tensor | None,
        softcap: float | None = None,
        sinks_logit: Tensor | None = None,
        sliding: int = 0,
    ) -> Tensor:
        """Attention of query [B, num_heads, T, head_dim] → the same shape, float32 or the query's
        own type.

        Args:
            mask: bool [B, 1, T, columns] or None for plain causal over what is not padding.
            softcap, sinks_logit: as in kernels.attention.attend.
            sliding: tokens that a query sees at the most, 0 for all; the mask says so too, kernels
                go by this.
        """
        raise NotImplementedError


@dataclass
class StoredView(LayerView):
    """The handle of a call whose keys and values are stored; `rows`: what each sequence's queries
    read."""

    rows: list[RowView] | None = None

    def attend(self, query, scaling, mask, softcap=None, sinks_logit=None, sliding=0) -> Tensor:
        assert self.rows is not None
        return self.layer.attend(
            self.rows, query, scaling, LogitOptions(softcap, sinks_logit, sliding), mask
        )


@dataclass
class DeferredView(LayerView):
    """The handle of a decoding step that is stored when it attends; `new`: its keys and values [B,
    num_kv_heads, 1, head_dim]."""

    new: tuple[Tensor, Tensor] | None = None

    def attend(self, query, scaling, mask, softcap=None, sinks_logit=None, sliding=0) -> Tensor:
        assert self.new is not None
        return self.layer.append_and_attend(
            *self.new, query, scaling, LogitOptions(softcap, sinks_logit, sliding)
        )
