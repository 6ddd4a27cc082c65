"""Pair-shared smoothing of keys (after PM-KVQ, 2505.18610): k_i / s_i and q_i · s_i with s equal inside each RoPE pair.

s_i = max(|k_i|, |k_{i+D/2}|)^α over the calibration tokens, normalised to a geometric mean of 1. α comes from a grid of
21 values in [0, 1], by the error of the logits, E[(qᵀΔk)²] = tr(Σ_q E[Δk Δkᵀ]), of keys that go through the quantiser
(PM-KVQ searches on the attention's output error instead).
"""

import torch
from torch import Tensor

from kvfold.compress.calibrate import LayerStats
from kvfold.compress.transforms import KeyBasis
from kvfold.kernels.formats import Format
from kvfold.kernels.quantizer import round_trip

GRID = 21


def pair_scale(stats: LayerStats, alpha: float, shared: bool = False) -> Tensor:
    """float64 [Hkv, D], equal inside each pair (i, i + D/2); `shared`: one scale for all heads, as a QK norm needs."""
    absmax = stats.key_absmax
    if shared:
        absmax = absmax.amax(0, keepdim=True).expand_as(absmax)
    low, high = absmax.chunk(2, -1)
    top = torch.maximum(low, high).clamp_min(1e-6) ** alpha
    top = top / top.log().mean(-1, keepdim=True).exp()
    return torch.cat((top, top), -1)


def smooth(stats: LayerStats, fmt: Format, shared: bool = False) -> KeyBasis:
    """The pair scale with the least logit error under `fmt`."""
    best, best_error = pair_scale(stats, 0.0, shared), float("inf")
    for step in range(GRID):
        scale = pair_scale(stats, step / (GRID - 1), shared)
        divided = stats.key_sample / scale[:, None].float()
        delta = (round_trip(divided, fmt) - divided).double() * scale[:, None]
        error = float(torch.einsum("hti,hij,htj->", delta, stats.query_moment, delta))
        if error < best_error:
            best, best_error = scale, error
    return KeyBasis(pair_scale=best)
