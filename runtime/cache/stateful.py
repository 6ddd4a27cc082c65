"""The part of a packed cache that transformers asks for the states of a hybrid model's layers, by
the model's own numbers of layers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from kvfold.exports.hybrids import Hybrid
from kvfold.runtime.cache.shared import SharedState
from kvfold.runtime.cache.states import States


class KeepsStates(Cache):
    """A cache whose `layers` are those that attend, and whose other layers keep states.

    Attributes:
        places: number of each layer that attends among the model's → its place in `layers`; None
            where all attend.
        shared: by all layers, with the states.
    """

    places: Mapping[int, int] | None
    shared: SharedState

    def place_of(self, layer_idx: int) -> int:
        """Where the model's layer `layer_idx` stands in `layers`."""
        return layer_idx if self.places is None else self.places[layer_idx]

    @property
    def states(self) -> States:
        """The states of layers that keep some, as transformers keeps them."""
        return self.shared.states

    @property
    def is_croppable(self) -> bool:
        return not self.states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get(layer_idx, "conv_states", state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get(layer_idx, "recurrent_states", state_idx)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        return self.states.of(layer_idx).update_conv_state(conv_states, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        layer = self.states.of(layer_idx)
        return layer.update_recurrent_state(recurrent_states, state_idx, **kwargs)

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        layers = self.states.layers
        held = layers[max(layers) if layer_idx is None else layer_idx].has_previous_state
        return all(held.values()) if state_idx is None else held[state_idx]

    def is_recording_past(self, layer_idx: int) -> bool:
        return False  # nothing is taken back


def places_of(hybrid: Hybrid | None) -> dict[int, int] | None:
    """`KeepsStates.places` of a model."""
    return None if hybrid is None else {layer: i for i, layer in enumerate(hybrid.attending)}
