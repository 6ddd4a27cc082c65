"""Ternary codes on the device: five to a byte (kinds/trits.py), as tensor-core operands, one by
one, and written."""

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.bits import count, mask_code, mask_words, row_pointers, shift_right
from kvfold.kernels.gpu.device.codec import load_params, quantise
from kvfold.kernels.gpu.device.columns import HEADER, SCALE_MIN, STEP
from kvfold.kernels.gpu.device.tiles import WORD_TILE, tile_width


@triton.jit
def _times_3(words, INTERPRET: tl.constexpr):
    if INTERPRET:
        return (words * 3).to(tl.int16)
    else:
        return tl.inline_asm_elementwise(
            "mul.lo.u32 $0, $1, 3;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )


@triton.jit
def _tile_ptr(base, page, row, OFFSET: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Pointers to words [rows, 16 channels], or [16 channels, rows]."""
    c = tl.arange(0, 16)
    ptr = row_pointers(base, page, row, OFFSET, 32).to(tl.pointer_type(tl.int16))
    if TRANSPOSED:
        return ptr[None, :] + c[:, None]
    else:
        return ptr[:, None] + c[None, :]


@triton.jit
def _across(row, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        return row[None, :]
    else:
        return row[:, None]


@triton.jit
def _half_word_digits(
    x, H: tl.constexpr, WHOLE: tl.constexpr, LEFT: tl.constexpr, INTERPRET: tl.constexpr
):
    """Ternary codes of half-word H: five, or what is left over; each float16, code · 2^8 ·
    2^−24."""
    out = ()
    if H < WHOLE:
        for _ in tl.static_range(5):
            x3 = _times_3(x, INTERPRET)
            out = out + (mask_code(x3, 0x300, INTERPRET),)
            x = mask_words(x3, 0xFF, INTERPRET)
    else:
        for j in tl.static_range(LEFT):
            out = out + (mask_code(shift_right(x, 2 * j - 8, INTERPRET), 0x300, INTERPRET),)
    return out


@triton.jit
def _digits(base, page, row, TRANSPOSED: tl.constexpr, L: tl.constexpr, INTERPRET: tl.constexpr):
    """All ternary codes of the tokens of 16 rows of words, in the order of their numbers c·8 + f
    (kinds/trits.py).

    Args:
        base, page: of the plane, as in `row_pointers`; row: int32 [16]; L: its HeadLayout.
    Returns:
        float16 [16, 16] each: rows by channels, or channels by rows if TRANSPOSED; code · 2^8 ·
        2^−24.
    """
    whole: tl.constexpr = L.parts.whole
    left: tl.constexpr = L.parts.left
    words: tl.constexpr = L.parts.words
    rows: tl.constexpr = L.rows
    halves: tl.constexpr = whole + (1 if left > 2 else 0)
    out = ()
    for k in tl.static_range(words):
        w = tl.load(_tile_ptr(base, page, row, k * rows * 32, TRANSPOSED))
        out = out + _half_word_digits(mask_words(w, 0xFF, INTERPRET), 2 * k, whole, left, INTERPRET)
        x = mask_words(shift_right(w, 8, INTERPRET), 0xFF, INTERPRET)
        out = out + _half_word_digits(x, 2 * k + 1, whole, left, INTERPRET)
    if halves % 2 == 1:  # two rows to a word
        w = tl.load(_tile_ptr(base, page, row // 2, words * rows * 32, TRANSPOSED))
        x = tl.where(_across(row % 2 == 1, TRANSPOSED), shift_right(w, 8, INTERPRET), w)
        out = out + _half_word_digits(
            mask_words(x, 0xFF, INTERPRET), 2 * words, whole, left, INTERPRET
        )
    if left == 1 or left == 2:  # four rows to a word
        start: tl.constexpr = words * rows * 32 + (halves % 2) * ((rows + 1) // 2) * 32
        w = tl.load(_tile_ptr(base, page, row // 4, start, TRANSPOSED))
        x = tl.where(_across((row // 2) % 2 == 1, TRANSPOSED), shift_right(w, 8, INTERPRET), w)
        x = tl.where(_across(row % 2 == 1, TRANSPOSED), shift_right(x, 4, INTERPRET), x)
        out = out + _half_word_digits(
            mask_words(x, 15, INTERPRET), whole + 1, whole, left, INTERPRET
        )
    return out


@triton.jit
def add_products(base, page, row, q, qk, g: tl.constexpr, K: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds ternary keys to the eight scores of group g; q: one [16, N] for each 16 channels, K: a
    HeadLayout."""
    chunks: tl.constexpr = count(K.key_runs)
    digits = _digits(base, page, row, False, K, INTERPRET)
    for c in tl.static_range(chunks):
        if c * K.groups // chunks == g:
            new = ()
            for f in tl.static_range(8):
                new = new + (tl.dot(digits[c * 8 + f], q[c], qk[f]),)
            qk = new
    return qk


@triton.jit
def add_values(base, page, row, p, acc, acc_high, V: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds ternary values; acc: one [16, N] for each 16 channels, p: for each group eight [16, N],
    V: a HeadLayout."""
    chunks: tl.constexpr = count(V.value_runs)
    digits = _digits(base, page, row, True, V, INTERPRET)
    new = ()
    for c in tl.static_range(chunks):
        a = acc[c]
        for f in tl.static_range(8):
            a = tl.dot(digits[c * 8 + f], p[c * V.groups // chunks][f], a)
        new = new + (a,)
    return new, acc_high


@triton.jit
def _byte_place(half, row, words, ROWS: tl.constexpr):
    """Bytes from the plane to half-word `half` of a row, first channel; two of them are a word, an
    odd last one stands two rows to a word."""
    paired = ((half >> 1) * ROWS + row) * 32 + (half & 1)
    last = (words * ROWS + row // 2) * 32 + row % 2
    return tl.where(half >= 2 * words, last, paired)


@triton.jit
def _nibble_place(whole, row, words, ROWS: tl.constexpr):
    """Bytes from the plane to what is left over in four bits, four rows to a word. No byte follows
    the `whole` ones then."""
    return (words * ROWS + (whole & 1) * ((ROWS + 1) // 2) + row // 4) * 32 + (row // 2) % 2


@triton.jit
def element_code(block, header, f, row, c, mask, ROWS: tl.constexpr):
    """Ternary codes of elements (field f, row, channel c)."""
    number = (c >> 4) * 8 + f
    half = tl.minimum(number // 5, header.whole)
    digit = number - half * 5
    in_nibbles = (half == header.whole) & (header.left <= 2)
    nibble = _nibble_place(header.whole, row, header.words, ROWS)
    at = tl.where(in_nibbles, nibble, _byte_place(half, row, header.words, ROWS))
    byte = tl.load(block + at + (c & 15) * 2, mask=mask & (row < ROWS), other=0).to(tl.int32)
    power = tl.where(
        digit == 0,
        1,
        tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))),
    )
    code = (((byte * power) & 255) * 3) >> 8
    rest = (byte >> (2 * digit + tl.where(in_nibbles, (row % 2) * 4, 0))) & 3
    return tl.where(half == header.whole, rest, code)


@triton.jit
def write_codes(
    block, table, header, source, LOAD: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, OWN: tl.constexpr
):  # fmt: skip
    """Codes and packs ternary codes: a column of a byte at a time, digit by digit; the last byte
    may hold what is left over."""
    width: tl.constexpr = tile_width(WORD_TILE, ROWS)
    whole, left, words = header.whole, header.left, header.words
    row = tl.arange(0, ROWS)[:, None]
    step = tl.load(table + HEADER + STEP * header.head_dim).to(tl.float32, bitcast=True)
    for first in range(0, (whole + 1) * 16, width):
        column = first + tl.arange(0, width)[None, :]
        half = column >> 4
        lane = column & 15
        last = half == whole
        levels = tl.full((1, width), 3, tl.int32)
        digits = tl.zeros((ROWS, width), tl.int32)
        rest = tl.zeros((ROWS, width), tl.int32)
        for digit in range(5):
            number = half * 5 + digit
            f = number & 7
            c = (number >> 3) * 16 + lane
            inside = (half < whole) | (last & (digit < left))
            x = LOAD(source, f, row, c, inside, ROWS, PACKED, OWN)
            params = load_params(block, header, f, row, c // header.group_size, inside, ROWS)
            code = quantise(x, params, levels, step, header.kind == SCALE_MIN)
            digits = digits * 3 + code
            rest |= tl.where(inside, code << (2 * digit), 0)
        byte = tl.where(last, rest, (digits * 256 + 242) // 243)
        stored = ((half < whole) | (last & (left > 2))) & (row < ROWS)
        tl.store(
            block + _byte_place(half, row, words, ROWS) + lane * 2, byte.to(tl.uint8), mask=stored
        )
        if (left == 1) | (left == 2):
            _write_nibbles(block, whole, words, rest, lane, last, ROWS, width)
    if ROWS == 1:  # the second row of the last words
        if ((whole + (left > 2).to(tl.int32)) & 1) == 1:
            lane = tl.arange(0, 16)
            tl.store(block + words * 32 + lane * 2 + 1, (lane * 0).to(tl.uint8))


@triton.jit
def _write_nibbles(block, whole, words, rest, lane, last, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Codes left over in four bits, two rows to a byte; rows past the last are zero."""
    pairs: tl.constexpr = max(ROWS // 2, 1)
    if ROWS > 1:
        row = tl.arange(0, ROWS)[:, None]
        rest = tl.sum(tl.reshape(tl.where(row % 2 == 1, rest << 4, rest), (pairs, 2, WIDTH)), 1)
    pair = tl.arange(0, pairs)[:, None]
    to = block + _nibble_place(whole, 2 * pair, words, ROWS) + lane * 2
    tl.store(to, rest.to(tl.uint8), mask=last & (pair < pairs))
    if ROWS < 4:
        tl.store(to + 1, (rest * 0).to(tl.uint8), mask=last & (pair < pairs))
