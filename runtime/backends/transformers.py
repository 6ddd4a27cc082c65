"""The attention function and mask that transformers calls under the name "kvfold"."""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvfold.errors import KvfoldError
from kvfold.kernels.attention import attend_plain
from kvfold.runtime.backends.base import NAME
from kvfold.runtime.cache.ambient import neutral, no_gradient
from kvfold.runtime.cache.view import LayerView


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
        attention_mask: bool [B, 1, T, columns] or None for plain causal. A sliding window is in the
            mask.
        softcap, s_aux: the soft-cap and [num_heads] sink logits of models that have them.
    Returns:
        ([B, T, num_heads, head_dim] of the query's dtype, None)
    Raises:
        NotImplementedError: the model asks for a position bias, which this function does not
            compute.
    """
    if isinstance(key, Tensor) and isinstance(value, Tensor) and softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError(
            f"{type(module).__name__} attends with 'position_bias', which the packed cache does not compute."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Tensor) and isinstance(value, Tensor):
        out = attend_stock(query, key, value, scale, attention_mask, softcap, s_aux)
        return out.transpose(1, 2).to(query.dtype).contiguous(), None
    assert isinstance(key, LayerView)
    if dropout:
        raise KvfoldError(
            f"Attention with dropout ({dropout}) reads no packed cache; call model.eval()."
        )
    with neutral():
        out = key.attend(
            query, scale, attention_mask, softcap, s_aux, kwargs.get("sliding_window") or 0
        )
        out = out.transpose(1, 2).to(query.dtype).contiguous()
    return no_gradient(out, query, *key.sources), None


def attend_stock(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    mask: Tensor | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention over plain tensors with a soft-cap or sink logits, as `attend_plain`, but with
    masks that add to logits and differentiable."""
    if not torch.is_grad_enabled() and (mask is None or mask.dtype == torch.bool):
        return attend_plain(query, key, value, scaling, mask, softcap, s_aux)
    groups = query.shape[1] // key.shape[1]
    keys, values = (
        key.repeat_interleave(groups, 1).float(),
        value.repeat_interleave(groups, 1).float(),
    )
    scores = query.float() @ keys.mT * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(
            scores.shape[-1] - scores.shape[-2]
        )
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if s_aux is None:
        return scores.softmax(-1) @ values
    sinks = s_aux.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sinks), -1).softmax(-1)[..., :-1] @ values


# Without a mask of its own name, transformers passes no mask at all and left padding is lost in
# silence.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
