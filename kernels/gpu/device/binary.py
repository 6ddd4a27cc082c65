"""Binary codes on the device: bit fields of words (kinds/bits.py), as tensor-core operands, one by
one, and written."""

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.bits import count, mask_code, pick, shift_right
from kvfold.kernels.gpu.device.codec import channel_row, channel_step, load_params, quantise
from kvfold.kernels.gpu.device.columns import LEVELS, PARTNER, PLANE_0, PLANE_1, SCALE_MIN, WIDTHS
from kvfold.kernels.gpu.device.tiles import WORD_TILE, tile_width


@triton.jit
def _codes_of(words, more, W: tl.constexpr, f: tl.constexpr, INTERPRET: tl.constexpr):
    """Field f of packed words as float16, code · 2^W.left · 4^(f mod 4) · 2^−24.

    Args:
        words: int16 [a, b]; for four bits, fields 0 to 3, and `more` fields 4 to 7.
        W: a layout.Words, what they are.
    """
    if W.width == 4:
        source = words if f < 4 else more
        if f % 2 == 0:
            return mask_code(source, 15 << (2 * (f % 4)), INTERPRET)
        else:
            return mask_code(shift_right(source, 6, INTERPRET), 15 << (2 * (f % 4)), INTERPRET)
    elif W.width == 2:
        return mask_code(shift_right(words, 8 * (f // 4), INTERPRET), 3 << (2 * (f % 4)), INTERPRET)
    else:
        right: tl.constexpr = 8 * (f // 4) + W.half - W.left
        return mask_code(
            shift_right(words, right, INTERPRET), 1 << (2 * (f % 4) + W.left), INTERPRET
        )


@triton.jit
def _add_key_run(base, page, row, q, qk, g: tl.constexpr, T: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds a run of one plane of keys to the eight scores [16, N] of group g."""
    if T.group == g:
        W: tl.constexpr = T.words
        c = tl.arange(0, T.size)
        same = (base + row * W.stride).to(tl.pointer_type(tl.int16))[None, :] + c[:, None]
        ptr = tl.trans(same + (page * 8)[None, :] + W.offset // 2)
        if T.valid < T.size:
            words = tl.load(ptr, mask=(c < T.valid)[None, :], other=0)
            more = (
                tl.load(ptr + W.fields_4 // 2, mask=(c < T.valid)[None, :], other=0)
                if W.width == 4
                else words
            )
        else:
            words = tl.load(ptr)
            more = tl.load(ptr + W.fields_4 // 2) if W.width == 4 else words
        new = ()
        for f in tl.static_range(8):
            new = new + (tl.dot(_codes_of(words, more, W, f, INTERPRET), q, qk[f]),)
        return new
    else:
        return qk


@triton.jit
def add_products(base, page, row, q, qk, g: tl.constexpr, K: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds products with the keys' codes to the eight scores [16, N] of group g; q: one [size, N]
    for each run."""
    for t in tl.static_range(count(K.key_runs)):
        qk = _add_key_run(base, page, row, q[t], qk, g, pick(K.key_runs, t), INTERPRET)
    return qk


@triton.jit
def _add_plane(base, page, row, p, acc, T: tl.constexpr, W: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds one plane of a run of value channels to its output [size, N]; p: eight probabilities
    [16, N]."""
    c = tl.arange(0, T.size)
    same = tl.trans((base + row * W.stride).to(tl.pointer_type(tl.int16))[None, :]) + c[None, :]
    ptr = tl.trans(same + tl.trans((page * 8)[None, :]) + W.offset // 2)
    if T.valid < T.size:
        words = tl.load(ptr, mask=(c < T.valid)[:, None], other=0)
        more = (
            tl.load(ptr + W.fields_4 // 2, mask=(c < T.valid)[:, None], other=0)
            if W.width == 4
            else words
        )
    else:
        words = tl.load(ptr)
        more = tl.load(ptr + W.fields_4 // 2) if W.width == 4 else words
    for f in tl.static_range(8):
        acc = tl.dot(_codes_of(words, more, W, f, INTERPRET), p[f], acc)
    return acc


@triton.jit
def _add_run(base, page, row, p, low, high, T: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds all planes of a run of value channels: (low, high) outputs [size, N], high worth 16."""
    for i in tl.static_range(count(T.low)):
        low = _add_plane(base, page, row, p, low, T, pick(T.low, i), INTERPRET)
    for i in tl.static_range(count(T.high)):
        high = _add_plane(base, page, row, p, high, T, pick(T.high, i), INTERPRET)
    return low, high


@triton.jit
def _own_group(p, T: tl.constexpr):
    """The probabilities of a run's parameter group."""
    return p[T.group]


@triton.jit
def add_values(base, page, row, p, acc, acc_high, V: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds weighted values to the outputs of all runs; p: for each group eight [16, N]."""
    low = ()
    high = ()
    for t in tl.static_range(count(V.value_runs)):
        own = _own_group(p, pick(V.value_runs, t))
        one_low, one_high = _add_run(
            base, page, row, own, acc[t], acc_high[t], pick(V.value_runs, t), INTERPRET
        )
        low = low + (one_low,)
        high = high + (one_high,)
    return low, high


@triton.jit
def _plane_code(block, plane, width, half, f, row, mask, ROWS: tl.constexpr):
    """Bits of one plane of elements (field f, row) of channels whose words a table describes with
    `plane`; all 16 of raw ones."""
    stride = plane >> 16
    at = (plane & 0xFFFF) + row * stride
    at += tl.where(width == 4, f >> 2, tl.where(width == 16, f, 0)) * (ROWS * stride)
    place = tl.where(
        width == 4, (f & 1) * 8 + (f >> 1 & 1) * 4, 2 * f + tl.where(width == 1, half, 0)
    )
    words = block.to(tl.pointer_type(tl.int16)) + at
    word = tl.load(words, mask=mask & (width > 0) & (row < ROWS), other=0).to(tl.int32)
    return (word >> tl.where(width == 16, 0, place)) & ((1 << width) - 1)


@triton.jit
def element_code(block, table, header, f, row, c, mask, ROWS: tl.constexpr):
    """Codes of elements (field f, row, channel c); of 16-bit channels their bits."""
    dim = header.head_dim
    widths = channel_row(table, dim, c, mask, WIDTHS)
    half = widths >> 16
    first = widths & 255
    plane_0, plane_1 = (
        channel_row(table, dim, c, mask, PLANE_0),
        channel_row(table, dim, c, mask, PLANE_1),
    )
    code = _plane_code(block, plane_0, first, half, f, row, mask, ROWS)
    return code | _plane_code(block, plane_1, widths >> 8 & 255, half, f, row, mask, ROWS) << first


@triton.jit
def field_bits(code, width, f, upper, inside):
    """One field of the words of a plane: 16 bits, of four bits a code 32, fields 0 to 3 first;
    `upper` is the second channel of a word of one bit."""
    left = tl.where(width == 4, (f >> 2) * 16 + (f & 1) * 8 + (f >> 1 & 1) * 4, 2 * f + upper)
    joins = inside & ((upper == 0) | (width == 1))
    return tl.where(joins, (code & ((1 << width) - 1)) << left, 0)


@triton.jit
def store_words(block, words, plane, width, half, row, ROWS: tl.constexpr):
    """Writes a row of words of a plane, as `field_bits` gathers them."""
    stride = plane >> 16
    to = block.to(tl.pointer_type(tl.int16)) + (plane & 0xFFFF) + row * stride
    tl.store(to, words.to(tl.int16), mask=(width > 0) & ((half == 0) | (width != 1)) & (row < ROWS))
    tl.store(to + ROWS * stride, (words >> 16).to(tl.int16), mask=(width == 4) & (row < ROWS))


@triton.jit
def write_codes(
    block, table, header, source, LOAD: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, OWN: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Codes and packs binary codes."""
    width: tl.constexpr = tile_width(WORD_TILE, ROWS)
    dim = header.head_dim
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
        group = c // header.group_size
        partner_group = partner // header.group_size
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
                x = LOAD(source, f, row, own, inside, ROWS, PACKED, OWN)
                params = load_params(
                    block, header, f, row, tl.where(upper > 0, partner_group, group), inside, ROWS
                )
                code = quantise(x, params, levels, step, header.kind == SCALE_MIN)
                words_0 |= field_bits(code, width_0, f, upper, inside)
                words_1 |= field_bits(code >> width_0, width_1, f, upper, inside)
        plane_0, plane_1 = (
            channel_row(table, dim, c, valid, PLANE_0),
            channel_row(table, dim, c, valid, PLANE_1),
        )
        store_words(block, words_0, plane_0, width_0, half, row, ROWS)
        store_words(block, words_1, plane_1, width_1, half, row, ROWS)
