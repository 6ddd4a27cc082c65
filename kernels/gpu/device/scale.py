"""The scale of symmetric codes: which multiple of a token's root mean square suits it best. See
kinds/symmetric.py, whose choice this is, bit for bit, given the same root mean square."""

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.codec import (
    TINY,
    channel_row,
    channel_step,
    channel_weight,
    rounded_param,
)
from kvfold.kernels.gpu.device.columns import FACTORS, LEVELS
from kvfold.kernels.gpu.device.kinds import load_source
from kvfold.kernels.gpu.device.tiles import TOKEN_TILE, tile_width
from kvfold.kernels.kinds import symmetric

TRIALS: tl.constexpr = tl.constexpr(len(symmetric.FACTORS))  # a power of two
ALONG: tl.constexpr = tl.constexpr(symmetric.ALONG)
MOST_UNITS: tl.constexpr = tl.constexpr(symmetric.MOST_UNITS)


@triton.jit
def _units(x):
    """int32, cut off at ±MOST_UNITS; NaN counts as the lower end."""
    x = tl.where(x > -MOST_UNITS, x, -MOST_UNITS)
    return tl.where(x < MOST_UNITS, x, MOST_UNITS).to(tl.int32)


@triton.jit
def _factor(table, k):
    return tl.load(table + FACTORS + k).to(tl.float32, bitcast=True)


@triton.jit
def best_scale(
    table, header, root, source, ROWS: tl.constexpr, PACKED: tl.constexpr, OWN: tl.constexpr
):
    """Scales of a page's tokens, float32 [tokens], as they are stored; `root`: their root mean
    squares over the stored channels, not yet rounded."""
    tokens: tl.constexpr = 8 * ROWS
    width: tl.constexpr = tile_width(TOKEN_TILE, tokens)
    dim, nbytes = header.head_dim, header.param_nbytes
    t = tl.arange(0, tokens)[:, None]
    s = tl.arange(0, width)[None, :]
    trial = tl.arange(0, TRIALS)[None, :]
    root = rounded_param(root, nbytes)
    unit = tl.maximum(root, TINY)[:, None]
    error = tl.zeros((tokens, TRIALS), tl.int32)
    along = tl.zeros((tokens, TRIALS), tl.int32)
    size = tl.zeros((tokens,), tl.int32)
    for first in range(0, dim, width):
        c = first + s
        inside = c < dim
        x = load_source(source, t // ROWS, t % ROWS, c, inside, ROWS, PACKED, OWN)
        levels = channel_row(table, dim, c, inside, LEVELS).to(tl.float32)
        step = channel_step(table, dim, c, inside)
        weight = channel_weight(table, dim, c, inside)
        v = tl.math.div_rn(x, unit)
        size += tl.sum(_units(v * weight * v), 1)
        for k in range(TRIALS):
            scale = rounded_param(root * _factor(table, k), nbytes)[:, None]
            u = tl.math.div_rn(x, tl.maximum(scale, TINY) * step) + levels * 0.5
            code = tl.minimum(tl.maximum(tl.floor(u), 0.0), tl.maximum(levels - 1.0, 0.0))
            n = tl.math.div_rn(x - (code - (levels - 1.0) * 0.5) * (scale * step), unit)
            weighted = n * weight
            along += tl.where(trial == k, tl.sum(_units(weighted * v), 1)[:, None], 0)
            error += tl.where(trial == k, tl.sum(_units(weighted * n), 1)[:, None], 0)
    part = along.to(tl.float32)
    ratio = tl.math.div_rn(part, tl.maximum(size, 1).to(tl.float32)[:, None])
    best = tl.argmin(error.to(tl.float32) + ALONG * (part * ratio), 1)
    return rounded_param(root * _factor(table, best), nbytes)
