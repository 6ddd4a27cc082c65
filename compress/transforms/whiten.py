"""Keys and values in the whitened eigenbasis of the metric that their error is felt in, with bits
by reverse water-filling.

With Σ_q = E[q qᵀ], W = Σ_q^½ and W Σ_k W = U Λ Uᵀ (λ falling), the error of a logit is the plain
squared error of z = Uᵀ W (k − m_t), whose channels have variances λ. Channels are cut into
contiguous classes; class c of n channels with L levels costs D(L)·(Σ_{i∈c} √λ_i)²/n once it is
half-whitened, which is the smallest that one shared scale allows: M_c = H_n Λ_c^(−¼), H_n
orthogonal and mixing. So M = blockdiag(M_c) Uᵀ W. Rows are then divided by their calibrated
standard deviation, so that the quantiser sees unit variance and one scale a token serves all
channels.

For values the metric is G = mean W_oᵀ W_o in the place of Σ_q, M is fused into v_proj and o_proj,
and there is no offset, so Σ_v = E[v vᵀ] is not centred: tokens with small values often draw the
most attention, and their error must stay in proportion to their own norm.

In both moments a token counts as much as later queries attend to it (compress/attended.py).

m_t is the rotating mean of keys, their mean before RoPE turned to the key's position
(kernels/key_mean.py), and Σ_k the second moment of what it leaves; in a layer without RoPE m_t = μ
= E[k].

Where a gate multiplies each channel before o_proj, M of values is a permutation with scales
(channels.py).

Five parts can be left out, to see what each is worth: "attention" (all tokens count alike), and of
keys "metric" (W = I: the keys' own eigenbasis), "mixing" (H_n = I), "rotation" (m_t = μ, the mean
after RoPE, in every layer) and "offset" (m_t = 0, and Σ_k not centred).
"""

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from kvfold.compress.calibrate import LayerStats
from kvfold.compress.transforms.basis import mixing_matrix, regularised, symmetric_power
from kvfold.compress.transforms.channels import channel_variances, ordered
from kvfold.compress.transforms.interface import Basis, Request, Transform
from kvfold.kernels.formats import Format
from kvfold.kernels.kinds.levels import GAUSSIAN_MSE, PLANE_WIDTHS

CLASS_LEVELS = (64, 32, 16, 8, 4, 2, 0)  # of a class, falling with the variance
FLOOR = 1e-6  # least variance of a channel, as a part of its head's largest
DEAD = 1e-20  # a head of less variance is left unscaled
MAX_COMPOSITIONS = 80_000  # more cuts than this: classes get coarser


def turning(stats: LayerStats, without: tuple[str, ...]) -> bool:
    """Whether the mean that is taken off keys turns with them."""
    return bool(len(stats.frequencies)) and not {"offset", "rotation"} & set(without)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[:, :, None] * b[:, None, :]


def _moment(stats: LayerStats, without: tuple[str, ...]) -> Tensor:
    """Σ_k of what is coded: without its mean, unless the offset is left out."""
    plain, mean = "attention" in without, stats.key_mean
    if turning(stats, without):
        return stats.rest_moment if plain else stats.attended_rest
    if "offset" in without:
        return stats.key_cov + _outer(mean, mean) if plain else stats.attended_keys
    if plain:
        return stats.key_cov
    cross = _outer(stats.attended_mean, mean)
    return stats.attended_keys - cross - cross.mT + _outer(mean, mean)


def value_moment(stats: LayerStats, without: tuple[str, ...] = ()) -> Tensor:
    """Σ_v, float64 [Hkv, D, D]."""
    if "attention" in without:
        return stats.value_cov + _outer(stats.value_mean, stats.value_mean)
    return stats.attended_values


def eigenbasis(moment: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """Uᵀ W and λ of every head, from Σ and W² (None for the identity): float64 [Hkv, D, D] and
    [Hkv, D], λ falling."""
    root = (
        symmetric_power(metric, 0.5)
        if metric is not None
        else torch.eye(moment.shape[-1], dtype=torch.float64)
    )
    values, vectors = torch.linalg.eigh(root @ moment @ root)
    return vectors.flip(-1).mT @ root, values.flip(-1).clamp_min(0)


def whitened(stats: LayerStats, without: tuple[str, ...] = ()) -> tuple[Tensor, Tensor]:
    """The keys' eigenbasis: Uᵀ W and λ of every KV head."""
    return eigenbasis(_moment(stats, without), None if "metric" in without else stats.query_moment)


@cache
def compositions(head_dim: int) -> np.ndarray:
    """All ways to cut head_dim channels into the classes of CLASS_LEVELS: int [cuts, classes]
    channels, in a fixed order."""
    unit = 8
    parts = len(CLASS_LEVELS) - 1
    while np.prod([(head_dim // unit + i) / i for i in range(1, parts + 1)]) > MAX_COMPOSITIONS:
        unit *= 2
    total = head_dim // unit
    bars = np.array(list(itertools.combinations(range(total + parts), parts)))
    ends = np.full((len(bars), 1), total + parts)
    sizes = (
        np.diff(np.concatenate([np.full((len(bars), 1), -1), bars, ends], 1), axis=1) - 1
    ) * unit
    rest = (
        head_dim - total * unit
    )  # where the coarser unit does not divide head_dim: the first class takes the rest
    sizes[np.arange(len(sizes)), np.argmax(sizes > 0, axis=1)] += rest
    return sizes


def code_bits(head_dim: int) -> np.ndarray:
    """Mean bits per channel of each of `compositions`, codes alone: float64 [cuts]."""
    width = np.array([sum(PLANE_WIDTHS[n]) for n in CLASS_LEVELS])
    return (compositions(head_dim) * width).sum(1) / head_dim


def cut_distortions(variances: np.ndarray) -> np.ndarray:
    """Distortion of each of `compositions` as a part of a head's whole variance, summed over heads.

    Args:
        variances: float64 [Hkv, D], falling.
    Returns:
        float64 [cuts].
    """
    sizes = compositions(variances.shape[-1])  # [cuts, classes]
    edges = np.concatenate([np.zeros((len(sizes), 1), int), sizes.cumsum(1)], 1)
    roots = np.concatenate([np.zeros((len(variances), 1)), np.sqrt(variances)], 1).cumsum(
        1
    )  # [Hkv, D+1]
    cost = np.zeros(len(sizes))
    mse = np.array([GAUSSIAN_MSE[n] for n in CLASS_LEVELS])
    for head, total in zip(roots, np.maximum(variances.sum(-1), 1e-30).tolist(), strict=True):
        mass = head[edges[:, 1:]] - head[edges[:, :-1]]
        cost += (mse * mass**2 / np.maximum(sizes, 1)).sum(1) / total
    return cost


def cut_format(sizes: np.ndarray) -> Format:
    """The format of one cut: int [classes] channels."""
    classes = tuple((int(n), levels) for n, levels in zip(sizes, CLASS_LEVELS, strict=True) if n)
    return Format(classes, "scale", "e4m3")


def water_fill(variances: Tensor, mean_bits: tuple[float, ...]) -> list[Format]:
    """The best format for each mean number of code bits, shared by a layer's KV heads.

    Args:
        variances: float64 [Hkv, D], falling.
        mean_bits: code bits per channel, upper limits.
    Returns:
        One format for each limit that some cut meets, cheapest first, without repeats.
    """
    sizes, cost = compositions(variances.shape[-1]), cut_distortions(variances.numpy())
    bits = code_bits(variances.shape[-1])
    formats: dict[Format, None] = {}
    for limit in sorted(mean_bits):
        allowed = np.flatnonzero((bits <= limit + 1e-9) & (bits > 0))
        if len(allowed):
            formats[cut_format(sizes[allowed[np.argmin(cost[allowed])]])] = None
    return list(formats)


def half_whitened(moment: Tensor, metric: Tensor | None, request: Request) -> Tensor:
    """M for one format, float64 [Hkv, D, D]; for a format of one class it is the balanced basis."""
    assert request.fmt is not None
    basis, variances = request.eigen or eigenbasis(moment, metric)
    quarter = regularised(variances) ** -0.25
    generator = request.generator()
    rows = []
    start = 0
    for channels, _ in request.fmt.classes:
        part = slice(start, start + channels)
        block = quarter[:, part, None] * basis[:, part]
        rows.append(
            block if "mixing" in request.without else mixing_matrix(channels, generator) @ block
        )
        start += channels
    matrix = torch.cat(rows, 1)
    variance = torch.einsum("hij,hjk,hik->hi", matrix, moment, matrix)
    top = variance.amax(-1, keepdim=True)
    # a channel that calibration saw dead may fire later: it must not saturate the 16-bit rows
    variance = torch.where(
        top > DEAD, torch.maximum(variance, FLOOR * top), torch.ones_like(variance)
    )
    return matrix / variance.sqrt()[..., None]


def whiten(stats: LayerStats, request: Request) -> Basis:
    """M and the mean of keys."""
    metric = None if "metric" in request.without else stats.query_moment
    matrix = half_whitened(_moment(stats, request.without), metric, request)
    if turning(stats, request.without):
        return Basis(online=matrix, offset=stats.center, frequencies=stats.frequencies)
    return Basis(online=matrix, offset=None if "offset" in request.without else stats.key_mean)


def with_eigenbasis(stats: LayerStats, request: Request) -> Request:
    """The keys' eigenbasis goes into all their bases."""
    return replace(request, eigen=whitened(stats, request.without))


def with_value_eigenbasis(stats: LayerStats, request: Request) -> Request:
    """The same of values; channels that are only permuted need none."""
    if request.gated:
        return request
    moment = value_moment(stats, request.without)
    return replace(request, eigen=eigenbasis(moment, stats.output_metric))


def whiten_values(stats: LayerStats, request: Request) -> Basis:
    """M of values; of gated ones a permutation with scales."""
    moment = value_moment(stats, request.without)
    if request.gated:
        return Basis(fused=ordered(moment, stats))
    return Basis(fused=half_whitened(moment, stats.output_metric, request))


def value_variances(stats: LayerStats, request: Request) -> Tensor:
    """λ of values, float64 [Hkv, D], falling."""
    moment = value_moment(stats, request.without)
    if request.gated:
        return channel_variances(moment, stats)[0]
    return eigenbasis(moment, stats.output_metric)[1]


KEYS = Transform(
    "whiten",
    whiten,
    mixed=lambda stats, bits, request: (
        list(request.catalogue) or water_fill(whitened(stats, request.without)[1], bits)
    ),
    each_format=True,
    shared=with_eigenbasis,
)
VALUES = Transform(
    "whiten",
    whiten_values,
    mixed=lambda stats, bits, request: (
        list(request.catalogue) or water_fill(value_variances(stats, request), bits)
    ),
    each_format=True,
    shared=with_value_eigenbasis,
)
