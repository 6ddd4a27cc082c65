"""Values in an orthogonal or balanced basis, fused into v_proj and o_proj.

rotate: M = 2^e · H Uᵀ with Σ_v = U Λ Uᵀ: every channel gets the same variance, and the power of two
(exact in any float type) brings it near 1, where 8-bit scales are precise. balance: M = 2^e · H
Λ^(−¼) Uᵀ G^½ with G the output metric and G^½ Σ_v G^½ = U Λ Uᵀ, the value side's half-whitening.
Neither subtracts an offset: tokens with small values often draw the most attention, and their error
must stay in proportion to their own norm.
"""

import torch
from torch import Tensor

from kvfold.compress.calibrate import LayerStats
from kvfold.compress.transforms.basis import mixing_matrix, regularised, symmetric_power
from kvfold.compress.transforms.interface import Basis, Transform


def _to_unit(matrix: Tensor, stats: LayerStats, normed: bool = False) -> Tensor:
    """Scales each head's matrix by the power of two that brings its values' rms nearest 1; where a
    norm does that, nothing."""
    if normed:
        return matrix
    moment = stats.value_cov + stats.value_mean[:, :, None] * stats.value_mean[:, None, :]
    rms = torch.einsum("hij,hjk,hik->hi", matrix, moment, matrix).clamp_min(0).mean(-1).sqrt()
    exponent = torch.where(rms > 1e-12, -rms.clamp_min(1e-12).log2().round(), torch.zeros_like(rms))
    return matrix * torch.exp2(exponent)[:, None, None]


def unit_scale(stats: LayerStats, normed: bool = False) -> Tensor:
    """Only the power of two, float64 [Hkv, D, D]; `normed`: as Request has it."""
    eye = torch.eye(stats.value_mean.shape[1], dtype=torch.float64)
    return _to_unit(eye.expand(stats.value_cov.shape).clone(), stats, normed)


def rotate(stats: LayerStats, generator: torch.Generator, normed: bool = False) -> Tensor:
    """float64 [Hkv, D, D], orthogonal times a power of two; `normed`: as Request has it."""
    _, vectors = torch.linalg.eigh(stats.value_cov)
    return _to_unit(mixing_matrix(vectors.shape[-1], generator) @ vectors.mT, stats, normed)


def balance(stats: LayerStats, generator: torch.Generator) -> Tensor:
    """float64 [Hkv, D, D], invertible."""
    root = symmetric_power(stats.output_metric, 0.5)
    values, vectors = torch.linalg.eigh(root @ stats.value_cov @ root)
    quarter = regularised(values) ** -0.25
    return _to_unit(
        mixing_matrix(vectors.shape[-1], generator) @ (quarter[:, :, None] * (vectors.mT @ root)),
        stats,
    )


PLAIN = Transform("none", lambda stats, request: Basis(fused=unit_scale(stats, request.normed)))
ROTATE = Transform(
    "rotate",
    lambda stats, request: Basis(fused=rotate(stats, request.generator(), request.normed)),
)
BALANCE = Transform(
    "balance", lambda stats, request: Basis(fused=balance(stats, request.generator()))
)
