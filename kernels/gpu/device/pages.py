"""Writes one head's block of a page, of the format that a table (tables.py) describes: parameters first, then the codes. The
pages' part of the writing kernels.

Nothing here is compiled for a format: channels are taken a fixed number at a time, and what the table says of them is read with
them. A word gathers its codes field by field (packing.py) in the registers of its channel. Parameters are read back from the
page as rounded.
"""

import triton
import triton.language as tl

from kvfold.kernels.gpu import tables
from kvfold.kernels.gpu.device.codec import (
    HEADER,
    LEVELS,
    PLANE_0,
    PLANE_1,
    RAW,
    SCALE_MIN,
    STEP,
    WIDTHS,
    channel_row,
    channel_step,
    load_params,
    load_source,
    nibble_place,
    quantise,
    read_header,
    store_param,
    to_fp16,
    trit_place,
)

CODED: tl.constexpr = tl.constexpr(tables.CODED)
PARTNER: tl.constexpr = tl.constexpr(tables.PARTNER)
WORD_TILE: tl.constexpr = tl.constexpr(256)  # words at a time
TOKEN_TILE: tl.constexpr = tl.constexpr(512)  # elements of all tokens at a time


@triton.constexpr_function
def tile_width(tile, rows):
    """Channels of a tile of so many elements, for `rows` rows."""
    return max(16, tile // rows)


@triton.jit
def _write_raw(block, dim, source, ROWS: tl.constexpr, PACKED: tl.constexpr):
    width: tl.constexpr = tile_width(TOKEN_TILE, 8 * ROWS)
    t = tl.arange(0, 8 * ROWS)[:, None]
    for first in range(0, dim, width):
        c = first + tl.arange(0, width)[None, :]
        x = load_source(source, t // ROWS, t % ROWS, c, c < dim, ROWS, PACKED)
        tl.store(block.to(tl.pointer_type(tl.float16)) + t * dim + c, to_fp16(x), mask=c < dim)


@triton.jit
def _write_params(block, table, header, clip, clip_step, clipped, source, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """Root mean squares over the stored channels, one a token, or minima and scales, one pair a token and group."""
    tokens: tl.constexpr = 8 * ROWS
    width: tl.constexpr = tile_width(TOKEN_TILE, tokens)
    dim, kind, params, nbytes, size, _, _, _ = header
    from_minimum = kind == SCALE_MIN
    coded = tl.zeros((tokens,), tl.float32) + tl.load(table + CODED).to(tl.float32)
    top = tl.zeros((tokens,), tl.float32) + (tl.load(table + HEADER + LEVELS * dim) - 1).to(tl.float32)
    token = tl.arange(0, tokens)
    t = token[:, None]
    s = tl.arange(0, width)[None, :]
    at = params + ((token % ROWS) * 8 + token // ROWS) * nbytes
    every = token < tokens
    for start in range(0, dim, size):  # a group
        low = tl.full((tokens, width), float("inf"), tl.float32)
        high = tl.full((tokens, width), float("-inf"), tl.float32)
        total = tl.zeros((tokens, width), tl.float32)
        for first in range(start, start + size, width):
            c = first + s
            inside = c < start + size
            x = load_source(source, t // ROWS, t % ROWS, c, inside, ROWS, PACKED)
            low = tl.minimum(low, tl.where(inside, x, float("inf")))
            high = tl.maximum(high, tl.where(inside, x, float("-inf")))
            total += tl.where(channel_row(table, dim, c, inside, LEVELS) > 0, x * x, 0.0)
        factor = tl.load(clip, mask=clipped > 0, other=1.0)
        least = tl.min(low, 1) * factor
        scale = tl.math.div_rn(tl.max(high, 1) * factor - least, top)
        root = tl.math.sqrt_rn(tl.math.div_rn(tl.sum(total, 1), coded))
        store_param(block, tl.where(from_minimum, least, root), at, nbytes, every)
        store_param(block, scale, at + tokens * nbytes, nbytes, every & from_minimum)
        at += 2 * tokens * nbytes
        clip += clip_step


@triton.jit
def _field_bits(code, width, f, upper, inside):
    """One field of the words of a plane: 16 bits, of four bits a code 32, fields 0 to 3 first; `upper` is the second channel of a
    word of one bit."""
    left = tl.where(width == 4, (f >> 2) * 16 + (f & 1) * 8 + (f >> 1 & 1) * 4, 2 * f + upper)
    joins = inside & ((upper == 0) | (width == 1))
    return tl.where(joins, (code & ((1 << width) - 1)) << left, 0)


@triton.jit
def _store_words(block, words, plane, width, half, row, ROWS: tl.constexpr):
    stride = plane >> 16
    to = block.to(tl.pointer_type(tl.int16)) + (plane & 0xFFFF) + row * stride
    tl.store(to, words.to(tl.int16), mask=(width > 0) & ((half == 0) | (width != 1)) & (row < ROWS))
    tl.store(to + ROWS * stride, (words >> 16).to(tl.int16), mask=(width == 4) & (row < ROWS))


@triton.jit
def _write_codes(block, table, header, source, ROWS: tl.constexpr, PACKED: tl.constexpr, UNROLL: tl.constexpr):
    """Codes and packs binary codes."""
    width: tl.constexpr = tile_width(WORD_TILE, ROWS)
    dim, kind, _, _, group_size, _, _, _ = header
    row = tl.arange(0, ROWS)[:, None]
    for first in range(0, dim, width):
        c = first + tl.arange(0, width)[None, :]
        valid = c < dim
        levels = channel_row(table, dim, c, valid, LEVELS)
        step = channel_step(table, dim, c, valid)
        widths = channel_row(table, dim, c, valid, WIDTHS)
        half = widths >> 16
        width_0 = widths & 255
        width_1 = widths >> 8 & 255
        partner = channel_row(table, dim, c, valid, PARTNER)
        group = c // group_size
        partner_group = partner // group_size
        items = tl.where(
            tl.max(tl.max(partner, 1), 0) > 0, 16, 8
        )  # a second pass for the second channels of words of one bit
        words_0 = tl.zeros((ROWS, width), tl.int32)
        words_1 = tl.zeros((ROWS, width), tl.int32)
        for item in range(0, items, UNROLL):
            for k in tl.static_range(UNROLL):
                f = (item + k) & 7
                upper = (item + k) >> 3
                own = tl.where(upper > 0, partner, c)
                inside = (levels > 0) & (own >= 0)
                x = load_source(source, f, row, own, inside, ROWS, PACKED)
                params = load_params(block, header, f, row, tl.where(upper > 0, partner_group, group), inside, ROWS)
                code = quantise(x, params, levels, step, kind == SCALE_MIN)
                words_0 |= _field_bits(code, width_0, f, upper, inside)
                words_1 |= _field_bits(code >> width_0, width_1, f, upper, inside)
        plane_0, plane_1 = channel_row(table, dim, c, valid, PLANE_0), channel_row(table, dim, c, valid, PLANE_1)
        _store_words(block, words_0, plane_0, width_0, half, row, ROWS)
        _store_words(block, words_1, plane_1, width_1, half, row, ROWS)


@triton.jit
def _write_trits(block, table, header, source, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """Codes and packs ternary codes: a column of a byte at a time, digit by digit; the last byte may hold what is left over."""
    width: tl.constexpr = tile_width(WORD_TILE, ROWS)
    dim, kind, _, _, group_size, whole, left, words = header
    row = tl.arange(0, ROWS)[:, None]
    step = tl.load(table + HEADER + STEP * dim).to(tl.float32, bitcast=True)
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
            x = load_source(source, f, row, c, inside, ROWS, PACKED)
            params = load_params(block, header, f, row, c // group_size, inside, ROWS)
            code = quantise(x, params, levels, step, kind == SCALE_MIN)
            digits = digits * 3 + code
            rest |= tl.where(inside, code << (2 * digit), 0)
        byte = tl.where(last, rest, (digits * 256 + 242) // 243)
        stored = ((half < whole) | (last & (left > 2))) & (row < ROWS)
        tl.store(block + trit_place(half, row, words, ROWS) + lane * 2, byte.to(tl.uint8), mask=stored)
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
    to = block + nibble_place(whole, 2 * pair, words, ROWS) + lane * 2
    tl.store(to, rest.to(tl.uint8), mask=last & (pair < pairs))
    if ROWS < 4:
        tl.store(to + 1, (rest * 0).to(tl.uint8), mask=last & (pair < pairs))


@triton.jit
def write_block(
    block, table, clip, clip_step, clipped, source, ROWS: tl.constexpr, PACKED: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """Encodes one head's page.

    Args:
        block: uint8 pointer to the head's block of the page.
        table: int32 pointer to the table of its format.
        clip, clip_step, clipped: float32 pointer to factors on (minimum, maximum), numbers from one group's to the next one's, and
            whether there are any.
        source, PACKED: see `load_source`.
        ROWS: R, rows of words in a page.
        UNROLL: fields that are asked for at a time: the more, the less is waited for memory, and the longer the compiler takes.
    """
    header = read_header(table)
    dim, kind, _, _, _, whole, _, _ = header
    if kind == RAW:
        _write_raw(block, dim, source, ROWS, PACKED)
    else:
        _write_params(block, table, header, clip, clip_step, clipped, source, ROWS, PACKED)
        tl.debug_barrier()  # the parameters are read back
        if whole > 0:
            _write_trits(block, table, header, source, ROWS, PACKED)
        else:
            _write_codes(block, table, header, source, ROWS, PACKED, UNROLL)
