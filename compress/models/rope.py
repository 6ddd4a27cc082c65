"""What RoPE turns a layer's queries and keys by, read from the model's own rotary module.

A family may have one table for all layers, a table for each type of layer (Gemma 3: another base in sliding layers),
tables that change with the length (long-rope), factors that only a part of a head's channels take, or layers without
RoPE. A turn is a complex number e^{iθ} for each pair of channels (i, i + n/2) of the n that are rotated, so turns
combine by multiplication.
"""

from typing import Any

import torch
from torch import Tensor

from kvfold.exports.architectures import Architecture


def turns(model: Any, arch: Architecture, layer: int, positions: Tensor) -> Tensor | None:
    """The turns of one layer at `positions`, int64 [B, T], of one sequence.

    Returns:
        complex64 [B, T, n/2] of modulus 1 (a factor on the tables, as long-rope has, is left out); None for a layer
        without RoPE.
    """
    attention = arch.attention_modules(model)[layer]
    if not getattr(attention, "use_rope", True):
        return None
    rotary = model.base_model.rotary_emb
    of_type = (model.config.layer_types[layer],) if arch.rope_by_type else ()
    cos, sin = rotary(torch.empty(0, device=positions.device), positions, *of_type)  # the tensor only gives its type
    pairs = cos.shape[-1] if arch.rope_halves else cos.shape[-1] // 2
    turn = torch.complex(cos[..., :pairs].float(), sin[..., :pairs].float())
    return turn / turn.abs()


def frequencies(model: Any, arch: Architecture, layer: int, last: int) -> Tensor | None:
    """Angular frequencies ω of a layer's RoPE, float32 [n/2], radians a token; None for a layer without RoPE.

    Args:
        last: the highest position that will be used: a table that changes with the length is asked for with that one
            in.
    """
    device = next(model.parameters()).device
    found = turns(model, arch, layer, torch.tensor([[0, 1, max(1, last)]], device=device))
    return None if found is None else (found[0, 1] * found[0, 0].conj()).angle().abs().cpu()


def rotate_on(x: Tensor, near: Tensor | None, far: Tensor | None) -> Tensor:
    """Queries or keys as RoPE would have turned them at other positions.

    Args:
        x: float [B, heads, T, D], turned by `near` (pairs are channels i and i + n/2).
        near, far: complex64 [B, T, n/2] as `turns` gives them, or None for a layer without RoPE.
    Returns:
        float32 [B, heads, T, D], turned by `far`.
    """
    if near is None or far is None:
        return x.float()
    width = 2 * near.shape[-1]
    low, high = x[..., :width].float().chunk(2, -1)
    turned = torch.complex(low, high) * (far * near.conj())[:, None]
    return torch.cat((turned.real, turned.imag, x[..., width:].float()), -1)
