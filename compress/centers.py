"""Which pairs of channels lose their mean: measured, because a mean that turns is not always worth
taking off.

Before RoPE a pair of channels is often one of two things: at most tokens near the mean b, at a few
somewhere else. Then r = k − m_t is small but for those few tokens, where it is many standard
deviations large, and a symmetric code with one scale a token cuts them off. With the mean left in,
the pair turns on a circle, which a code never cuts off. So for each KV head the mean is left in the
pairs that turn faster than some frequency, the one of SHARES that distorts logits least on
calibration tokens, in the middle of the offered formats. The stored b has zeros there; nothing else
changes.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvfold.compress.calibrate import LayerStats
from kvfold.compress.transforms import Request
from kvfold.compress.transforms.whiten import eigenbasis, half_whitened
from kvfold.kernels.formats import Format
from kvfold.kernels.key_mean import RopePairs, turn_tables
from kvfold.kernels.quantizer import round_trip, to_float16

SHARES = (
    0.0,
    1 / 16,
    1 / 8,
    3 / 16,
    1 / 4,
    3 / 8,
    1 / 2,
    3 / 4,
    1.0,
)  # of the pairs, the fastest ones, that keep their mean
LEAST_BITS, MOST_BITS = 1.3, 3.3  # of payload, of the formats that are tried
FORMATS = 4


def with_center(stats: LayerStats, taken: Tensor) -> LayerStats:
    """The statistics as if the mean were b·taken: float64 [Hkv, D] of zeros and ones, alike in the
    two channels of a pair."""
    left = 1 - taken
    whole = stats.key_cov + stats.key_mean[:, :, None] * stats.key_mean[:, None, :]
    cross = left[:, :, None] * stats.cross_moment * taken[:, None, :]
    moment = (
        left[:, :, None] * whole * left[:, None, :]
        + taken[:, :, None] * stats.rest_moment * taken[:, None, :]
    )
    sample = torch.where(taken[:, None, :] > 0, stats.rest_sample, stats.key_sample)
    return replace(
        stats,
        center=stats.center * taken,
        rest_moment=moment + cross + cross.mT,
        rest_sample=sample,
    )


def options(stats: LayerStats, pairs: RopePairs = "halves") -> list[Tensor]:
    """float64 [D] for each of SHARES: 1 where a channel's mean is taken off."""
    dim = stats.center.shape[-1]
    tables = turn_tables(tuple(stats.frequencies.tolist()), dim, 0, torch.device("cpu"), pairs)
    found = []
    for share in SHARES:
        taken = torch.ones(dim, dtype=torch.float64)
        count = round(share * dim / 2)
        taken[tables.first[:count]] = taken[tables.second[:count]] = 0.0
        found.append(taken)
    return found


def middle(formats: Sequence[Format]) -> list[Format]:
    """Some of a side's formats that an artifact is likely to use."""
    coded = sorted(
        (f for f in formats if f.kind.symmetric),
        key=lambda f: f.payload_bits,
    )
    near = [f for f in coded if LEAST_BITS <= f.payload_bits <= MOST_BITS]
    return near[:: max(1, -(-len(near) // FORMATS))]


def best_center(stats: LayerStats, formats: Sequence[Format], request: Request) -> LayerStats:
    """The statistics with the mean taken off the pairs of each KV head where that is worth it.

    Args:
        formats: that the layer's keys are offered.
        request: of the transform `whiten`.
    """
    tried = middle(formats)
    if not tried:
        return stats
    metric = None if "metric" in request.without else stats.query_moment
    choices = options(stats, request.pairs)
    costs = []
    for taken in choices:
        other = with_center(stats, taken.expand_as(stats.center))
        eigen = eigenbasis(other.rest_moment, metric)
        logs = []
        for fmt in tried:
            matrix = half_whitened(other.rest_moment, metric, replace(request, fmt=fmt), eigen)
            inverse = torch.linalg.inv(matrix)
            z = to_float16(other.rest_sample @ matrix.float().mT).float()
            delta = (round_trip(z, fmt) - z).double()
            error = torch.einsum(
                "hti,hij,htj->h", delta, inverse.mT @ stats.query_moment @ inverse, delta
            )
            logs.append(error.clamp_min(1e-300).log())
        costs.append(torch.stack(logs).mean(0))
    best = torch.stack(costs).argmin(
        0
    )  # [Hkv]; of equal ones the first, which takes most means off
    return with_center(stats, torch.stack(choices)[best])
