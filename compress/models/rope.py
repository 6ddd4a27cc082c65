"""What RoPE turns a layer's queries and keys by, read from the model's own rotary module.

A family may have one table for all layers, a table for each type of layer (Gemma 3: another base in
sliding layers), tables that change with the length (long-rope), factors that only a part of a
head's channels take, or layers without RoPE. A turn is a complex number e^{iθ} for each pair of the
n channels that are rotated (kernels/key_mean.py says which channels are pairs), so turns combine by
multiplication.
"""

from typing import Any

import torch
from torch import Tensor

from kvfold.exports.architectures import (
    Architecture,
    attention_layers_of,
    sliding_windows_of,
    text_of,
)
from kvfold.kernels.key_mean import RopePairs, join_pairs, split_pairs


def turns(model: Any, arch: Architecture, layer: int, positions: Tensor) -> Tensor | None:
    """The turns of one layer at `positions`, int64 [B, T], of one sequence.

    Args:
        layer: number among the layers that attend.
    Returns:
        complex64 [B, T, n/2] of modulus 1 (a factor on the tables, as long-rope has, is left out);
        None for a layer without RoPE.
    """
    attention = arch.attention_modules(model)[layer]
    if not getattr(attention, "use_rope", True) or _only_elsewhere(
        text_of(model.config), arch, layer, attention
    ):
        return None
    rotary = getattr(arch.language_model(model), arch.rotary, None)
    if rotary is None:
        return None
    place = attention_layers_of(model.config)[layer]
    of_type = (text_of(model.config).layer_types[place],) if arch.rope_by_type else ()
    if arch.rope_axes > 1:
        positions = positions.expand(arch.rope_axes, *positions.shape)
    # the tensor only gives its type
    table = rotary(torch.empty(0, device=positions.device), positions, *of_type)
    if isinstance(table, Tensor):  # e^{iθ} of each pair
        return table / table.abs()
    cos, sin = table
    pairs = cos.shape[-1] if arch.rope_halves else cos.shape[-1] // 2
    once = slice(0, None, 2) if arch.rope_repeats else slice(pairs)
    turn = torch.complex(cos[..., once].float(), sin[..., once].float())
    return turn / turn.abs()


def _only_elsewhere(config: Any, arch: Architecture, layer: int, attention: Any) -> bool:
    """Whether RoPE is for sliding layers, and this is none; a layer may be an exception."""
    windows = (
        sliding_windows_of(config)
        if arch.rope_if_sliding and not getattr(attention, "force_rope", False)
        else ()
    )
    return bool(windows) and not windows[layer]


def frequencies(model: Any, arch: Architecture, layer: int, last: int) -> Tensor | None:
    """Angular frequencies ω of a layer's RoPE, float32 [n/2], radians a token; None for a layer
    without RoPE.

    Args:
        last: the highest position that will be used: a table that changes with the length is asked
            for with that one in.
    """
    device = next(model.parameters()).device
    found = turns(model, arch, layer, torch.tensor([[0, 1, max(1, last)]], device=device))
    return None if found is None else (found[0, 1] * found[0, 0].conj()).angle().abs().cpu()


def norm_weights(attention: Any, arch: Architecture) -> tuple[Tensor | None, Tensor | None]:
    """What queries and keys are multiplied by after RoPE, float32 [D] each; None for nothing."""
    if not arch.norm_after_rope:
        return None, None
    norms = (getattr(attention, name, None) for name in arch.norms)
    weights = (getattr(norm, "weight", None) for norm in norms)
    query, key = (None if w is None else w.float() + arch.norm_plus for w in weights)
    return query, key


def rotate_on(
    x: Tensor,
    near: Tensor | None,
    far: Tensor | None,
    pairs: RopePairs = "halves",
    weight: Tensor | None = None,
) -> Tensor:
    """Queries or keys as RoPE would have turned them at other positions.

    Args:
        x: float [B, heads, T, D], turned by `near`.
        near, far: complex64 [B, T, n/2] as `turns` gives them, or None for a layer without RoPE.
        pairs: which channels are turned together.
        weight: float32 [D], what x was multiplied by after RoPE, or None.
    Returns:
        float32 [B, heads, T, D], turned by `far`.
    """
    if near is None or far is None:
        return x.float()
    width = 2 * near.shape[-1]
    x = x.float()
    if weight is not None:
        weight = torch.where(
            weight == 0, 1.0, weight
        )  # a channel that is 0 at every position stays so
        x = x / weight
    first, second = split_pairs(x[..., :width], pairs)
    turned = torch.complex(first.contiguous(), second.contiguous()) * (far * near.conj())[:, None]
    moved = torch.cat((join_pairs(turned.real, turned.imag, pairs), x[..., width:]), -1)
    return moved if weight is None else moved * weight
