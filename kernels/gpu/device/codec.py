"""Elements of a head's block of a page, coded and decoded one by one from a format's table (tables.py), for the Triton kernels
that write and decode pages.

Every operation that rounds is the correctly rounded one, and kernels are compiled without fused multiply-add, so that bytes
equal those of the reference (quantizer.py); only the sum under a root mean square may be taken in another order.
"""

import triton
import triton.language as tl

from kvfold.kernels.gpu import tables
from kvfold.kernels.gpu.device.constants import ROUNDING

TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # smallest normal float32
FP16_MAX: tl.constexpr = tl.constexpr(65504.0)
HEADER: tl.constexpr = tl.constexpr(tables.HEADER)
NBYTES: tl.constexpr = tl.constexpr(tables.NBYTES)
DIM: tl.constexpr = tl.constexpr(tables.DIM)
KIND: tl.constexpr = tl.constexpr(tables.KIND)
SCALE_MIN: tl.constexpr = tl.constexpr(tables.KIND_SCALE_MIN)
RAW: tl.constexpr = tl.constexpr(tables.KIND_RAW)
PARAMS: tl.constexpr = tl.constexpr(tables.PARAMS)
PARAM_NBYTES: tl.constexpr = tl.constexpr(tables.PARAM_NBYTES)
GROUP_SIZE: tl.constexpr = tl.constexpr(tables.GROUP_SIZE)
WHOLE: tl.constexpr = tl.constexpr(tables.WHOLE)
LEFT: tl.constexpr = tl.constexpr(tables.LEFT)
WORDS: tl.constexpr = tl.constexpr(tables.WORDS)
LEVELS: tl.constexpr = tl.constexpr(tables.LEVELS)
STEP: tl.constexpr = tl.constexpr(tables.STEP)
WIDTHS: tl.constexpr = tl.constexpr(tables.WIDTHS)
PLANE_0: tl.constexpr = tl.constexpr(tables.PLANE_0)
PLANE_1: tl.constexpr = tl.constexpr(tables.PLANE_1)


@triton.jit
def to_e4m3(x):
    """float32 → e4m3 byte as int32: to nearest, ties to even, saturating at ±448. Integer arithmetic, since the interpreter
    casts with another rounding."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # exponents differ by 120
    small = (size * 512.0 + ROUNDING).to(tl.int32, bitcast=True) & 15  # adding 2^23 rounds to whole multiples of 2^-9
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
    """What a table says of all channels, read once: (head_dim, kind, bytes to the parameters, bytes of one, channels of a group,
    and of ternary codes whole bytes, codes left over, word tiles)."""
    kind_and_size = tl.load(table + DIM), tl.load(table + KIND)
    params = tl.load(table + PARAMS), tl.load(table + PARAM_NBYTES), tl.load(table + GROUP_SIZE)
    return kind_and_size + params + (tl.load(table + WHOLE), tl.load(table + LEFT), tl.load(table + WORDS))


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
def store_param(block, x, at, nbytes, mask):
    """Rounds float32 parameters to their stored type of `nbytes` bytes and writes them `at` bytes behind the block."""
    tl.store((block + at).to(tl.pointer_type(tl.float16)), to_fp16(x), mask=mask & (nbytes == 2))
    tl.store(block + at, to_e4m3(x).to(tl.uint8), mask=mask & (nbytes == 1))


@triton.jit
def _load_param(block, at, nbytes, mask):
    """Parameters as float32; −0, which no sum changes by, where not mask."""
    word = tl.load((block + (at & -2)).to(tl.pointer_type(tl.int16)), mask=mask, other=0).to(tl.int32)
    half = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    byte = (word >> (8 * (at & 1))) & 255
    return tl.where(mask, tl.where(nbytes == 2, half, from_e4m3(byte)), -0.0)


@triton.jit
def load_params(block, header, f, row, group, mask, ROWS: tl.constexpr):
    """(minima, scales) of tokens (field f, row) in a parameter group, as the block holds them."""
    _, kind, params, nbytes, _, _, _, _ = header
    from_minimum = (kind == SCALE_MIN).to(tl.int32)
    at = params + ((2 * group + from_minimum) * (8 * ROWS) + row * 8 + f) * nbytes
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
    nearest = (u + ROUNDING).to(tl.int32, bitcast=True) & 0x1FF  # adding 2^23 rounds to nearest, ties to even
    return tl.where(from_minimum, nearest, u.to(tl.int32))  # or the floor, of what is not negative


@triton.jit
def _plane_code(block, plane, width, half, f, row, mask, ROWS: tl.constexpr):
    """Bits of one plane of elements (field f, row) of channels whose words a table describes with `plane`; all 16 of raw ones."""
    stride = plane >> 16
    at = (plane & 0xFFFF) + row * stride
    at += tl.where(width == 4, f >> 2, tl.where(width == 16, f, 0)) * (ROWS * stride)
    place = tl.where(width == 4, (f & 1) * 8 + (f >> 1 & 1) * 4, 2 * f + tl.where(width == 1, half, 0))
    words = block.to(tl.pointer_type(tl.int16)) + at
    word = tl.load(words, mask=mask & (width > 0) & (row < ROWS), other=0).to(tl.int32)
    return (word >> tl.where(width == 16, 0, place)) & ((1 << width) - 1)


@triton.jit
def trit_place(half, row, words, ROWS: tl.constexpr):
    """Bytes from the plane to half-word `half` of a row, first channel; two of them are a word, an odd last one stands two
    rows to a word."""
    paired = ((half >> 1) * ROWS + row) * 32 + (half & 1)
    last = (words * ROWS + row // 2) * 32 + row % 2
    return tl.where(half >= 2 * words, last, paired)


@triton.jit
def nibble_place(whole, row, words, ROWS: tl.constexpr):
    """Bytes from the plane to what is left over in four bits, four rows to a word. No byte follows the `whole` ones then."""
    return (words * ROWS + (whole & 1) * ((ROWS + 1) // 2) + row // 4) * 32 + (row // 2) % 2


@triton.jit
def _trit_code(block, header, f, row, c, mask, ROWS: tl.constexpr):
    """Ternary codes of elements (field f, row, channel c)."""
    _, _, _, _, _, whole, left, words = header
    number = (c >> 4) * 8 + f
    half = tl.minimum(number // 5, whole)
    digit = number - half * 5
    in_nibbles = (half == whole) & (left <= 2)
    at = tl.where(in_nibbles, nibble_place(whole, row, words, ROWS), trit_place(half, row, words, ROWS))
    byte = tl.load(block + at + (c & 15) * 2, mask=mask & (row < ROWS), other=0).to(tl.int32)
    power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
    code = (((byte * power) & 255) * 3) >> 8
    rest = (byte >> (2 * digit + tl.where(in_nibbles, (row % 2) * 4, 0))) & 3
    return tl.where(half == whole, rest, code)


@triton.jit
def decode_elements(block, table, header, f, row, c, mask, ROWS: tl.constexpr):
    """Elements (field f, row, channel c) of a head's block, float32; 0 where nothing is stored or not mask.

    Args:
        header: `read_header` of the table.
        f, row, c: integers or tensors that broadcast to the result's shape, as does mask; c and mask are of one shape.
    """
    dim, kind, _, _, group_size, whole, _, _ = header
    if whole > 0:
        code = _trit_code(block, header, f, row, c, mask, ROWS)
    else:
        widths = channel_row(table, dim, c, mask, WIDTHS)
        half = widths >> 16
        first = widths & 255
        plane_0, plane_1 = channel_row(table, dim, c, mask, PLANE_0), channel_row(table, dim, c, mask, PLANE_1)
        code = _plane_code(block, plane_0, first, half, f, row, mask, ROWS)
        code |= _plane_code(block, plane_1, widths >> 8 & 255, half, f, row, mask, ROWS) << first
    levels = channel_row(table, dim, c, mask, LEVELS)
    minimum, scale = load_params(block, header, f, row, c // group_size, mask & (kind != RAW), ROWS)
    centre = tl.where(kind == SCALE_MIN, 0.0, (levels - 1).to(tl.float32) * 0.5)
    value = (code.to(tl.float32) - centre) * (scale * channel_step(table, dim, c, mask)) + minimum
    value = tl.where(kind == RAW, code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), value)
    return tl.where(levels > 0, value, 0.0)


@triton.jit
def load_source(source, f, row, c, mask, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """Elements (field f, row, channel c) of a page to be written, float32, 0 where not mask.

    Args:
        source: (rows, stride, start, end, ring): float16 rows `stride` apart, token f·R + row of the page in row
            start + f·R + row, or, from row `end` on, `ring` rows before that. With PACKED, (block, table, header) of a page.
        f, row, c: integers or tensors that broadcast to the result's shape, as does mask; c and mask are of one shape.
    """
    if PACKED:
        block, table, header = source
        return decode_elements(block, table, header, f, row, c, mask, ROWS)
    else:
        rows, stride, start, end, ring = source
        place = start + f * ROWS + row
        place = tl.where(place >= end, place - ring, place)
        return tl.load(rows + place.to(tl.int64) * stride + c, mask=mask, other=0.0).to(tl.float32)
