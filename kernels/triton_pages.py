"""Writes one head's block of a page: parameters first, then a class at a time. The pages' part of the writing kernels.

A tile holds the R rows of one field (packing.py), so a token's parameters stay in its row and a word gathers its eight codes
with shifts. Parameters are read back from the page as rounded, in whatever shape a tile needs them.
"""

import triton
import triton.language as tl

from kvfold.kernels.triton_bits import count, pick, pow2
from kvfold.kernels.triton_codec import load_source, quantise, store_param, to_fp16, trit_place


@triton.jit
def _coded(c, mask, C: tl.constexpr):
    """`mask` without the channels of a class that is not stored."""
    start: tl.constexpr = pick(C, 0)
    channels: tl.constexpr = pick(C, 1)
    levels: tl.constexpr = pick(C, 2)
    if levels == 0:
        return mask & ((c < start) | (c >= start + channels))
    else:
        return mask


@triton.jit
def _raw_block(block, src, stride, first, sinks, ring, F: tl.constexpr, S: tl.constexpr):
    rows: tl.constexpr = pick(F, 7)
    dim: tl.constexpr = pick(F, 9)
    row = tl.arange(0, rows)[:, None]
    c = tl.arange(0, pow2(dim))[None, :]
    mask = (c < dim) & (row < rows)
    for f in tl.static_range(8):
        x = load_source(src, stride, first, sinks, ring, f, row, c, mask, rows, S, 0, dim)
        tl.store(block.to(tl.pointer_type(tl.float16)) + (f * rows + row) * dim + c, to_fp16(x), mask=mask)


@triton.jit
def _scale_params(block, src, stride, first, sinks, ring, F: tl.constexpr, S: tl.constexpr):
    """Root mean squares over the stored channels, one a token."""
    classes: tl.constexpr = pick(F, 1)
    rows: tl.constexpr = pick(F, 7)
    dim: tl.constexpr = pick(F, 9)
    coded: tl.constexpr = pick(F, 10)
    r = tl.arange(0, rows)
    row = r[:, None]
    c = tl.arange(0, pow2(dim))[None, :]
    mask = (c < dim) & (row < rows)
    for i in tl.static_range(count(classes)):
        mask = _coded(c, mask, pick(classes, i))
    for f in tl.static_range(8):
        x = load_source(src, stride, first, sinks, ring, f, row, c, mask, rows, S, 0, dim)
        total = tl.sum(x * x, 1)
        mean = tl.math.div_rn(total, tl.full((rows,), coded, tl.float32))
        store_param(block, tl.math.sqrt_rn(mean), 0, f, r, r < rows, F)


@triton.jit
def _min_params(block, clip, src, stride, first, sinks, ring, F: tl.constexpr, S: tl.constexpr, CLIPS: tl.constexpr):
    """Minima and scales, one pair a token and group."""
    classes: tl.constexpr = pick(F, 1)
    groups: tl.constexpr = pick(F, 3)
    size: tl.constexpr = pick(F, 4)
    rows: tl.constexpr = pick(F, 7)
    dim: tl.constexpr = pick(F, 9)
    levels: tl.constexpr = pick(pick(classes, 0), 2)
    padded: tl.constexpr = pow2(groups)
    r = tl.arange(0, rows)
    g = tl.arange(0, padded)
    s = tl.arange(0, pow2(size))
    row = r[:, None, None]
    c = (g * size)[None, :, None] + s[None, None, :]
    mask = (g < groups)[None, :, None] & (s < size)[None, None, :] & (row < rows)
    params = (r < rows)[:, None] & (g < groups)[None, :]
    if CLIPS > 1:
        factor = tl.load(clip + g, mask=g < groups, other=1.0)[None, :]
    elif CLIPS == 1:
        factor = tl.load(clip)
    else:
        factor = 1.0
    for f in tl.static_range(8):
        x = load_source(src, stride, first, sinks, ring, f, row, c, mask, rows, S, 0, dim)
        low = tl.min(tl.where(mask, x, float("inf")), 2) * factor
        high = tl.max(tl.where(mask, x, float("-inf")), 2) * factor
        scale = tl.math.div_rn(high - low, tl.full((rows, padded), levels - 1.0, tl.float32))
        store_param(block, low, 2 * g[None, :], f, r[:, None], params, F)
        store_param(block, scale, 2 * g[None, :] + 1, f, r[:, None], params, F)


@triton.jit
def _store_plane(block, row, j, inside, codes, more, channels: tl.constexpr, rows: tl.constexpr, P: tl.constexpr):
    """Packs one plane of a class. codes: of channels j of the eight fields; more: of channels j + channels/2, or ()."""
    width: tl.constexpr = pick(P, 0)
    shift: tl.constexpr = pick(P, 1)
    offset: tl.constexpr = pick(P, 2)
    words = (block + offset).to(tl.pointer_type(tl.int16))
    if width == 1:
        word = ((codes[0] >> shift) & 1) | (((more[0] >> shift) & 1) << 1)
        for f in tl.static_range(1, 8):
            word = word | (((codes[f] >> shift) & 1) << (2 * f)) | (((more[f] >> shift) & 1) << (2 * f + 1))
        tl.store(words + row * (channels // 2) + j, word.to(tl.int16), mask=inside)
    else:
        _store_words(words + row * channels + j, inside, codes, width, shift, rows * channels)
        if count(more) > 0:
            _store_words(words + row * channels + (j + channels // 2), inside, more, width, shift, rows * channels)


@triton.jit
def _store_words(ptr, inside, codes, WIDTH: tl.constexpr, SHIFT: tl.constexpr, FIELDS_4: tl.constexpr):
    if WIDTH == 2:
        word = (codes[0] >> SHIFT) & 3
        for f in tl.static_range(1, 8):
            word = word | (((codes[f] >> SHIFT) & 3) << (2 * f))
        tl.store(ptr, word.to(tl.int16), mask=inside)
    else:
        for part in tl.static_range(2):
            word = (codes[4 * part] >> SHIFT) & 15
            word = word | (((codes[4 * part + 2] >> SHIFT) & 15) << 4)
            word = word | (((codes[4 * part + 1] >> SHIFT) & 15) << 8)
            word = word | (((codes[4 * part + 3] >> SHIFT) & 15) << 12)
            tl.store(ptr + part * FIELDS_4, word.to(tl.int16), mask=inside)


@triton.jit
def _field_codes(
    block, src, stride, first, sinks, ring, f: tl.constexpr, row, c, inside, F: tl.constexpr, S: tl.constexpr,
    C: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Codes of field f of channels c of one class, LOW ≤ c < HIGH."""
    x = load_source(src, stride, first, sinks, ring, f, row, c, inside, pick(F, 7), S, LOW, HIGH)
    return quantise(x, block, f, row, c, inside, F, C)


@triton.jit
def _all_codes(
    block, src, stride, first, sinks, ring, row, c, inside, F: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Codes of the eight fields."""
    return (
        _field_codes(block, src, stride, first, sinks, ring, 0, row, c, inside, F, S, C, LOW, HIGH),
        _field_codes(block, src, stride, first, sinks, ring, 1, row, c, inside, F, S, C, LOW, HIGH),
        _field_codes(block, src, stride, first, sinks, ring, 2, row, c, inside, F, S, C, LOW, HIGH),
        _field_codes(block, src, stride, first, sinks, ring, 3, row, c, inside, F, S, C, LOW, HIGH),
        _field_codes(block, src, stride, first, sinks, ring, 4, row, c, inside, F, S, C, LOW, HIGH),
        _field_codes(block, src, stride, first, sinks, ring, 5, row, c, inside, F, S, C, LOW, HIGH),
        _field_codes(block, src, stride, first, sinks, ring, 6, row, c, inside, F, S, C, LOW, HIGH),
        _field_codes(block, src, stride, first, sinks, ring, 7, row, c, inside, F, S, C, LOW, HIGH),
    )


@triton.jit
def _class_block(block, src, stride, first, sinks, ring, F: tl.constexpr, S: tl.constexpr, C: tl.constexpr):
    """Codes and packs one class of binary codes."""
    rows: tl.constexpr = pick(F, 7)
    start: tl.constexpr = pick(C, 0)
    channels: tl.constexpr = pick(C, 1)
    halves: tl.constexpr = pick(C, 4)
    planes: tl.constexpr = pick(C, 5)
    valid: tl.constexpr = channels // 2 if halves else channels
    middle: tl.constexpr = start + valid
    end: tl.constexpr = start + channels
    row = tl.arange(0, rows)[:, None]
    j = tl.arange(0, pow2(valid))[None, :]
    inside = (j < valid) & (row < rows)
    codes = _all_codes(block, src, stride, first, sinks, ring, row, start + j, inside, F, S, C, start, middle)
    if halves:
        more = _all_codes(block, src, stride, first, sinks, ring, row, middle + j, inside, F, S, C, middle, end)
    else:
        more = ()
    for p in tl.static_range(count(planes)):
        _store_plane(block, row, j, inside, codes, more, channels, rows, pick(planes, p))


@triton.jit
def _trit_codes(block, src, stride, first, sinks, ring, number, row, lane, mask, F: tl.constexpr, S: tl.constexpr):
    """Codes that packing.py numbers c·8 + f, of channel `lane` of 16."""
    classes: tl.constexpr = pick(F, 1)
    rows: tl.constexpr = pick(F, 7)
    dim: tl.constexpr = pick(F, 9)
    f = number % 8
    c = (number // 8) * 16 + lane
    x = load_source(src, stride, first, sinks, ring, f, row, c, mask, rows, S, 0, dim)
    return quantise(x, block, f, row, c, mask, F, pick(classes, 0))


@triton.jit
def _trit_block(block, src, stride, first, sinks, ring, F: tl.constexpr, S: tl.constexpr):
    """Codes and packs ternary codes: all whole bytes at once, a digit at a time; then what is left over."""
    trits: tl.constexpr = pick(F, 2)
    rows: tl.constexpr = pick(F, 7)
    whole: tl.constexpr = pick(trits, 0)
    left: tl.constexpr = pick(trits, 1)
    words: tl.constexpr = pick(trits, 2)
    odd: tl.constexpr = (whole + (1 if left > 2 else 0)) % 2
    row = tl.arange(0, rows)[:, None, None]
    half = tl.arange(0, pow2(whole))[None, :, None]
    lane = tl.arange(0, 16)[None, None, :]
    mask = (half < whole) & (lane < 16) & (row < rows)
    total = half * 0 + row * 0 + lane * 0
    for k in tl.static_range(5):
        codes = _trit_codes(block, src, stride, first, sinks, ring, half * 5 + k, row, lane, mask, F, S)
        total = total * 3 + codes
    tl.store(block + trit_place(half, row, F) + lane * 2, ((total * 256 + 242) // 243).to(tl.uint8), mask=mask)
    if left > 2:
        one = tl.arange(0, 1)[None, :, None]
        inside = (one < 1) & (lane < 16) & (row < rows)
        byte = one * 0 + row * 0 + lane * 0
        for k in tl.static_range(left):
            number = one + (whole * 5 + k)
            byte = byte | (
                _trit_codes(block, src, stride, first, sinks, ring, number, row, lane, inside, F, S) << (2 * k)
            )
        tl.store(block + trit_place(one + whole, row, F) + lane * 2, byte.to(tl.uint8), mask=inside)
    elif left > 0:
        start: tl.constexpr = (words * rows + odd * ((rows + 1) // 2)) * 32
        pair = tl.arange(0, 2 * ((rows + 3) // 4))[:, None]  # two rows to a byte
        column = tl.arange(0, 16)[None, :]
        nibbles = pair * 0 + column * 0
        for h in tl.static_range(2):
            r = 2 * pair + h
            inside = (r < rows) & (column < 16)
            for k in tl.static_range(left):
                number = pair * 0 + (whole * 5 + k)
                codes = _trit_codes(block, src, stride, first, sinks, ring, number, r, column, inside, F, S)
                nibbles = nibbles | (tl.where(inside, codes, 0) << (2 * k + 4 * h))
        place = start + (pair // 2) * 32 + pair % 2 + column * 2
        tl.store(block + place, nibbles.to(tl.uint8), mask=column < 16)
    if odd == 1 and rows == 1:  # the second row of the last words
        pad = tl.arange(0, 16)
        tl.store(block + words * 32 + pad * 2 + 1, (pad * 0).to(tl.uint8))


@triton.jit
def write_block(
    block, clip, src, stride, first, sinks, ring, F: tl.constexpr, S: tl.constexpr, CLIPS: tl.constexpr
):  # fmt: skip
    """Encodes one head's page.

    Args:
        block: uint8 pointer to the head's block of the page.
        clip: float32 pointer to CLIPS factors on (minimum, maximum): none, one, or one for each group.
        src, stride, first, sinks, ring, S: see `load_source`.
        F: a planes.PageLayout as a tuple; S: another one, or () for 16-bit rows.
    """
    kind: tl.constexpr = pick(F, 0)
    classes: tl.constexpr = pick(F, 1)
    trits: tl.constexpr = pick(F, 2)
    if kind == "raw":
        _raw_block(block, src, stride, first, sinks, ring, F, S)
    else:
        if kind == "scale":
            _scale_params(block, src, stride, first, sinks, ring, F, S)
        else:
            _min_params(block, clip, src, stride, first, sinks, ring, F, S, CLIPS)
        tl.debug_barrier()  # the parameters are read back
        if count(trits) > 0:
            _trit_block(block, src, stride, first, sinks, ring, F, S)
        else:
            for i in tl.static_range(count(classes)):
                _stored_class(block, src, stride, first, sinks, ring, F, S, pick(classes, i))


@triton.jit
def _stored_class(block, src, stride, first, sinks, ring, F: tl.constexpr, S: tl.constexpr, C: tl.constexpr):
    levels: tl.constexpr = pick(C, 2)
    if levels > 0:
        _class_block(block, src, stride, first, sinks, ring, F, S, C)
