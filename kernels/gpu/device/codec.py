"""Elements of a head's block of a page, coded and decoded one by one from a format's table
(gpu/tables.py), for the Triton kernels that write and decode pages.

Every operation that rounds is the correctly rounded one, and kernels are compiled without fused
multiply-add, so that bytes equal those of the reference (quantizer.py); only the sum under a root
mean square may be taken in another order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.columns import (
    GROUP_SIZE,
    HEAD_DIM,
    HEADER,
    KIND,
    LEFT,
    PARAM_NBYTES,
    PARAMS,
    SCALE_MIN,
    STEP,
    WEIGHT,
    WHOLE,
    WORDS,
)
from kvfold.kernels.gpu.device.constants import ROUNDING

TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # smallest normal float32
FP16_MAX: tl.constexpr = tl.constexpr(65504.0)
IN_BLOCKS: tl.constexpr = tl.constexpr(2)  # of PACKED: a page's source is rows in blocks


class Header(NamedTuple):
    """What a table says of all channels; see columns.py."""

    head_dim: Any
    kind: Any
    params: Any
    param_nbytes: Any
    group_size: Any
    whole: Any
    left: Any
    words: Any


class RawRows(NamedTuple):
    """Tokens of a page in 16-bit rows: token f·R + row of the page in row start + f·R + row, or,
    from row `end` on, `ring` rows before that."""

    rows: Any  # pointer to float16
    stride: Any  # from one row to the next
    start: Any
    end: Any
    ring: Any


class PackedBlock(NamedTuple):
    """Tokens of a page in the block of a head of another page."""

    block: Any  # pointer to uint8
    table: Any  # of its format
    header: Header


@triton.jit
def to_e4m3(x):
    """float32 → e4m3 byte as int32: to nearest, ties to even, saturating at ±448. Integer
    arithmetic, since the interpreter casts with another rounding."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # exponents differ by 120
    small = (size * 512.0 + ROUNDING).to(
        tl.int32, bitcast=True
    ) & 15  # adding 2^23 rounds to whole multiples of 2^-9
    return tl.where(x != x, 0x7F, sign | tl.where(bits < 0x3C800000, small, normal))


@triton.jit
def from_e4m3(byte):
    """e4m3 byte as int32 → float32."""
    normal = (((byte & 0x7F) << 20) + 0x3C000000).to(tl.float32, bitcast=True)
    size = tl.where((byte & 0x78) == 0, (byte & 7).to(tl.float32) * 0.001953125, normal)
    size = tl.where((byte & 0x7F) == 0x7F, float("nan"), size)
    return tl.where((byte & 0x80) != 0, -size, size)


@triton.jit
def to_fp16(x):
    """float32 → float16, saturating; NaN stays NaN."""
    return tl.where(x != x, x, tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX)).to(tl.float16)


@triton.jit
def read_header(table):
    """What a table says of all channels, read once."""
    return Header(
        tl.load(table + HEAD_DIM),
        tl.load(table + KIND),
        tl.load(table + PARAMS),
        tl.load(table + PARAM_NBYTES),
        tl.load(table + GROUP_SIZE),
        tl.load(table + WHOLE),
        tl.load(table + LEFT),
        tl.load(table + WORDS),
    )


@triton.jit
def channel_row(table, dim, c, mask, row):
    """A number of each of the channels c; 0 where not mask."""
    return tl.load(table + (HEADER + row * dim) + c, mask=mask, other=0)


@triton.jit
def channel_step(table, dim, c, mask):
    """Steps of the channels c, float32; 1 where not mask."""
    bits = tl.load(table + (HEADER + STEP * dim) + c, mask=mask, other=0x3F800000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def channel_weight(table, dim, c, mask):
    """How much errors of the channels c count, float32; 0 where not mask."""
    return channel_row(table, dim, c, mask, WEIGHT).to(tl.float32, bitcast=True)


@triton.jit
def rounded_param(x, nbytes):
    """Float32 parameters as their stored type of `nbytes` bytes holds them."""
    return tl.where(nbytes == 2, to_fp16(x).to(tl.float32), from_e4m3(to_e4m3(x)))


@triton.jit
def store_param(block, x, at, nbytes, mask):
    """Rounds float32 parameters to their stored type of `nbytes` bytes and writes them `at` bytes
    behind the block."""
    tl.store((block + at).to(tl.pointer_type(tl.float16)), to_fp16(x), mask=mask & (nbytes == 2))
    tl.store(block + at, to_e4m3(x).to(tl.uint8), mask=mask & (nbytes == 1))


@triton.jit
def _load_param(block, at, nbytes, mask):
    """Parameters as float32; −0, which no sum changes by, where not mask."""
    word = tl.load((block + (at & -2)).to(tl.pointer_type(tl.int16)), mask=mask, other=0).to(
        tl.int32
    )
    half = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    byte = (word >> (8 * (at & 1))) & 255
    return tl.where(mask, tl.where(nbytes == 2, half, from_e4m3(byte)), -0.0)


@triton.jit
def load_params(block, header, f, row, group, mask, ROWS: tl.constexpr):
    """(minima, scales) of tokens (field f, row) in a parameter group, as the block holds them."""
    nbytes = header.param_nbytes
    from_minimum = (header.kind == SCALE_MIN).to(tl.int32)
    at = header.params + ((2 * group + from_minimum) * (8 * ROWS) + row * 8 + f) * nbytes
    stored = mask & (row < ROWS)
    scale = _load_param(block, at, nbytes, stored)
    minimum = _load_param(block, at - 8 * ROWS * nbytes, nbytes, stored & (from_minimum > 0))
    return minimum, scale


@triton.jit
def quantise(x, params, levels, step, from_minimum):
    """Codes, int32, of float32 elements.

    Args:
        params: from `load_params`; levels, step: of the channels, int32 and float32.
        from_minimum: whether codes count from a minimum, else about zero.
    """
    minimum, scale = params
    count = levels.to(tl.float32)
    u = tl.math.div_rn(x - minimum, tl.maximum(scale, TINY) * step)
    u = u + tl.where(from_minimum, 0.0, count * 0.5)
    u = tl.minimum(tl.maximum(u, 0.0), count - 1.0)
    nearest = (u + ROUNDING).to(
        tl.int32, bitcast=True
    ) & 0x1FF  # adding 2^23 rounds to nearest, ties to even
    return tl.where(from_minimum, nearest, u.to(tl.int32))  # or the floor, of what is not negative
