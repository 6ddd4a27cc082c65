"""Pair-shared smoothing of keys (PM-KVQ, 2505.18610): k_i / s_i and q_i · s_i with s equal inside
each RoPE pair.

s_i is the larger of a pair's two largest |k|, to the power of α, over calibration tokens at interpolated positions. α
comes from a grid of 21 values in [0, 1] by the error of the attention's output, ‖(softmax(q kᵀ) v − softmax(q k̂ᵀ) v̂)
W_oᵀ‖², with keys and values that go through the quantiser. The attention is that among the sampled tokens of each
calibration sequence, causal.
"""

import torch
from torch import Tensor

from kvfold.compress.calibrate import LayerStats
from kvfold.compress.transforms.interface import Basis, Request, Transform
from kvfold.kernels.formats import Format
from kvfold.kernels.key_mean import RopePairs, join_pairs, split_pairs
from kvfold.kernels.quantizer import round_trip

GRID = 21
LEAST, MOST = 1e-4, 1e4  # of a scale


def pair_scale(
    stats: LayerStats, alpha: float, shared: bool = False, pairs: RopePairs = "halves"
) -> Tensor:
    """float64 [Hkv, D], equal inside each of `pairs`; `shared`: one scale for all heads, as a QK
    norm needs."""
    absmax = stats.key_range.abs().amax(1)
    if shared:
        absmax = absmax.amax(0, keepdim=True).expand_as(absmax)
    top = torch.maximum(*split_pairs(absmax, pairs)).clamp(LEAST, MOST) ** alpha
    return join_pairs(top, top, pairs)


def attention_output(
    stats: LayerStats, keys: Tensor, values: Tensor, output_weight: Tensor
) -> Tensor:
    """Causal attention among the sampled tokens of each sequence, through o_proj.

    Args:
        keys, values: float32 [Hkv, S, D], in the place of the samples.
        output_weight: float32 [hidden_size, H·D].
    Returns:
        float32 [S, hidden_size].
    """
    heads, groups = stats.query_sample.shape[0], keys.shape[0]
    found = []
    start = 0
    for length in stats.sample_lengths.tolist():
        part = slice(start, start + length)
        q = stats.query_sample[:, part].unflatten(0, (groups, heads // groups))  # [Hkv, G, n, D]
        logits = q @ keys[:, None, part].mT * float(stats.scaling)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        found.append((weights @ values[:, None, part]).flatten(0, 1).transpose(0, 1).flatten(1))
        start += length
    return torch.cat(found) @ output_weight.mT


def output_error(
    stats: LayerStats, fmt: Format, scale: Tensor, target: Tensor, output_weight: Tensor
) -> float:
    """Mean squared error of the attention's output with keys smoothed by `scale` and both sides in
    `fmt`."""
    divisor = scale[:, None].float()
    keys = round_trip(stats.key_sample / divisor, fmt) * divisor
    return float(
        (attention_output(stats, keys, round_trip(stats.value_sample, fmt), output_weight) - target)
        .square()
        .mean()
    )


def smooth(stats: LayerStats, request: Request) -> Basis:
    """The pair scale with the least output error."""
    assert request.fmt is not None and request.output_weight is not None
    weight = request.output_weight.float().cpu()
    target = attention_output(stats, stats.key_sample, stats.value_sample, weight)
    scales = [
        pair_scale(stats, step / (GRID - 1), request.one_norm, request.pairs)
        for step in range(GRID)
    ]
    errors = [output_error(stats, request.fmt, scale, target, weight) for scale in scales]
    return Basis(fused=torch.diag_embed(1 / scales[errors.index(min(errors))]))


KEYS = Transform("smooth", smooth, each_format=True)
