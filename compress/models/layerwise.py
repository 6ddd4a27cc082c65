"""Runs a model one decoder layer at a time, so that one layer's activations are in memory."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kvfold.exports.architectures import Architecture


class LayerRunner:
    """Holds what every decoder layer is called with besides its hidden states (positions, rotary
    tables, masks).

    Args:
        model: causal LM in eval mode.
        arch: its row in the table.
        input_ids: int64 [B, T].
        positions: int64 [B, T] for RoPE; default: 0, 1, 2, ….
    """

    def __init__(
        self, model: Any, arch: Architecture, input_ids: Tensor, positions: Tensor | None = None
    ) -> None:
        self.layers = arch.decoder_layers(model)
        self.embedded, self._calls = self._record(model, arch, input_ids, positions)

    def _record(
        self, model: Any, arch: Architecture, input_ids: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, list[tuple[tuple, dict]]]:
        """One pass in which each layer only notes its arguments and hands its input on."""
        first: list[Tensor] = []
        calls: list[tuple[tuple, dict]] = []

        def note(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not first:
                first.append(hidden_states)
            calls.append((args, kwargs))
            return (hidden_states, None) if arch.gives_tuples else hidden_states

        saved: list[tuple[nn.Module, Callable | None]] = [
            (layer, layer.__dict__.get("forward")) for layer in self.layers
        ]
        try:
            for layer in self.layers:
                layer.forward = note
            arch.language_model(model)(input_ids=input_ids, position_ids=positions, use_cache=False)
        finally:
            for layer, forward in saved:
                del layer.forward
                if forward is not None:
                    layer.forward = forward
        return first[0], calls

    def run(self, index: int, hidden_states: Tensor, first: int = 0) -> Tensor:
        """Layer `index` on hidden states [B, T − first, hidden_size] of the positions from `first`
        on → the next layer's.

        With first > 0 the layer's attention must be tapped by what knows the keys and values
        before.
        """
        args, kwargs = self._calls[index]
        if first:
            tokens = self.embedded.shape[1]
            args = tuple(_from(x, first, tokens) for x in args)
            kwargs = {name: _from(x, first, tokens) for name, x in kwargs.items()}
        out = self.layers[index](hidden_states, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def run_from(self, index: int, hidden_states: Tensor, first: int = 0) -> Tensor:
        """Layers `index` and after it, as `run`."""
        for i in range(index, len(self.layers)):
            hidden_states = self.run(i, hidden_states, first)
        return hidden_states


def _from(given: Any, first: int, tokens: int) -> Any:
    """What a layer is called with, of the positions from `first` on: rows of masks [B, 1, T, T],
    rotary tables and positions [B, T, …], positions [T]; anything else as it is."""
    if isinstance(given, tuple):
        return tuple(_from(x, first, tokens) for x in given)
    if not isinstance(given, Tensor):
        return given
    if given.dim() == 4 and given.shape[2] == tokens:
        return given[:, :, first:]
    if given.dim() > 1 and given.shape[1] == tokens:
        return given[:, first:]
    return given[first:] if given.dim() == 1 and len(given) == tokens else given
