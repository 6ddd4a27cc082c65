"""Elements of a head's block of a page, coded and decoded one by one from a format's table (tables.py), for the Triton kernels
that write and decode pages.

Every operation that rounds is the correctly rounded one, and kernels are compiled without fused multiply-add, so that bytes
equal those of the reference (quantizer.py); only the sum under a root mean square may be taken in another order.
"""

import triton
import triton.language as tl

from kvfold.kernels import tables

TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # smallest normal float32
FP16_MAX: tl.constexpr = tl.constexpr(65504.0)
HEADER: tl.constexpr = tl.constexpr(tables.HEADER)
DIM: tl.constexpr = tl.constexpr(tables.DIM)
KIND: tl.constexpr = tl.constexpr(tables.KIND)
SCALE_MIN: tl.constexpr = tl.constexpr(tables.KIND_SCALE_MIN)
RAW: tl.constexpr = tl.constexpr(tables.KIND_RAW)
PARAM_NBYTES: tl.constexpr = tl.constexpr(tables.PARAM_NBYTES)
WHOLE: tl.constexpr = tl.constexpr(tables.WHOLE)
LEFT: tl.constexpr = tl.constexpr(tables.LEFT)
WORDS: tl.constexpr = tl.constexpr(tables.WORDS)
LEVELS: tl.constexpr = tl.constexpr(tables.LEVELS)
STEP: tl.constexpr = tl.constexpr(tables.STEP)
SCALE: tl.constexpr = tl.constexpr(tables.SCALE)
HALF: tl.constexpr = tl.constexpr(tables.HALF)
PLANE_0: tl.constexpr = tl.constexpr(tables.PLANE[0])
PLANE_1: tl.constexpr = tl.constexpr(tables.PLANE[1])
PLACE: tl.constexpr = tl.constexpr(tables.PLACE)
STRIDE: tl.constexpr = tl.constexpr(tables.STRIDE)
WIDTH: tl.constexpr = tl.constexpr(tables.WIDTH)


@triton.jit
def to_e4m3(x):
    """float32 → e4m3 byte as int32: to nearest, ties to even, saturating at ±448. Integer arithmetic, since the interpreter
    casts with another rounding."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # exponents differ by 120
    small = (size * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 15  # adding 2^23 rounds to whole multiples of 2^-9
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
def words_at(block, at):
    """int16 pointers `at` bytes, a multiple of 2, behind a uint8 pointer."""
    return (block + at).to(tl.pointer_type(tl.int16))


@triton.jit
def store_param(block, x, at, nbytes, mask):
    """Rounds float32 parameters to their stored type of `nbytes` bytes and writes them `at` bytes behind the block."""
    tl.store((block + at).to(tl.pointer_type(tl.float16)), to_fp16(x), mask=mask & (nbytes == 2))
    tl.store(block + at, to_e4m3(x).to(tl.uint8), mask=mask & (nbytes == 1))


@triton.jit
def load_param(block, at, nbytes, mask):
    """Parameters as float32; −0, which no sum changes by, where not mask."""
    word = tl.load(words_at(block, at & -2), mask=mask, other=0).to(tl.int32)
    half = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    byte = (word >> (8 * (at & 1))) & 255
    return tl.where(mask, tl.where(nbytes == 2, half, from_e4m3(byte)), -0.0)


@triton.jit
def channel_row(table, c, mask, row):
    """A number of each of the channels c."""
    return tl.load(table + HEADER + row * tl.load(table + DIM) + c, mask=mask, other=0)


@triton.jit
def channel_step(table, c, mask):
    """Steps of the channels c, float32; 1 where not mask."""
    bits = tl.load(table + HEADER + STEP * tl.load(table + DIM) + c, mask=mask, other=0x3F800000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_params(block, table, f, row, c, mask, ROWS: tl.constexpr):
    """(minima, scales) of elements (field f, row, channel c), as the block holds them."""
    nbytes = tl.load(table + PARAM_NBYTES)
    at = channel_row(table, c, mask, SCALE) + (row * 8 + f) * nbytes
    stored = mask & (row < ROWS)
    scale = load_param(block, at, nbytes, stored)
    minimum = load_param(block, at - 8 * ROWS * nbytes, nbytes, stored & (tl.load(table + KIND) == SCALE_MIN))
    return minimum, scale


@triton.jit
def quantise(x, block, table, f, row, c, mask, levels, step, ROWS: tl.constexpr):
    """Codes, int32, of float32 elements (field f, row, channel c), with the parameters that the block holds.

    Args:
        levels, step: of the channels, int32 and float32.
    """
    minimum, scale = load_params(block, table, f, row, c, mask, ROWS)
    from_minimum = tl.load(table + KIND) == SCALE_MIN
    count = levels.to(tl.float32)
    u = tl.math.div_rn(x - minimum, tl.maximum(scale, TINY) * step)
    u = u + tl.where(from_minimum, 0.0, count * 0.5)
    u = tl.minimum(tl.maximum(u, 0.0), count - 1.0)
    nearest = (u + 8388608.0).to(tl.int32, bitcast=True) & 0x1FF  # adding 2^23 rounds to nearest, ties to even
    return tl.where(from_minimum, nearest, u.to(tl.int32))  # or the floor, of what is not negative


@triton.jit
def _plane_code(block, table, f, row, c, mask, plane, half, ROWS: tl.constexpr):
    """(bits of one plane, their number) of elements (field f, row, channel c); of raw ones all 16."""
    width = channel_row(table, c, mask, plane + WIDTH)
    stride = channel_row(table, c, mask, plane + STRIDE)
    at = channel_row(table, c, mask, plane + PLACE) + row * stride
    at += tl.where(width == 4, f >> 2, tl.where(width == 16, f, 0)) * (ROWS * stride)
    right = tl.where(width == 4, (f & 1) * 8 + (f >> 1 & 1) * 4, tl.where(width == 16, 0, 2 * f + tl.where(width == 1, half, 0)))
    word = tl.load(words_at(block, at), mask=mask & (width > 0) & (row < ROWS), other=0).to(tl.int32)
    return (word >> right) & ((1 << width) - 1), width


@triton.jit
def trit_place(half, row, words, ROWS: tl.constexpr):
    """Bytes from the plane to half-word `half` of a row, first channel; two of them are a word, an odd last one stands two
    rows to a word."""
    paired = ((half // 2) * ROWS + row) * 32 + half % 2
    last = (words * ROWS + row // 2) * 32 + row % 2
    return tl.where(half >= 2 * words, last, paired)


@triton.jit
def nibble_place(table, row, ROWS: tl.constexpr):
    """Bytes from the plane to what is left over in four bits, four rows to a word."""
    words = tl.load(table + WORDS)
    odd = tl.load(table + WHOLE) % 2  # with one or two codes left over, no byte follows the whole ones
    return (words * ROWS + odd * ((ROWS + 1) // 2) + row // 4) * 32 + (row // 2) % 2


@triton.jit
def _trit_code(block, table, f, row, c, mask, ROWS: tl.constexpr):
    """Ternary codes of elements (field f, row, channel c)."""
    whole = tl.load(table + WHOLE)
    left = tl.load(table + LEFT)
    number = (c >> 4) * 8 + f
    half = tl.minimum(number // 5, whole)
    digit = number - half * 5
    in_nibbles = (half == whole) & (left <= 2)
    at = tl.where(in_nibbles, nibble_place(table, row, ROWS), trit_place(half, row, tl.load(table + WORDS), ROWS))
    byte = tl.load(block + at + (c & 15) * 2, mask=mask & (row < ROWS), other=0).to(tl.int32)
    power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
    code = (((byte * power) & 255) * 3) >> 8
    rest = (byte >> (2 * digit + tl.where(in_nibbles, (row % 2) * 4, 0))) & 3
    return tl.where(half == whole, rest, code)


@triton.jit
def decode_elements(block, table, f, row, c, mask, ROWS: tl.constexpr):
    """Elements (field f, row, channel c) of a head's block, float32; 0 where nothing is stored or not mask.

    Args:
        f, row, c: integers or tensors that broadcast to the result's shape, as does mask.
    """
    kind = tl.load(table + KIND)
    if tl.load(table + WHOLE) > 0:
        code = _trit_code(block, table, f, row, c, mask, ROWS)
    else:
        half = channel_row(table, c, mask, HALF)
        low, width = _plane_code(block, table, f, row, c, mask, PLANE_0, half, ROWS)
        high, _ = _plane_code(block, table, f, row, c, mask, PLANE_1, half, ROWS)
        code = low | (high << width)
    levels = channel_row(table, c, mask, LEVELS)
    coded = mask & (kind != RAW)
    minimum, scale = load_params(block, table, f, row, c, coded, ROWS)
    centre = tl.where(kind == SCALE_MIN, 0.0, (levels - 1).to(tl.float32) * 0.5)
    value = (code.to(tl.float32) - centre) * (scale * channel_step(table, c, mask)) + minimum
    value = tl.where(kind == RAW, code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), value)
    return tl.where(levels > 0, value, 0.0)


@triton.jit
def load_source(src, old, stride, start, end, ring, f, row, c, mask, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """Elements (field f, row, channel c) of a page to be written, float32, 0 where not mask.

    Args:
        src: float16 rows `stride` apart, token f·R + row of the page in row start + f·R + row, or, from row `end` on, `ring`
            rows before that; with PACKED, the head's block of a page of the format of table `old`.
        f, row, c: integers or tensors that broadcast to the result's shape, as does mask.
    """
    if PACKED:
        return decode_elements(src, old, f, row, c, mask, ROWS)
    else:
        place = start + f * ROWS + row
        place = tl.where(place >= end, place - ring, place)
        return tl.load(src + place.to(tl.int64) * stride + c, mask=mask, other=0.0).to(tl.float32)
