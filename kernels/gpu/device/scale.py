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

WHOLE: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it rounds to whole numbers
WHOLE_BITS: tl.constexpr = tl.constexpr(0x4B400000)
TOGETHER: tl.constexpr = tl.constexpr(4)  # trials in one pass over the channels
ROUND: tl.constexpr = tl.constexpr(8388608.0)  # 2^23, the same for what is not negative


@triton.jit
def _units(x, most):
    """int32, cut off at ±most and rounded; NaN counts as the lower end."""
    x = tl.minimum(tl.where(x > -most, x, -most), most)
    return (x + WHOLE).to(tl.int32, bitcast=True) - WHOLE_BITS


@triton.jit
def _number(table, place):
    return tl.load(table + place).to(tl.float32, bitcast=True)


@triton.jit
def best_scale(
    table, header, root, source, ROWS: tl.constexpr, PACKED: tl.constexpr, OWN: tl.constexpr
):
    """Scales of a page's tokens, float32 [tokens], as they are stored; `root`: their root mean
    squares over the stored channels, not yet rounded.

    Sums stay where their channels are until all are read: a sum over a tile's channels would take
    more instructions than what is summed.
    """
    tokens: tl.constexpr = 8 * ROWS
    width: tl.constexpr = tile_width(TOKEN_TILE, tokens)
    dim, nbytes = tl.multiple_of(header.head_dim, 8), header.param_nbytes
    most = _number(table, MOST_UNITS)
    t = tl.arange(0, tokens)[:, None]
    s = tl.arange(0, width)[None, :]
    root = rounded_param(root, nbytes)
    inverse = tl.math.div_rn(1.0, tl.maximum(root, TINY))
    least = tl.zeros((tokens,), tl.float32)
    best = root
    for trial in range(0, TRIALS, TOGETHER):
        scales = ()
        ratios = ()
        backs = ()
        errors = ()
        alongs = ()
        size = tl.zeros((tokens, width), tl.int32)
        for k in tl.static_range(TOGETHER):
            scale = rounded_param(root * _number(table, FACTORS + trial + k), nbytes)
            ratio = scale * inverse
            scales = scales + (scale,)
            ratios = ratios + (ratio[:, None],)
            backs = backs + (tl.math.div_rn(1.0, tl.maximum(ratio, TINY))[:, None],)
            errors = errors + (size,)
            alongs = alongs + (size,)
        for first in range(0, dim, width):
            c = first + s
            inside = c < dim
            x = load_source(source, t // ROWS, t % ROWS, c, inside, ROWS, PACKED, OWN)
            levels = channel_row(table, dim, c, inside, LEVELS).to(tl.float32)
            step = channel_step(table, dim, c, inside)
            weight = channel_weight(table, dim, c, inside)
            middle = (levels - 1.0) * 0.5
            top = tl.maximum(levels - 1.0, 0.0)
            v = x * inverse[:, None]
            in_steps = v * tl.math.div_rn(1.0, step)
            size += _units(v * weight * v, most)
            new_errors = ()
            new_alongs = ()
            for k in tl.static_range(TOGETHER):
                u = tl.minimum(tl.maximum(in_steps * backs[k] + middle, 0.0), top)
                n = v - ((u + ROUND) - ROUND - middle) * (ratios[k] * step)
                weighted = n * weight
                new_alongs = new_alongs + (alongs[k] + _units(weighted * v, most),)
                new_errors = new_errors + (errors[k] + _units(weighted * n, most),)
            errors = new_errors
            alongs = new_alongs
        whole = tl.maximum(tl.sum(size, 1), 1).to(tl.float32)
        for k in tl.static_range(TOGETHER):
            part = tl.sum(alongs[k], 1).to(tl.float32)
            error = tl.sum(errors[k], 1).to(tl.float32)
            cost = error + _number(table, ALONG) * (part * tl.math.div_rn(part, whole))
            better = (cost < least) | (trial + k == 0)
            least = tl.where(better, cost, least)
            best = tl.where(better, scales[k], best)
    return best
