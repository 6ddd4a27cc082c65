"""Fusing changes logits by rounding only: ≤ 1e-9 relative in float64, for every family."""

import copy

import pytest
import torch
from conftest import CONFIGS, FAMILIES, tiny_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kvfold.compress.fuse import fuse_pair_scale, fuse_values
from kvfold.compress.transforms.reorder import reorder
from kvfold.errors import KvfoldError
from kvfold.exports.architectures import architecture_of

HEADS, DIM = 2, 16


def float64_attention(
    module, query, key, value, mask, scaling, dropout=0.0, softcap=None, s_aux=None, **kwargs
):
    """Eager attention in the queries' own type (transformers' own takes its softmax in float32)."""
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, 1).mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    if s_aux is not None:
        logits = torch.cat((logits, s_aux[:, None, None].expand(*logits.shape[:3], 1)), -1)
    weights = logits.softmax(-1)[..., : key.shape[2]]
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("float64", float64_attention)
AttentionMaskInterface.register(
    "float64", lambda *a, **kw: sdpa_mask(*a, **{**kw, "allow_is_causal_skip": False})
)


def exact(family):
    """A float64 model whose norms and attention compute in float64 too (transformers' own go
    through float32)."""
    model = tiny_model(family, torch.float64, attention="float64")
    model.config._experts_implementation = "eager"  # grouped products have no float64
    arch = architecture_of(CONFIGS[family]())

    def norm(module):
        def forward(x):
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            return (
                (module.weight + arch.norm_plus)
                * x
                * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            )

        return forward

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm(module)
    return model, arch


def relative_change(model, arch, fuse):
    ids = torch.randint(0, 128, (2, 37), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        for attention in arch.attention_modules(model):
            for name, value in fuse(attention).items():
                attention.get_parameter(name).data = value
        after = model(ids, use_cache=False).logits
    return float((after - before).abs().max() / before.abs().max())


def invertible(kind):
    generator = torch.Generator().manual_seed(5)
    random = torch.randn(HEADS, DIM, DIM, generator=generator, dtype=torch.float64)
    if kind == "any":
        return random + 3 * torch.eye(DIM, dtype=torch.float64)
    if kind == "rotation":
        return torch.linalg.qr(random)[0]
    if kind == "scale":
        return torch.diag_embed(random[:, 0].abs() + 0.1)
    return reorder(random[:, :2].sort(1).values, 4, 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["any", "rotation", "scale", "permutation"])
def test_value_basis(family, kind):
    model, arch = exact(family)
    assert (
        relative_change(model, arch, lambda attention: fuse_values(attention, invertible(kind)))
        < 1e-9
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_pair_scale(family):
    model, arch = exact(family)
    scale = (
        torch.rand(HEADS, DIM // 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        + 0.2
    )
    if arch.qk_norm:
        scale = scale[:1].expand(HEADS, -1)
    scale = torch.cat((scale, scale), -1)
    assert (
        relative_change(model, arch, lambda attention: fuse_pair_scale(attention, scale, arch))
        < 1e-9
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_basis_and_a_pair_scale_together(family):
    """Both change the same parameter where a model has one qkv_proj."""
    model, arch = exact(family)
    half = (
        torch.rand(1, DIM // 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        + 0.2
    )
    scale = torch.cat((half, half), -1).expand(HEADS, -1)

    def both(attention):
        fused = fuse_values(attention, invertible("any"))
        return fused | fuse_pair_scale(attention, scale, arch, fused)

    assert relative_change(model, arch, both) < 1e-9


def test_rows_of_one_projection_are_those_of_three():
    one, arch = exact("phi3")
    attention = one.model.layers[0].self_attn
    three = copy.deepcopy(attention)
    del three.qkv_proj
    for name, rows in zip("qkv", attention.qkv_proj.weight.split((64, 32, 32)), strict=True):
        projection = torch.nn.Linear(64, len(rows), bias=False, dtype=torch.float64)
        projection.weight.data = rows
        setattr(three, f"{name}_proj", projection)
    scale = torch.rand(HEADS, DIM // 2, dtype=torch.float64).repeat(1, 2) + 0.2
    whole = fuse_pair_scale(attention, scale, arch, fuse_values(attention, invertible("any")))[
        "qkv_proj.weight"
    ]
    apart = fuse_pair_scale(three, scale, arch, fuse_values(three, invertible("any")))
    assert torch.equal(whole, torch.cat([apart[f"{name}_proj.weight"] for name in "qkv"]))
    assert not torch.equal(whole[:64], attention.qkv_proj.weight[:64])


def test_a_fused_basis_does_change_the_values():
    model, arch = exact("qwen2")
    attention = arch.attention_modules(model)[0]
    fused = fuse_values(attention, invertible("any"))
    assert set(fused) == {"v_proj.weight", "v_proj.bias", "o_proj.weight"}
    assert all(
        not torch.allclose(value, attention.get_parameter(name)) for name, value in fused.items()
    )


def test_what_rotation_does_not_commute_with_is_refused():
    model, arch = exact("llama")
    scale = torch.rand(HEADS, DIM, dtype=torch.float64) + 0.2
    with pytest.raises(KvfoldError, match="RoPE pair"):
        fuse_pair_scale(arch.attention_modules(model)[0], scale, arch)


def test_one_norm_for_all_heads_needs_one_scale():
    model, arch = exact("qwen3")
    half = torch.rand(HEADS, DIM // 2, dtype=torch.float64) + 0.2
    with pytest.raises(KvfoldError, match="same pair scale"):
        fuse_pair_scale(arch.attention_modules(model)[0], torch.cat((half, half), -1), arch)
