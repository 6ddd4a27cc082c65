"""How large the states are that layers of a hybrid model keep, found out from the model's own code
before its weights are read.

One layer's mixer runs over a few tokens on the meta device, in bfloat16 and without memory, and what
it leaves in a cache of transformers' own is counted: numbers that are bfloat16 there follow the type
that a model computes in, others are float32 in any.
"""

import copy
import inspect
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from kvfold.errors import KvfoldError
from kvfold.exports.architectures import Architecture, keeps_states, text_of
from kvfold.exports.cache_model import StatesModel
from kvfold.exports.hybrids import check_transformers, state_layers
from kvfold.pretrained import model_from_config, reason_of

TOKENS = 2  # more than one, since a single token goes by another path
CACHES = ("cache_params", "past_key_values")  # what mixers call the cache that they are given


def states_of(config: Any, arch: Architecture) -> StatesModel | None:
    """What the states of one sequence consist of, in all layers together; None where no layer keeps
    any.

    Args:
        config: of the model, with the type that its weights have.
        arch: its row in the table.
    Raises:
        KvfoldError: the installed transformers is too old for hybrid models, or the config makes
            no layer that runs.
    """
    if not keeps_states(config):
        return None
    check_transformers(arch.model_type)
    dtype = str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
    text = copy.deepcopy(text_of(config))  # a model that is made notes its type there
    with torch.device("meta"):
        model: Any = model_from_config(text, dtype=torch.bfloat16)
    model.eval()
    elements = wide = 0
    layers = state_layers(text)
    first = min(layers)
    cache = DynamicCache(config=text)
    name, mixer = _mixer(arch.decoder_layers(model)[first], arch)
    hidden = torch.zeros(1, TOKENS, text.hidden_size, dtype=torch.bfloat16, device="meta")
    try:
        with torch.no_grad():
            mixer(hidden_states=hidden, attention_mask=None, **{name: cache})
    except Exception as error:  # numbers that make modules need not make them fit each other
        raise KvfoldError(
            f"Layer {first} of this '{arch.model_type}' model, which keeps a state, can't be run as config.json "
            f"describes it ({type(error).__name__}: {reason_of(error)}); give the checkpoint's own config.json."
        ) from error
    held: Any = cache.layers[first]
    for states in (held.conv_states, held.recurrent_states):
        for state in states.values():
            if state is not None and state.dtype == torch.float32:
                wide += state.numel()
            elif state is not None:
                elements += state.numel()
    return StatesModel.model_validate(
        {"elements": elements * len(layers), "float32": wide * len(layers), "dtype": dtype}
    )


def _mixer(layer: nn.Module, arch: Architecture) -> tuple[str, nn.Module]:
    """The part of a decoder layer that keeps a state, and what it calls the cache.

    Raises:
        LookupError: there is none.
    """
    for name, part in layer.named_children():
        known = inspect.signature(type(part).forward).parameters
        given = next((x for x in CACHES if x in known), None)
        attends = name == arch.attention and "cache_params" not in known
        if given is not None and not attends:
            return given, part
    raise LookupError(f"no part of a {type(layer).__name__} takes a cache")
