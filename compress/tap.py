"""Reads or replaces what a layer's attention computes: a tap is called in place of the attention function."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kvfold-tap"  # load a model with this attention to tap it

# (module, query [B,H,T,D], key [B,Hkv,T,D], value [B,Hkv,T,D], mask, scaling) → [B,T,H,D], or None to go on as usual
Tap = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None, float], Tensor | None]


def _forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    tap = getattr(module, "kvfold_tap", None)
    if tap is not None:
        out = tap(module, query, key, value, attention_mask, scaling)
        if out is not None:
            return out, None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def tapped(attention: nn.Module, tap: Tap) -> Iterator[None]:
    """Taps one attention module of a model loaded with attention `NAME`; queries and keys arrive after RoPE."""
    attention.kvfold_tap = tap  # type: ignore[assignment]
    try:
        yield
    finally:
        del attention.kvfold_tap
