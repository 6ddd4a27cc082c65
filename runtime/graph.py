"""Decoding by replaying one captured step: Python launches one graph a token instead of a thousand kernels.

Everything that changes from step to step lives on the device: the token, the sequences' lengths (which are also the
positions), the block tables. The first step of a cache runs as usual and so compiles what must be compiled; the second is
captured. Both with the model's small operations compiled.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvfold.runtime.cache import QuantizedKVCache
from kvfold.runtime.fused import fused
from kvfold.runtime.marks import look_before_packing


class DecodingStep:
    """One step of a model on one cache, captured, with its small operations compiled; one such step must have been run before.

    Args:
        model: from load_pretrained.
        forward: its own.
        cache: with reserved memory; it must not move any tensor afterwards.
        batch_size: sequences.
    """

    def __init__(self, model: Any, forward: Callable[..., Any], cache: QuantizedKVCache, batch_size: int) -> None:
        device = cache.layers[0].device
        self.ids = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.graph = torch.cuda.CUDAGraph()
        layers = cache.layers
        before = [(x.columns, list(x.length), [list(p) for p in x.pages], [list(p) for p in x.spare]) for x in layers]
        torch.cuda.synchronize(device)
        with fused(model), torch.cuda.graph(self.graph):
            positions = layers[0].state[:, :1].long()
            self.logits = forward(
                input_ids=self.ids, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits
        for layer, (columns, length, pages, spare) in zip(layers, before, strict=True):  # capturing ran nothing
            layer.columns, layer.length, layer.pages, layer.spare = columns, length, pages, spare

    def __call__(self, ids: Tensor, cache: QuantizedKVCache) -> Tensor:
        """Appends ids [B, 1] and returns the logits [B, 1, vocab_size], valid until the next call.

        Raises:
            FloatingPointError: an earlier step had a key or value that is NaN or infinite, and this one would pack a page.
        """
        look_before_packing(cache, 1)  # what `update` does in a step that Python runs
        self.ids.copy_(ids)
        self.graph.replay()
        cache.advance(1)
        return self.logits


def graphed(model: Any) -> Callable[..., Any]:
    """The `forward` of a model that replays a captured step where it can: one token a sequence, on a cache with room."""
    forward = model.forward

    def step(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        ids = kwargs.get("input_ids", args[0] if args else None)
        wanted = (
            kwargs.get("output_hidden_states") or kwargs.get("output_attentions") or kwargs.get("labels") is not None
        )
        if wanted or not isinstance(cache, QuantizedKVCache) or ids is None or ids.shape[1] != 1 or cache.room < 1:
            return forward(*args, **kwargs)
        if cache.graph is None:
            cache.graph = "next"
            with fused(model):
                return forward(*args, **kwargs)
        if cache.graph == "next":
            cache.graph = DecodingStep(model, forward, cache, ids.shape[0])
        logits = cache.graph(ids, cache).clone()
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    return step
