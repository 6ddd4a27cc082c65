"""A kind of code that the product does not have, in one file: four bits as a sign and a number of
0, ½, 1, 1½, 2, 3, 4 or 6 (E2M1, as MXFP4's elements), and one scale a token, the root mean square.

Reading costs a shift and two masks a code: its exponent and fraction, where a float16 has the last
bits of its exponent and the first of its fraction, are the number times 2^−14.
"""

# ruff: noqa: RUF005 - Triton's language knows no starred tuples

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import triton
import triton.language as tl

from kvfold.kernels.gpu.device.binary import element_code, field_bits, store_words
from kvfold.kernels.gpu.device.bits import count, pick, row_pointers
from kvfold.kernels.gpu.device.codec import TINY, channel_row, channel_step, load_params
from kvfold.kernels.gpu.device.columns import PLANE_0
from kvfold.kernels.gpu.device.pages import write_params
from kvfold.kernels.gpu.device.tiles import WORD_TILE, tile_width
from kvfold.kernels.kinds import KINDS
from kvfold.kernels.kinds.interface import CodeKind
from kvfold.kernels.kinds.params import TINY as LEAST_SCALE
from kvfold.kernels.kinds.params import store_param

SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
STEP = 0.487  # of unit variance: the least error, 0.01268
LIMITS = tuple((a + b) / 2 for a, b in pairwise(SIZES))


# -- torch -----------------------------------------------------------------------------------------


class Float4(CodeKind):
    """See this module."""

    name = "float4"
    planes = {16: (4,)}  # noqa: RUF012
    uniform = False
    device = __name__
    unit = 2.0**-10  # 2^14 · 2^−24
    field_units = (1.0,) * 8

    def step(self, levels):
        return STEP

    def error(self, levels):
        return 0.01268

    def values(self, codes):
        return torch.tensor([*SIZES, *(-x for x in SIZES)], device=codes.device)[codes.int()]

    def encode(self, x, fmt, clip):
        params, tau = store_param(x.square().mean(-1, keepdim=True).sqrt(), fmt.param_dtype)
        u = x / (tau.clamp_min(LEAST_SCALE) * torch.tensor(STEP, device=x.device))
        size = torch.bucketize(
            u.abs().contiguous(), torch.tensor(LIMITS, device=x.device), right=True
        )
        return (size + 8 * (u < 0)).to(torch.uint8), params


@contextmanager
def known() -> Iterator[Float4]:
    """While this lasts, formats may be of this kind."""
    KINDS["float4"] = Float4()
    try:
        yield KINDS["float4"]
    finally:
        KINDS.pop("float4", None)


# -- device read -----------------------------------------------------------------------------------


@triton.jit
def _numbers(code):
    """Codes, int32, to float16 numbers times 2^−14."""
    return ((code & 8) << 12 | (code & 7) << 9).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _field(low, high, f: tl.constexpr):
    words = low if f < 4 else high
    return _numbers(words.to(tl.int32) >> ((f & 1) * 8 + (f >> 1 & 1) * 4) & 15)


@triton.jit
def _load(base, page, row, T: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Words of fields 0 to 3 and of fields 4 to 7: [rows, channels], or [channels, rows] if
    TRANSPOSED."""
    W: tl.constexpr = T.words
    c = tl.arange(0, T.size)
    rows = row_pointers(base, page, row, W.offset, W.stride).to(tl.pointer_type(tl.int16))
    if TRANSPOSED:
        ptr = rows[None, :] + c[:, None]
        exists = (c < T.valid)[:, None]
    else:
        ptr = rows[:, None] + c[None, :]
        exists = (c < T.valid)[None, :]
    return tl.load(ptr, mask=exists, other=0), tl.load(ptr + W.fields_4 // 2, mask=exists, other=0)


@triton.jit
def _add_run(base, page, row, q, qk, T: tl.constexpr):
    low, high = _load(base, page, row, T, False)
    new = ()
    for f in tl.static_range(8):
        new = new + (tl.dot(_field(low, high, f), q, qk[f]),)
    return new


@triton.jit
def add_products(base, page, row, q, qk, g: tl.constexpr, K: tl.constexpr, INTERPRET: tl.constexpr):
    for t in tl.static_range(count(K.key_runs)):
        qk = _add_run(base, page, row, q[t], qk, pick(K.key_runs, t))
    return qk


@triton.jit
def _add_value_run(base, page, row, p, acc, T: tl.constexpr):
    low, high = _load(base, page, row, T, True)
    for f in tl.static_range(8):
        acc = tl.dot(_field(low, high, f), p[f], acc)
    return acc


@triton.jit
def add_values(base, page, row, p, acc, acc_high, V: tl.constexpr, INTERPRET: tl.constexpr):
    new = ()
    for t in tl.static_range(count(V.value_runs)):
        new = new + (_add_value_run(base, page, row, p[0], acc[t], pick(V.value_runs, t)),)
    return new, acc_high


@triton.jit
def element_values(block, table, header, f, row, c, mask, ROWS: tl.constexpr):
    code = element_code(block, table, header, f, row, c, mask, ROWS)
    _, scale = load_params(block, header, f, row, c // header.group_size, mask, ROWS)
    value = _numbers(code).to(tl.float32) * 16384.0
    return tl.where(mask, value * (scale * channel_step(table, header.head_dim, c, mask)), 0.0)


# -- device write ----------------------------------------------------------------------------------


@triton.jit
def write_block(
    block, table, header, clip, clip_step, clipped, source, LOAD: tl.constexpr, ROWS: tl.constexpr,
    PACKED: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    write_params(block, table, header, clip, clip_step, clipped, source, ROWS, PACKED, OWN)
    tl.debug_barrier()
    width: tl.constexpr = tile_width(WORD_TILE, ROWS)
    dim = header.head_dim
    row = tl.arange(0, ROWS)[:, None]
    for first in range(0, dim, width):
        c = first + tl.arange(0, width)[None, :]
        valid = c < dim
        step = channel_step(table, dim, c, valid)
        words = tl.zeros((ROWS, width), tl.int32)
        for f in tl.static_range(8):
            x = LOAD(source, f, row, c, valid, ROWS, PACKED, OWN)
            _, scale = load_params(block, header, f, row, c // header.group_size, valid, ROWS)
            u = tl.math.div_rn(x, tl.maximum(scale, TINY) * step)
            size = tl.abs(u)
            code = (
                (size >= 0.25).to(tl.int32)
                + (size >= 0.75).to(tl.int32)
                + (size >= 1.25).to(tl.int32)
            )
            code += (
                (size >= 1.75).to(tl.int32)
                + (size >= 2.5).to(tl.int32)
                + (size >= 3.5).to(tl.int32)
            )
            code += (size >= 5.0).to(tl.int32) + 8 * (u < 0).to(tl.int32)
            words |= field_bits(code, 4, f, 0, valid)
        store_words(
            block,
            words,
            channel_row(table, dim, c, valid, PLANE_0),
            tl.where(valid, 4, 0),
            0,
            row,
            ROWS,
        )
