"""Folds transforms into projection weights, exactly, in float64.

| transform | where it goes | where its inverse goes |
|---|---|---|
| value basis M, one a KV head | rows of v_proj and its bias | columns of o_proj, for every query head of the group |
| pair scale s of keys | 1/s: rows of k_proj and its bias, or k_norm | s: rows of q_proj and its bias, or q_norm |

A model with one qkv_proj has the rows of all three in it, queries first, then keys, then values.
"""

from typing import Any

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.exports.architectures import Architecture


def _rows(attention: Any, side: str, num_kv_heads: int, head_dim: int) -> tuple[str, slice]:
    """The projection that computes "q", "k" or "v", and its rows."""
    if not hasattr(attention, "qkv_proj"):
        return f"{side}_proj", slice(None)
    keys = num_kv_heads * head_dim
    start = attention.qkv_proj.weight.shape[0] - 2 * keys
    return "qkv_proj", {"q": slice(0, start), "k": slice(start, start + keys), "v": slice(start + keys, None)}[side]


def _multiply_rows(attention: Any, side: str, matrix: Tensor, fused: dict[str, Tensor]) -> None:
    """Multiplies a side's rows, weight and bias, by matrix [Hkv, D, D] from the left, for each head of a group; into
    `fused`."""
    heads, dim = matrix.shape[:2]
    name, rows = _rows(attention, side, heads, dim)
    projection = getattr(attention, name)
    for kind in ("weight", "bias"):
        parameter = getattr(projection, kind)
        if parameter is None:
            continue
        whole = fused.get(f"{name}.{kind}", parameter).to(torch.float64, copy=True)
        heads_of = whole[rows].unflatten(0, (heads, -1, dim))  # [Hkv, G, D, hidden] or [Hkv, G, D]
        product = torch.einsum("hde,hge...->hgd...", matrix.to(whole.device), heads_of)
        whole[rows] = product.flatten(0, 2)
        fused[f"{name}.{kind}"] = whole


def fuse_values(attention: Any, matrix: Tensor) -> dict[str, Tensor]:
    """v_proj and o_proj with a value basis folded in.

    Args:
        attention: the attention module; not changed.
        matrix: float64 [Hkv, D, D], invertible.
    Returns:
        New parameters by name ("v_proj.weight", …), float64.
    """
    heads, dim = matrix.shape[:2]
    matrix = matrix.to(attention.o_proj.weight.device)
    inverse = torch.linalg.inv(matrix)
    o = attention.o_proj.weight.double().unflatten(1, (heads, -1, dim))  # [hidden, Hkv, G, D]
    fused = {"o_proj.weight": torch.einsum("nhgd,hde->nhge", o, inverse).flatten(1)}
    _multiply_rows(attention, "v", matrix, fused)
    return fused


def fuse_pair_scale(
    attention: Any, scale: Tensor, arch: Architecture, fused: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Query and key projections, or their norms, with a pair scale folded in: keys / s, queries · s.

    Args:
        attention: the attention module; not changed.
        scale: float64 [Hkv, D] > 0, equal inside each pair (i, i + D/2).
        arch: says whether q_norm and k_norm undo what the projections do.
        fused: parameters that were changed before and are taken in place of the module's, e.g. of a qkv_proj.
    Returns:
        New parameters by name, float64.
    Raises:
        KvfoldError: a QK-norm model has one norm for all heads, so all heads must share one scale.
    """
    dim = scale.shape[1]
    if not torch.equal(scale[:, : dim // 2], scale[:, dim // 2 :]):
        raise KvfoldError(
            "The pair scale differs inside a RoPE pair, which rotation does not commute with; give pairs one scale."
        )
    if arch.qk_norm:
        scale = scale.to(attention.q_norm.weight.device)
        if not torch.allclose(scale, scale[:1].expand_as(scale)):
            raise KvfoldError("A QK-norm model has one norm for all heads; give every KV head the same pair scale.")
        plus = arch.norm_plus
        return {
            "q_norm.weight": (attention.q_norm.weight.double() + plus) * scale[0] - plus,
            "k_norm.weight": (attention.k_norm.weight.double() + plus) / scale[0] - plus,
        }
    changed = dict(fused or {})
    for side, factor in (("q", scale), ("k", 1 / scale)):
        _multiply_rows(attention, side, torch.diag_embed(factor), changed)
    return changed
