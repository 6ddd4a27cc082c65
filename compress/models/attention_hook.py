"""Reads or replaces what a layer's attention computes: a tap is called in place of the attention
function."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvfold.exports.falcon import build_with
from kvfold.kernels.attention import attend_plain

NAME = "kvfold-tap"  # load a model with this attention to tap it

# (module, query [B,H,T,D], key [B,Hkv,T,D], value [B,Hkv,T,D], mask, scaling) → [B,T,H,D], or None
# to go on as usual; models that have them add softcap=, a float, or sinks_logit=, [H]
Tap = Callable[..., Tensor | None]


def _forward(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    softcap=None,
    s_aux=None,
    **kwargs,
):
    tap = getattr(module, "kvfold_tap", None)
    stated = {"softcap": softcap, "sinks_logit": s_aux}
    extras = {name: given for name, given in stated.items() if given is not None}
    if tap is not None:
        out = tap(module, query, key, value, attention_mask, scaling, **extras)
        if out is not None:
            return out, None
    return attend_as_usual(
        module, query, key, value, attention_mask, scaling, dropout, extras, **kwargs
    ), None


def attend_as_usual(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float = 0.0,
    extras: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Unquantised attention [B, T, H, D]; arguments as a tap gets them, `extras` being softcap and
    sinks_logit."""
    if extras:
        assert scaling is not None
        out = attend_plain(query, key, value, scaling, mask, **extras)
        return out.transpose(1, 2).to(query.dtype).contiguous()
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )[0]


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
build_with(NAME)


@contextmanager
def tapped(attention: nn.Module, tap: Tap) -> Iterator[None]:
    """Taps one attention module of a model loaded with attention `NAME`; queries and keys arrive
    after RoPE."""
    attention.kvfold_tap = tap  # type: ignore[assignment]
    try:
        yield
    finally:
        del attention.kvfold_tap
