"""Writes one head's block of a page, of the format that a table (tables.py) describes: parameters first, then the codes. The
pages' part of the writing kernels.

Nothing here is compiled for a format: channels are taken a fixed number at a time, and what the table says of them is read with
them. A word gathers its codes field by field (packing.py) in the registers of its channel. Parameters are read back from the
page as rounded.
"""

import triton
import triton.language as tl

from kvfold.kernels import tables
from kvfold.kernels.triton_codec import (
    HALF,
    KIND,
    LEFT,
    LEVELS,
    PARAM_NBYTES,
    PLACE,
    PLANE_0,
    PLANE_1,
    RAW,
    SCALE_MIN,
    STRIDE,
    WHOLE,
    WIDTH,
    WORDS,
    channel_row,
    channel_step,
    load_source,
    nibble_place,
    quantise,
    store_param,
    to_fp16,
    trit_place,
    words_at,
)

NBYTES: tl.constexpr = tl.constexpr(tables.NBYTES)
DIM: tl.constexpr = tl.constexpr(tables.DIM)
PARAMS: tl.constexpr = tl.constexpr(tables.PARAMS)
GROUPS: tl.constexpr = tl.constexpr(tables.GROUPS)
CODED: tl.constexpr = tl.constexpr(tables.CODED)
PASSES: tl.constexpr = tl.constexpr(tables.PASSES)
PARTNER: tl.constexpr = tl.constexpr(tables.PARTNER)
WARPS = 4  # of a program that writes or decodes one side of one head's page
WORD_TILE: tl.constexpr = tl.constexpr(256)  # words at a time
TOKEN_TILE: tl.constexpr = tl.constexpr(1024)  # elements of all tokens at a time


@triton.constexpr_function
def tile_width(tile, rows):
    """Channels of a tile of so many elements, for `rows` rows."""
    return max(16, tile // rows)


@triton.jit
def _write_raw(block, table, src, old, stride, start, end, ring, ROWS: tl.constexpr, PACKED: tl.constexpr):
    width: tl.constexpr = tile_width(TOKEN_TILE, 8 * ROWS)
    dim = tl.load(table + DIM)
    t = tl.arange(0, 8 * ROWS)[:, None]
    for first in range(0, dim, width):
        c = first + tl.arange(0, width)[None, :]
        x = load_source(src, old, stride, start, end, ring, t // ROWS, t % ROWS, c, c < dim, ROWS, PACKED)
        tl.store(block.to(tl.pointer_type(tl.float16)) + t * dim + c, to_fp16(x), mask=c < dim)


@triton.jit
def _write_params(
    block, table, clip, clip_step, clipped, src, old, stride, start, end, ring, ROWS: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Root mean squares over the stored channels, one a token, or minima and scales, one pair a token and group."""
    tokens: tl.constexpr = 8 * ROWS
    width: tl.constexpr = tile_width(TOKEN_TILE, tokens)
    from_minimum = tl.load(table + KIND) == SCALE_MIN
    nbytes = tl.load(table + PARAM_NBYTES)
    groups = tl.load(table + GROUPS)
    size = tl.load(table + DIM) // groups
    coded = tl.zeros((tokens,), tl.float32) + tl.load(table + CODED).to(tl.float32)
    top = tl.zeros((tokens,), tl.float32) + (channel_row(table, 0, size > 0, LEVELS) - 1).to(tl.float32)
    token = tl.arange(0, tokens)
    t = token[:, None]
    s = tl.arange(0, width)[None, :]
    place = tl.load(table + PARAMS) + ((token % ROWS) * 8 + token // ROWS) * nbytes
    every = token < tokens
    for group in range(groups):
        low = tl.full((tokens, width), float("inf"), tl.float32)
        high = tl.full((tokens, width), float("-inf"), tl.float32)
        total = tl.zeros((tokens, width), tl.float32)
        for first in range(0, size, width):
            inside = first + s < size
            c = group * size + first + s
            x = load_source(src, old, stride, start, end, ring, t // ROWS, t % ROWS, c, inside, ROWS, PACKED)
            low = tl.minimum(low, tl.where(inside, x, float("inf")))
            high = tl.maximum(high, tl.where(inside, x, float("-inf")))
            total += tl.where(channel_row(table, c, inside, LEVELS) > 0, x * x, 0.0)
        factor = tl.load(clip + group * clip_step, mask=clipped > 0, other=1.0)
        least = tl.min(low, 1) * factor
        scale = tl.math.div_rn(tl.max(high, 1) * factor - least, top)
        root = tl.math.sqrt_rn(tl.math.div_rn(tl.sum(total, 1), coded))
        at = place + 2 * group * tokens * nbytes
        store_param(block, tl.where(from_minimum, least, root), at, nbytes, every)
        store_param(block, scale, at + tokens * nbytes, nbytes, every & from_minimum)


@triton.jit
def _field_bits(code, width, f, upper, inside):
    """One field of the words of a plane: 16 bits, of four bits a code 32, fields 0 to 3 first; `upper` is the second channel of a
    word of one bit."""
    left = tl.where(width == 4, (f >> 2) * 16 + (f & 1) * 8 + (f >> 1 & 1) * 4, 2 * f + upper)
    joins = inside & ((upper == 0) | (width == 1))
    return tl.where(joins, (code & ((1 << width) - 1)) << left, 0)


@triton.jit
def _store_words(block, table, words, row, c, valid, plane, width, ROWS: tl.constexpr):
    stride = channel_row(table, c, valid, plane + STRIDE)
    at = channel_row(table, c, valid, plane + PLACE) + row * stride
    first = (channel_row(table, c, valid, HALF) == 0) | (width != 1)
    tl.store(words_at(block, at), words.to(tl.int16), mask=(width > 0) & first & (row < ROWS))
    tl.store(words_at(block, at + ROWS * stride), (words >> 16).to(tl.int16), mask=(width == 4) & (row < ROWS))


@triton.jit
def _write_codes(
    block, table, src, old, stride, start, end, ring, ROWS: tl.constexpr, PACKED: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """Codes and packs binary codes."""
    width: tl.constexpr = tile_width(WORD_TILE, ROWS)
    dim = tl.load(table + DIM)
    items = 8 * tl.load(table + PASSES)
    row = tl.arange(0, ROWS)[:, None]
    for first in range(0, dim, width):
        c = first + tl.arange(0, width)[None, :]
        valid = c < dim
        levels = channel_row(table, c, valid, LEVELS)
        step = channel_step(table, c, valid)
        width_0 = channel_row(table, c, valid, PLANE_0 + WIDTH)
        width_1 = channel_row(table, c, valid, PLANE_1 + WIDTH)
        partner = channel_row(table, c, valid, PARTNER)
        words_0 = tl.zeros((ROWS, width), tl.int32)
        words_1 = tl.zeros((ROWS, width), tl.int32)
        for item in range(0, items, UNROLL):
            for k in tl.static_range(UNROLL):
                f = (item + k) & 7
                upper = (item + k) >> 3
                own = tl.where(upper > 0, partner, c)
                inside = (levels > 0) & (own >= 0)
                x = load_source(src, old, stride, start, end, ring, f, row, own, inside, ROWS, PACKED)
                code = quantise(x, block, table, f, row, own, inside, levels, step, ROWS)
                words_0 |= _field_bits(code, width_0, f, upper, inside)
                words_1 |= _field_bits(code >> width_0, width_1, f, upper, inside)
        _store_words(block, table, words_0, row, c, valid, PLANE_0, width_0, ROWS)
        _store_words(block, table, words_1, row, c, valid, PLANE_1, width_1, ROWS)


@triton.jit
def _write_trits(
    block, table, src, old, stride, start, end, ring, ROWS: tl.constexpr, PACKED: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """Codes and packs ternary codes: a column of a byte at a time, digit by digit; the last byte may hold what is left over."""
    width: tl.constexpr = tile_width(WORD_TILE, ROWS)
    whole = tl.load(table + WHOLE)
    left = tl.load(table + LEFT)
    words = tl.load(table + WORDS)
    row = tl.arange(0, ROWS)[:, None]
    for first in range(0, (whole + 1) * 16, width):
        column = first + tl.arange(0, width)[None, :]
        half = column >> 4
        lane = column & 15
        last = half == whole
        levels = tl.full((1, width), 3, tl.int32)
        digits = tl.zeros((ROWS, width), tl.int32)
        rest = tl.zeros((ROWS, width), tl.int32)
        for digit in range(0, 5, UNROLL):
            for k in tl.static_range(UNROLL):
                number = half * 5 + digit + k
                f = number & 7
                c = (number >> 3) * 16 + lane
                inside = (half < whole) | (last & (digit + k < left))
                x = load_source(src, old, stride, start, end, ring, f, row, c, inside, ROWS, PACKED)
                step = channel_step(table, c, inside)
                code = quantise(x, block, table, f, row, c, inside, levels, step, ROWS)
                digits = digits * 3 + code
                rest |= tl.where(inside, code << (2 * (digit + k)), 0)
        byte = tl.where(last, rest, (digits * 256 + 242) // 243)
        stored = ((half < whole) | (last & (left > 2))) & (row < ROWS)
        tl.store(block + trit_place(half, row, words, ROWS) + lane * 2, byte.to(tl.uint8), mask=stored)
        if (left == 1) | (left == 2):
            _write_nibbles(block, table, rest, lane, last, ROWS, width)
    if ROWS == 1:  # the second row of the last words
        if (whole + (left > 2).to(tl.int32)) % 2 == 1:
            lane = tl.arange(0, 16)
            tl.store(block + words * 32 + lane * 2 + 1, (lane * 0).to(tl.uint8))


@triton.jit
def _write_nibbles(block, table, rest, lane, last, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Codes left over in four bits, two rows to a byte; rows past the last are zero."""
    pairs: tl.constexpr = max(ROWS // 2, 1)
    if ROWS > 1:
        row = tl.arange(0, ROWS)[:, None]
        rest = tl.sum(tl.reshape(tl.where(row % 2 == 1, rest << 4, rest), (pairs, 2, WIDTH)), 1)
    pair = tl.arange(0, pairs)[:, None]
    at = nibble_place(table, 2 * pair, ROWS) + lane * 2
    tl.store(block + at, rest.to(tl.uint8), mask=last & (pair < pairs))
    if ROWS < 4:
        tl.store(block + at + 1, (rest * 0).to(tl.uint8), mask=last & (pair < pairs))


@triton.jit
def write_block(
    block, table, clip, clip_step, clipped, src, old, stride, start, end, ring,
    ROWS: tl.constexpr, PACKED: tl.constexpr = False,
):  # fmt: skip
    """Encodes one head's page.

    Args:
        block: uint8 pointer to the head's block of the page.
        table: int32 pointer to the table of its format.
        clip, clip_step, clipped: float32 pointer to factors on (minimum, maximum), numbers from one group's to the next one's, and
            whether there are any.
        src, old, stride, start, end, ring: see `load_source`.
        ROWS: R, rows of words in a page.
        PACKED: whether src is a block of a page.
    """
    if tl.load(table + KIND) == RAW:
        _write_raw(block, table, src, old, stride, start, end, ring, ROWS, PACKED)
    else:
        _write_params(block, table, clip, clip_step, clipped, src, old, stride, start, end, ring, ROWS, PACKED)
        tl.debug_barrier()  # the parameters are read back
        if tl.load(table + WHOLE) > 0:
            _write_trits(block, table, src, old, stride, start, end, ring, ROWS, PACKED, 1 if PACKED else 5)
        else:
            _write_codes(block, table, src, old, stride, start, end, ring, ROWS, PACKED, 1 if PACKED else 4)
