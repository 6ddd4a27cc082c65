"""A head's block of a page, coded and decoded element by element, for the Triton kernels that write pages.

Every operation that rounds is the correctly rounded one, and kernels are compiled without fused multiply-add, so that bytes
equal those of the reference (quantizer.py); only the sum under a root mean square may be taken in another order.
"""

import triton
import triton.language as tl

from kvfold.kernels.triton_bits import count, pick

TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # smallest normal float32
FP16_MAX: tl.constexpr = tl.constexpr(65504.0)


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
def _param_ptr(block, index, f, row, F: tl.constexpr):
    """Pointer to parameter `index` of tokens (field f, row), uint8 or float16."""
    params: tl.constexpr = pick(F, 5)
    fp16: tl.constexpr = pick(F, 6)
    rows: tl.constexpr = pick(F, 7)
    place = index * (8 * rows) + row * 8 + f
    if fp16:
        return (block + params + place * 2).to(tl.pointer_type(tl.float16))
    else:
        return block + params + place


@triton.jit
def store_param(block, x, index, f, row, mask, F: tl.constexpr):
    """Rounds float32 parameters to their stored type and writes them."""
    fp16: tl.constexpr = pick(F, 6)
    ptr = _param_ptr(block, index, f, row, F)
    if fp16:
        tl.store(ptr, to_fp16(x), mask=mask)
    else:
        tl.store(ptr, to_e4m3(x).to(tl.uint8), mask=mask)


@triton.jit
def load_param(block, index, f, row, mask, F: tl.constexpr):
    """Parameters as float32."""
    fp16: tl.constexpr = pick(F, 6)
    ptr = _param_ptr(block, index, f, row, F)
    if fp16:
        return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    else:
        return from_e4m3(tl.load(ptr, mask=mask, other=0).to(tl.int32))


@triton.jit
def quantise(x, block, f, row, c, mask, F: tl.constexpr, C: tl.constexpr):
    """Codes, int32, of float32 elements (field f, row, channel c) of a class, with the parameters that the block holds."""
    kind: tl.constexpr = pick(F, 0)
    groups: tl.constexpr = pick(F, 3)
    group_size: tl.constexpr = pick(F, 4)
    levels: tl.constexpr = pick(C, 2)
    step: tl.constexpr = pick(C, 3)
    top: tl.constexpr = levels - 1.0
    if kind == "scale":
        scale = tl.maximum(load_param(block, 0, f, row, row < pick(F, 7), F), TINY) * step
        u = tl.math.div_rn(x, scale + tl.zeros_like(x)) + levels / 2.0
        return tl.minimum(tl.maximum(u, 0.0), top).to(tl.int32)  # the floor, of what is not negative
    else:
        if groups == 1:
            minimum = load_param(block, 0, f, row, row < pick(F, 7), F)
            scale = load_param(block, 1, f, row, row < pick(F, 7), F)
        else:
            minimum = load_param(block, 2 * (c // group_size), f, row, mask, F)
            scale = load_param(block, 2 * (c // group_size) + 1, f, row, mask, F)
        u = tl.math.div_rn(x - minimum, tl.maximum(scale, TINY) + tl.zeros_like(x))
        u = tl.minimum(tl.maximum(u, 0.0), top)
        return (u + 8388608.0).to(tl.int32, bitcast=True) & 0x1FF  # adding 2^23 rounds to nearest, ties to even


@triton.jit
def _plane_code(block, f, row, c, mask, code, C: tl.constexpr, P: tl.constexpr, rows: tl.constexpr):
    """Adds the bits of one plane to the codes of elements (field f, row, channel c)."""
    start: tl.constexpr = pick(C, 0)
    channels: tl.constexpr = pick(C, 1)
    width: tl.constexpr = pick(P, 0)
    shift: tl.constexpr = pick(P, 1)
    offset: tl.constexpr = pick(P, 2)
    j = c - start
    if width == 1:
        half = j // (channels // 2)
        word = row * (channels // 2) + j - half * (channels // 2)
        right = 2 * f + half
    elif width == 2:
        word = row * channels + j
        right = 2 * f + j * 0
    else:
        word = (row + (f // 4) * rows) * channels + j
        right = (f % 2) * 8 + (f // 2 % 2) * 4 + j * 0
    bits = tl.load((block + offset).to(tl.pointer_type(tl.int16)) + word, mask=mask, other=0).to(tl.int32)
    return code | (((bits >> right) & ((1 << width) - 1)) << shift)


@triton.jit
def _trit_code(block, f, row, c, mask, S: tl.constexpr):
    """Ternary codes of elements (field f, row, channel c)."""
    trits: tl.constexpr = pick(S, 2)
    rows: tl.constexpr = pick(S, 7)
    whole: tl.constexpr = pick(trits, 0)
    left: tl.constexpr = pick(trits, 1)
    words: tl.constexpr = pick(trits, 2)
    odd: tl.constexpr = (whole + (1 if left > 2 else 0)) % 2
    number = (c // 16) * 8 + f
    half = tl.minimum(number // 5, whole)
    digit = number - half * 5
    lane = (c % 16) * 2
    at = trit_place(half, row, S)
    if left == 1 or left == 2:
        nibble = (words * rows + odd * ((rows + 1) // 2) + row // 4) * 32 + (row // 2) % 2
        at = tl.where(half == whole, nibble, at)
    byte = tl.load(block + at + lane, mask=mask, other=0).to(tl.int32)
    power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
    code = (((byte * power) & 255) * 3) >> 8
    if left > 0:
        nibble_shift = (row % 2) * 4 if left <= 2 else row * 0
        code = tl.where(half == whole, (byte >> (2 * digit + nibble_shift)) & 3, code)
    return code


@triton.jit
def trit_place(half, row, F: tl.constexpr):
    """Bytes from the plane to half-word `half` of a row, first channel; two of them are a word, an odd last one stands two
    rows to a word."""
    trits: tl.constexpr = pick(F, 2)
    rows: tl.constexpr = pick(F, 7)
    words: tl.constexpr = pick(trits, 2)
    paired = ((half // 2) * rows + row) * 32 + half % 2
    last = (words * rows + row // 2) * 32 + row % 2
    return tl.where(half >= 2 * words, last, paired)


@triton.jit
def _class_values(block, f, row, c, mask, x, S: tl.constexpr, C: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Puts the values of one class where x has its channels; LOW and HIGH bound the channels asked for."""
    kind: tl.constexpr = pick(S, 0)
    trits: tl.constexpr = pick(S, 2)
    groups: tl.constexpr = pick(S, 3)
    group_size: tl.constexpr = pick(S, 4)
    rows: tl.constexpr = pick(S, 7)
    start: tl.constexpr = pick(C, 0)
    channels: tl.constexpr = pick(C, 1)
    levels: tl.constexpr = pick(C, 2)
    step: tl.constexpr = pick(C, 3)
    planes: tl.constexpr = pick(C, 5)
    if levels == 0 or start >= HIGH or start + channels <= LOW:
        return x
    else:
        inside = mask & (c >= start) & (c < start + channels)
        if count(trits) > 0:
            code = _trit_code(block, f, row, c, inside, S)
        else:
            code = x.to(tl.int32) * 0
            for p in tl.static_range(count(planes)):
                code = _plane_code(block, f, row, c, inside, code, C, pick(planes, p), rows)
        if kind == "scale":
            scale = load_param(block, 0, f, row, row < rows, S) * step
            value = (code.to(tl.float32) - (levels - 1) / 2.0) * scale
        elif groups == 1:
            minimum = load_param(block, 0, f, row, row < rows, S)
            value = code.to(tl.float32) * load_param(block, 1, f, row, row < rows, S) + minimum
        else:
            minimum = load_param(block, 2 * (c // group_size), f, row, inside, S)
            value = code.to(tl.float32) * load_param(block, 2 * (c // group_size) + 1, f, row, inside, S) + minimum
        return tl.where(inside, value, x)


@triton.jit
def load_source(
    src, stride, first, sinks, ring, f, row, c, mask, rows: tl.constexpr, S: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Elements (field f, row, channel c) of a page to be written, float32, 0 where not mask.

    Args:
        src: with S = (), float16 rows `stride` apart, token first + f·R + row in the row of that number, or with ring > 0
            in row sinks + (token − sinks) mod ring; else the head's block of a page of layout S.
        f: field, a constant or an int32 tensor; row, c, mask: tensors that broadcast to the result's shape.
        LOW, HIGH: bounds of c.
    """
    if count(S) == 0:
        token = first + f * rows + row
        place = tl.where(ring > 0, sinks + (token - sinks) % tl.maximum(ring, 1), token)
        return tl.load(src + place.to(tl.int64) * stride + c, mask=mask, other=0.0).to(tl.float32)
    else:
        kind: tl.constexpr = pick(S, 0)
        classes: tl.constexpr = pick(S, 1)
        dim: tl.constexpr = pick(S, 9)
        if kind == "raw":
            ptr = src.to(tl.pointer_type(tl.float16)) + (f * rows + row) * dim + c
            return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
        else:
            x = (f * 0 + row * 0 + c * 0).to(tl.float32)
            for i in tl.static_range(count(classes)):
                x = _class_values(src, f, row, c, mask, x, S, pick(classes, i), LOW, HIGH)
            return x
