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
from kvfold.kernels.gpu.device.columns import ALONG, FACTORS, LEVELS, MOST_UNITS, TRIALS
from kvfold.kernels.gpu.device.kinds import load_source
from kvfold.kernels.gpu.device.tiles import TOKEN_TILE, tile_width


@triton.jit
def _units(x, most):
    """int32, cut off at ±most; NaN counts as the lower end."""
    x = tl.where(x > -most, x, -most)
    return tl.where(x < most, x, most).to(tl.int32)


@triton.jit
def _number(table, place):
    return tl.load(table + place).to(tl.float32, bitcast=True)


@triton.jit
def best_scale(
    table, header, root, source, ROWS: tl.constexpr, PACKED: tl.constexpr, OWN: tl.constexpr
):
    """Scales of a page's tokens, float32 [tokens], as they are stored; `root`: their root mean
    squares over the stored channels, not yet rounded."""
    tokens: tl.constexpr = 8 * ROWS
    width: tl.constexpr = tile_width(TOKEN_TILE, tokens)
    dim, nbytes = header.head_dim, header.param_nbytes
    most = _number(table, MOST_UNITS)
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
        size += tl.sum(_units(v * weight * v, most), 1)
        for k in range(TRIALS):
            scale = rounded_param(root * _number(table, FACTORS + k), nbytes)[:, None]
            u = tl.math.div_rn(x, tl.maximum(scale, TINY) * step) + levels * 0.5
            code = tl.minimum(tl.maximum(tl.floor(u), 0.0), tl.maximum(levels - 1.0, 0.0))
            n = tl.math.div_rn(x - (code - (levels - 1.0) * 0.5) * (scale * step), unit)
            weighted = n * weight
            along += tl.where(trial == k, tl.sum(_units(weighted * v, most), 1)[:, None], 0)
            error += tl.where(trial == k, tl.sum(_units(weighted * n, most), 1)[:, None], 0)
    part = along.to(tl.float32)
    ratio = tl.math.div_rn(part, tl.maximum(size, 1).to(tl.float32)[:, None])
    best = tl.argmin(error.to(tl.float32) + _number(table, ALONG) * (part * ratio), 1)
    return rounded_param(root * _number(table, FACTORS + best), nbytes)
