"""The attention function and mask that transformers calls under the name "kvfold"."""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvfold.runtime.layer import LayerView

NAME = "kvfold"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | LayerView,
    value: Tensor | LayerView,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention over a packed cache (the handles of PackedLayer.update), or over plain tensors through SDPA.

    Args:
        query: [B, num_heads, T, head_dim].
        attention_mask: bool [B, 1, T, columns] or None for plain causal. A sliding window is in the mask.
    Returns:
        ([B, T, num_heads, head_dim] of the query's dtype, None)
    Raises:
        NotImplementedError: the model asks for a soft-cap or attention sinks, which this function does not compute.
    """
    if isinstance(key, Tensor) and isinstance(value, Tensor):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert isinstance(key, LayerView)
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{type(module).__name__} attends with '{name}', which the packed cache does not compute."
            )
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask >= 0  # additive: 0 where visible, the dtype's minimum elsewhere
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = key.attend(query, scale, attention_mask)
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


# Without a mask of its own name, transformers passes no mask at all and left padding is lost in silence.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
