"""Folds transforms into projection weights, exactly, in float64.

| transform | where it goes | where its inverse goes |
|---|---|---|
| value basis M, one a KV head | rows of v_proj and its bias | columns of o_proj, for every query head of the group |
| pair scale s of keys | 1/s: rows of k_proj and its bias, or k_norm | s: rows of q_proj and its bias, or q_norm |
"""

from typing import Any

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.exports.architectures import Architecture


def fuse_values(attention: Any, matrix: Tensor) -> dict[str, Tensor]:
    """v_proj and o_proj with a value basis folded in.

    Args:
        attention: the attention module; not changed.
        matrix: float64 [Hkv, D, D], invertible.
    Returns:
        New parameters by name ("v_proj.weight", …), float64.
    """
    heads, dim = matrix.shape[:2]
    matrix = matrix.to(attention.v_proj.weight.device)
    inverse = torch.linalg.inv(matrix)
    v = attention.v_proj.weight.double().unflatten(0, (heads, dim))
    o = attention.o_proj.weight.double().unflatten(1, (heads, -1, dim))  # [hidden, Hkv, G, D]
    fused = {
        "v_proj.weight": (matrix @ v).flatten(0, 1),
        "o_proj.weight": torch.einsum("nhgd,hde->nhge", o, inverse).flatten(1),
    }
    if attention.v_proj.bias is not None:
        bias = attention.v_proj.bias.double().view(heads, dim, 1)
        fused["v_proj.bias"] = (matrix @ bias).flatten()
    return fused


def fuse_pair_scale(attention: Any, scale: Tensor, arch: Architecture) -> dict[str, Tensor]:
    """Query and key projections, or their norms, with a pair scale folded in: keys / s, queries · s.

    Args:
        attention: the attention module; not changed.
        scale: float64 [Hkv, D] > 0, equal inside each pair (i, i + D/2).
        arch: says whether q_norm and k_norm undo what the projections do.
    Returns:
        New parameters by name, float64.
    Raises:
        KvfoldError: a QK-norm model has one norm for all heads, so all heads must share one scale.
    """
    heads, dim = scale.shape
    if not torch.equal(scale[:, : dim // 2], scale[:, dim // 2 :]):
        raise KvfoldError(
            "The pair scale differs inside a RoPE pair, which rotation does not commute with; give pairs one scale."
        )
    if arch.qk_norm:
        scale = scale.to(attention.q_norm.weight.device)
        if not torch.allclose(scale, scale[:1].expand_as(scale)):
            raise KvfoldError("A QK-norm model has one norm for all heads; give every KV head the same pair scale.")
        return {
            "q_norm.weight": attention.q_norm.weight.double() * scale[0],
            "k_norm.weight": attention.k_norm.weight.double() / scale[0],
        }
    fused: dict[str, Tensor] = {}
    scale = scale.to(attention.q_proj.weight.device)
    for name, factor in (("q_proj", scale), ("k_proj", 1 / scale)):
        projection = getattr(attention, name)
        rows = factor.repeat_interleave(projection.weight.shape[0] // (heads * dim), 0).flatten()  # [H·D]
        fused[f"{name}.weight"] = projection.weight.double() * rows[:, None]
        if projection.bias is not None:
            fused[f"{name}.bias"] = projection.bias.double() * rows
    return fused
