"""Hybrid models: some layers attend, and so have keys and values to be packed; some keep a state of
fixed size instead, a recurrent one or the last inputs of a convolution; some do both, or neither.

`layer_types` of a config says which, in the words that transformers' own caches go by.
"""

from dataclasses import dataclass
from typing import Any

from kvfold.errors import KvfoldError

ATTEND = {"full_attention", "sliding_attention", "hybrid", "hybrid_sliding"}
REUSE = "reuse"  # of config.kv_sharing_modes: the layer reads keys and values of an earlier one
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


def check_transformers(family: str) -> None:
    """Refuses a hybrid family where the installed transformers hands out states otherwise than by
    asking the cache for them.

    Raises:
        KvfoldError: it is older than 5.21.
    """
    import transformers
    from transformers.cache_utils import Cache

    if not hasattr(Cache, "get_conv_state"):
        raise KvfoldError(
            f"Layers of a '{family}' model keep states, which transformers asks a cache for from 5.21 on, but "
            f"{transformers.__version__} is installed; install a newer one."
        )


def attending_layers(config: Any, hybrid: bool) -> tuple[int, ...]:
    """Numbers of the layers that attend with keys and values of their own.

    Args:
        config: of the language model.
        hybrid: whether its family's layer_types say so; else all layers attend.
    """
    if not hybrid:
        modes = getattr(config, "kv_sharing_modes", None) or [None] * config.num_hidden_layers
        return tuple(i for i, mode in enumerate(modes) if mode != REUSE)
    return tuple(i for i, kind in enumerate(config.layer_types or ()) if kind in ATTEND)


def readers(config: Any, hybrid: bool) -> dict[int, tuple[int, ...]]:
    """Number of each layer that attends with keys and values of its own → numbers of the later
    layers that read the same: the last one of their own type.

    Args:
        config, hybrid: as in `attending_layers`.
    """
    found: dict[int, tuple[int, ...]] = dict.fromkeys(attending_layers(config, hybrid), ())
    if hybrid or len(found) == config.num_hidden_layers:
        return found
    types = config.layer_types
    for layer in sorted(set(range(config.num_hidden_layers)) - set(found)):
        source = max(i for i in found if types[i] == types[layer])
        found[source] += (layer,)
    return found


def state_layers(config: Any) -> dict[int, int]:
    """Of a hybrid language model: number of each layer that keeps a state → how many it keeps of
    each kind."""
    count = getattr(config, "number_of_conv_states", 1)
    return {i: count for i, kind in enumerate(config.layer_types or ()) if kind in KEEP_STATE}
