"""Folds transforms into projection weights, exactly, in float64.

| transform | where it goes | where its inverse goes |
|---|---|---|
| value basis M, one a KV head | rows of v_proj and its bias | columns of o_proj, for every query head of the group |
| pair scale s of keys | 1/s: rows of k_proj and its bias, or k_norm | s: rows of q_proj and its bias, or q_norm |

A model with one qkv_proj has the rows of all three in it, queries first, then keys, then values;
one with a query_key_value has them by KV heads: the queries of its group, its key, its value. What
is said of o_proj goes for `dense` and `out_proj`, as some models call it.

Where values are normalised behind their projection, a basis of them is orthogonal, and where they come
of the keys' projection, there is none. Later layers that read the same keys and values take the
inverse of their basis in their own o_proj, and of a pair scale in their own q_norm.

Where a gate multiplies each channel between attention and o_proj, a basis of values is a permutation
times a positive scale of each channel, for only those go through; the gate's rows are permuted too.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.exports.architectures import Architecture
from kvfold.kernels.key_mean import split_pairs


def output_name(attention: Any) -> str:
    """The attribute that holds the projection behind attention."""
    return next(name for name in ("o_proj", "dense", "out_proj") if hasattr(attention, name))


def _rows(
    attention: Any, side: str, num_kv_heads: int, head_dim: int
) -> tuple[str, slice | Tensor]:
    """The projection that computes "q", "k" or "v", and its rows."""
    if hasattr(attention, "query_key_value"):
        count = attention.query_key_value.weight.shape[0]
        rows = torch.arange(count).view(num_kv_heads, -1, head_dim)
        of_side = {"q": slice(0, -2), "k": slice(-2, -1), "v": slice(-1, None)}[side]
        return "query_key_value", rows[:, of_side].flatten()
    if not hasattr(attention, "qkv_proj"):
        return f"{side}_proj", slice(None)
    keys = num_kv_heads * head_dim
    start = attention.qkv_proj.weight.shape[0] - 2 * keys
    return "qkv_proj", {
        "q": slice(0, start),
        "k": slice(start, start + keys),
        "v": slice(start + keys, None),
    }[side]


def _copies(attention: Any, name: str, fused: dict[str, Tensor]) -> Iterator[Tensor]:
    """A projection's weight, and its bias if it has one, as float64 copies in `fused`, to be changed
    in place; what is there already goes on."""
    for kind in ("weight", "bias"):
        parameter = getattr(getattr(attention, name), kind)
        if parameter is not None:
            key = f"{name}.{kind}"
            fused[key] = fused.get(key, parameter).to(torch.float64, copy=True)
            yield fused[key]


def _multiply_rows(attention: Any, side: str, matrix: Tensor, fused: dict[str, Tensor]) -> None:
    """Multiplies a side's rows, weight and bias, by matrix [Hkv, D, D] from the left, for each head
    of a group; into `fused`."""
    heads, dim = matrix.shape[:2]
    name, rows = _rows(attention, side, heads, dim)
    for whole in _copies(attention, name, fused):
        heads_of = whole[rows].unflatten(0, (heads, -1, dim))  # [Hkv, G, D, hidden] or [Hkv, G, D]
        product = torch.einsum("hde,hge...->hgd...", matrix.to(whole.device), heads_of)
        whole[rows] = product.flatten(0, 2)


def _permute_gate(
    attention: Any, gate: str, order: Tensor, channels: int, fused: dict[str, Tensor]
) -> None:
    """Puts the rows of a gate, weight and bias, into another order; into `fused`.

    Args:
        gate: as in `fuse_values`.
        order: int64 [Hkv, D], the channel that stands at each place of a head.
        channels: of the attention's output.
    """
    heads, dim = order.shape
    count = channels // dim
    starts = torch.arange(count, device=order.device)[:, None] * dim
    if gate == "q_proj":  # each head's query stands before its gate
        starts = 2 * starts + dim
    rows = starts + torch.arange(dim, device=order.device)
    taken = starts + order.repeat_interleave(count // heads, 0)
    for whole in _copies(attention, gate, fused):
        whole[rows.flatten()] = whole[taken.flatten()]


def value_bases(attention: Any, arch: Architecture) -> Literal["any", "channels", "turns", "none"]:
    """Which bases of its values can be folded into an attention module: any that is invertible,
    permutations with scales, orthogonal ones, or none."""
    if arch.value_norm:
        return "turns" if _own_values(attention) else "none"
    return "channels" if arch.gate else "any"


def _own_values(attention: Any) -> bool:
    """Whether values have a projection of their own."""
    return getattr(attention, "v_proj", None) is not None or not hasattr(attention, "k_proj")


def fuse_outputs(attention: Any, inverse: Tensor) -> dict[str, Tensor]:
    """o_proj of an attention whose values come in another basis.

    Args:
        attention: the module; not changed.
        inverse: float64 [Hkv, D, D], of the values' basis.
    Returns:
        New parameters by name, float64.
    """
    heads, dim = inverse.shape[:2]
    name = output_name(attention)
    weight = getattr(attention, name).weight
    o = weight.double().unflatten(1, (heads, -1, dim))  # [hidden, Hkv, G, D]
    turned = torch.einsum("nhgd,hde->nhge", o, inverse.to(weight.device))
    return {f"{name}.weight": turned.flatten(1)}


def fuse_values(attention: Any, matrix: Tensor, gate: str = "") -> dict[str, Tensor]:
    """v_proj and o_proj with a value basis folded in, and the gate between attention and o_proj.

    Args:
        attention: the attention module; not changed.
        matrix: float64 [Hkv, D, D], invertible; with a gate, a permutation times a positive scale of
            each channel; the identity where values come of the keys' projection.
        gate: of the family's row in the table (exports/families.py).
    Returns:
        New parameters by name ("v_proj.weight", …), float64.
    """
    if not _own_values(attention):
        assert torch.equal(matrix, torch.eye(matrix.shape[1]).to(matrix).expand_as(matrix))
        return {}
    weight = getattr(attention, output_name(attention)).weight
    matrix = matrix.to(weight.device)
    fused = fuse_outputs(attention, torch.linalg.inv(matrix))
    _multiply_rows(attention, "v", matrix, fused)
    if gate:
        order = matrix.argmax(-1)
        only = torch.zeros_like(matrix).scatter(-1, order[..., None], 1.0)
        assert torch.equal(matrix, matrix.abs() * only), "a gate lets no mixed channels through"
        _permute_gate(attention, gate, order, weight.shape[1], fused)
    return fused


def scaled_norms(attention: Any, arch: Architecture) -> list[str]:
    """Names of the norms that a scale of queries and of keys must go into, as they undo what the
    projections do; none where there are none.

    Raises:
        KvfoldError: there are norms, but they have no weights of their own channels.
    """
    found = [
        name for name in arch.norms if arch.qk_norm and getattr(attention, name, None) is not None
    ]
    if any(getattr(getattr(attention, name), "weight", None) is None for name in found):
        raise KvfoldError(
            f"The norms of queries and keys of a '{arch.model_type}' model have no weights that key.transform 'smooth' "
            "could fold its scales into; choose another key.transform in the recipe."
        )
    return found


def shares_scale(attention: Any, arch: Architecture, head_dim: int) -> bool:
    """Whether one norm serves all heads, so that all must have the same pair scale."""
    norms = [getattr(attention, name, None) for name in arch.norms if arch.qk_norm]
    weights = [getattr(norm, "weight", None) for norm in norms]
    return any(weight is not None and weight.numel() == head_dim for weight in weights)


def _scaled(parameter: Tensor, scale: Tensor, queries: bool) -> Tensor:
    return parameter * scale if queries else parameter / scale


def fuse_pair_scale(
    attention: Any, scale: Tensor, arch: Architecture, fused: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Query and key projections, or their norms, with a pair scale folded in: keys / s, queries ·
    s.

    Args:
        attention: the attention module; not changed.
        scale: float64 [Hkv, D] > 0, equal inside each pair that RoPE turns.
        arch: says whether q_norm and k_norm undo what the projections do.
        fused: parameters that were changed before and are taken in place of the module's, e.g. of a
            qkv_proj.
    Returns:
        New parameters by name, float64.
    Raises:
        KvfoldError: a QK-norm model has one norm for all heads, so all heads must share one scale;
            or norms without weights.
    """
    dim = scale.shape[1]
    if not torch.equal(*split_pairs(scale, arch.rope_pairs)):
        raise KvfoldError(
            "The pair scale differs inside a RoPE pair, which rotation does not commute with; give pairs one scale."
        )
    norms = scaled_norms(attention, arch)
    if norms:
        scale = scale.to(getattr(attention, norms[0]).weight.device)
        if shares_scale(attention, arch, dim) and not torch.allclose(
            scale, scale[:1].expand_as(scale)
        ):
            raise KvfoldError(
                "A QK-norm model has one norm for all heads; give every KV head the same pair scale."
            )
        plus, found = arch.norm_plus, {}
        for name in norms:
            weight = getattr(attention, name).weight.double()
            heads = weight.numel() // dim
            own = (
                scale[0]
                if heads == 1
                else scale.repeat_interleave(heads // len(scale), 0).reshape_as(weight)
            )
            found[f"{name}.weight"] = _scaled(weight + plus, own, name == arch.norms[0]) - plus
            if getattr(getattr(attention, name), "bias", None) is not None:
                bias = getattr(attention, name).bias.double()
                found[f"{name}.bias"] = _scaled(bias, own, name == arch.norms[0])
        return found
    changed = dict(fused or {})
    for side, factor in (("q", scale), ("k", 1 / scale)):
        _multiply_rows(attention, side, torch.diag_embed(factor), changed)
    return changed


def fuse_all(
    modules: Sequence[Any], matrix: Tensor, scale: Tensor | None, arch: Architecture
) -> list[dict[str, Tensor]]:
    """What a layer's choices change in its attention module and in those that read its keys and
    values too.

    Args:
        modules: as `Architecture.reading_modules` gives them; not changed.
        matrix: of `fuse_values`.
        scale: of `fuse_pair_scale`; None for none.
    Returns:
        New parameters by name, float64, of each module.
    """
    found = [fuse_values(modules[0], matrix, arch.gate)]
    inverse = torch.linalg.inv(matrix)
    found += [fuse_outputs(reader, inverse) for reader in modules[1:] if found[0]]
    found += [{} for _ in modules[len(found) :]]
    if scale is not None:
        found = [
            fused | fuse_pair_scale(module, scale, arch, fused)
            for module, fused in zip(modules, found, strict=True)
        ]
    return found
