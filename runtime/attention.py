"""The attention function and mask that transformers calls under the name "kvfold"."""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvfold.kernels.attention import attend_plain
from kvfold.runtime.view import LayerView

NAME = "kvfold"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | LayerView,
    value: Tensor | LayerView,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention over a packed cache (the handles of PackedLayer.update), or over plain tensors.

    Args:
        query: [B, num_heads, T, head_dim].
        attention_mask: bool [B, 1, T, columns] or None for plain causal. A sliding window is in the mask.
        softcap, s_aux: the soft-cap and [num_heads] sink logits of models that have them.
    Returns:
        ([B, T, num_heads, head_dim] of the query's dtype, None)
    Raises:
        NotImplementedError: the model asks for a position bias, which this function does not compute.
    """
    if isinstance(key, Tensor) and isinstance(value, Tensor) and softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError(
            f"{type(module).__name__} attends with 'position_bias', which the packed cache does not compute."
        )
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask >= 0  # additive: 0 where visible, the dtype's minimum elsewhere
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Tensor) and isinstance(value, Tensor):
        out = attend_plain(query, key, value, scale, attention_mask, softcap, s_aux)
    else:
        assert isinstance(key, LayerView)
        out = key.attend(query, scale, attention_mask, softcap, s_aux, kwargs.get("sliding_window") or 0)
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


# Without a mask of its own name, transformers passes no mask at all and left padding is lost in silence.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
