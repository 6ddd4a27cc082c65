"""The states that layers of a hybrid model keep: recurrent ones, and the last inputs of
convolutions, of fixed size each, as transformers keeps them.

A layer's code changes its states in place, some of them without asking the cache. So nothing can go
back: what a call has done to them stays, and a call that ends half way leaves states that no longer
fit the keys and values (`begin`).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from kvfold.errors import KvfoldError
from kvfold.exports.hybrids import Hybrid
from kvfold.runtime.cache.ambient import neutral, no_gradient

Kept = tuple[int, str, int]  # layer, "conv_states" or "recurrent_states", number among its layer's


class StateLayer(LinearAttentionLayer):
    """One layer's states, free of the mode of whoever fills them (runtime/cache/ambient.py)."""

    def lazy_initialization(self, *args, **kwargs) -> None:
        with neutral():
            super().lazy_initialization(*args, **kwargs)

    def update_conv_state(
        self,
        conv_states: Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs,
    ) -> Tensor:
        with neutral():
            full = super().update_conv_state(
                conv_states.detach(), state_idx, conv_kernel_size, **kwargs
            )
        return no_gradient(full, conv_states)

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **kwargs
    ) -> Tensor:
        with neutral():
            held = super().update_recurrent_state(recurrent_states.detach(), state_idx, **kwargs)
        return no_gradient(held, recurrent_states)


class States:
    """The states of all layers of one cache.

    Args:
        hybrid: which layers of the model attend and keep states; None where all attend.

    Attributes:
        counts: number of each layer that keeps some → how many of each kind.
    """

    def __init__(self, hybrid: Hybrid | None = None) -> None:
        self.hybrid = hybrid
        self.counts = {} if hybrid is None else hybrid.states
        self._open = self._moved = False  # a call runs; it has asked for states
        self.reset()

    def __bool__(self) -> bool:
        """Whether the model has layers that keep states."""
        return bool(self.counts)

    def number_of(self, place: int) -> int:
        """The model's number of the layer that is the `place`-th of those that attend, from 0."""
        return place if self.hybrid is None else self.hybrid.attending[place]

    def of(self, layer: int) -> StateLayer:
        """One layer's states, for its code to change.

        Raises:
            KeyError: the layer keeps none.
        """
        self._moved = True
        return self.layers[layer]

    def get(self, layer: int, kind: str, index: int) -> Tensor | None:
        """A state, to be changed in place, or None before the first call; `kind`: "conv_states" or
        "recurrent_states"."""
        held = self.of(layer)
        if not held.has_previous_state[index]:
            return None
        state = getattr(held, kind)[index]
        return None if state is None else state.detach()  # writing to it is nothing for autograd

    # -- calls -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Before a call of the model.

        Raises:
            KvfoldError: the call before has failed once states had moved on.
        """
        self.check()
        self._open, self._moved = True, False

    def check(self) -> None:
        """Raises KvfoldError if states have moved on without their keys and values."""
        if self._open and self._moved and self:
            raise KvfoldError(
                f"A call that failed had already changed the states that {len(self.counts)} layers of this model "
                "keep, and they can't go back; reset() the cache or take a new one."
            )

    def end(self) -> None:
        """After a call that went through."""
        self._open = False

    def spoil(self) -> None:
        """Keys and values have gone back without the states."""
        self._open = self._moved = bool(self)

    def refuse(self, what: str, fix: str) -> None:
        """Refuses what would take tokens back.

        Args:
            what: that is asked for, e.g. "crop(-3)".
            fix: what to do instead.
        Raises:
            KvfoldError: the model has layers that keep states.
        """
        if self:
            raise KvfoldError(
                f"{what} takes tokens back, but {len(self.counts)} layers of this model keep a state, which no token "
                f"can be taken out of; {fix}."
            )

    # -- whole sequences ---------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """Every state, of whole batches."""
        return [tensor for _, tensor in self.kept()]

    def kept(self) -> list[tuple[Kept, Tensor]]:
        """Every state [B, …] with its name."""
        return [
            ((i, kind, j), tensor)
            for i, layer in self.layers.items()
            for kind, held in (
                ("conv_states", layer.conv_states),
                ("recurrent_states", layer.recurrent_states),
            )
            for j, tensor in held.items()
            if tensor is not None
        ]

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def select(self, chosen: Sequence[int]) -> None:
        """Keeps the sequences `chosen`, in that order; one may repeat."""
        for (i, kind, j), tensor in self.kept():
            index = torch.tensor(list(chosen), device=tensor.device)
            getattr(self.layers[i], kind)[j] = tensor.index_select(0, index)

    def restore(self, kept: Mapping[Kept, Tensor]) -> None:
        """Fills new states with what `kept` gave, tensors on the device that the layers run on."""
        for (i, kind, j), tensor in kept.items():
            layer = self.layers[i]
            if kind == "conv_states":
                layer.update_conv_state(tensor, j)
            else:
                layer.update_recurrent_state(tensor, j)

    def copy(self) -> "States":
        """The same for a cache that goes on from here by itself."""
        other = States(self.hybrid)
        other._open, other._moved = self._open, self._moved
        for i, layer in self.layers.items():
            twin = other.layers[i]
            for name, value in vars(layer).items():
                setattr(twin, name, dict(value) if isinstance(value, dict) else value)
        for (i, kind, j), tensor in self.kept():
            getattr(other.layers[i], kind)[j] = tensor.clone()
        return other

    def reset(self) -> None:
        """Forgets everything and frees it."""
        self.layers = {i: StateLayer(number_of_states=n) for i, n in self.counts.items()}
        self._open = self._moved = False
