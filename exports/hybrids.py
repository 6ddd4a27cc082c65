"""Hybrid models: some layers attend, and so have keys and values to be packed; some keep a state of
fixed size instead, a recurrent one or the last inputs of a convolution; some do both, or neither.

`layer_types` of a config says which, in the words that transformers' own caches go by.
"""

from dataclasses import dataclass
from typing import Any

ATTEND = {"full_attention", "sliding_attention", "hybrid", "hybrid_sliding"}
KEEP_STATE = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}


@dataclass(frozen=True)
class Hybrid:
    """What the layers of a hybrid model have, by their numbers.

    Attributes:
        attending: those with keys and values, in order.
        states: those that keep a state → how many of each kind.
        continues: a call of several tokens goes on from the states that are there.
    """

    attending: tuple[int, ...]
    states: dict[int, int]
    continues: bool = True


def attending_layers(config: Any, hybrid: bool) -> tuple[int, ...]:
    """Numbers of the layers that attend.

    Args:
        config: of the language model.
        hybrid: whether its family's layer_types say so; else all layers attend.
    """
    if not hybrid:
        return tuple(range(config.num_hidden_layers))
    return tuple(i for i, kind in enumerate(config.layer_types) if kind in ATTEND)


def state_layers(config: Any) -> dict[int, int]:
    """Of a hybrid language model: number of each layer that keeps a state → how many it keeps of
    each kind."""
    count = getattr(config, "number_of_conv_states", 1)
    return {i: count for i, kind in enumerate(config.layer_types) if kind in KEEP_STATE}
