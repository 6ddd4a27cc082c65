"""Writes one head's block of a page, of the format that a table (gpu/tables.py) describes:
parameters first, then the codes. The pages' part of the writing kernels.

Nothing here is compiled for a format: channels are taken a fixed number at a time, and what the
table says of them is read with them. A word gathers its codes field by field (kinds/bits.py) in the
registers of its channel. Parameters are read back from the page as rounded.
"""

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.bits import count, pick
from kvfold.kernels.gpu.device.codec import channel_row, read_header, store_param
from kvfold.kernels.gpu.device.columns import CODED, HEADER, LEVELS, OWN_CODE, RAW, SCALE, SCALE_MIN
from kvfold.kernels.gpu.device.kinds import load_source, write_codes
from kvfold.kernels.gpu.device.scale import best_scale
from kvfold.kernels.gpu.device.sixteen import write_rows
from kvfold.kernels.gpu.device.tiles import TOKEN_TILE, tile_width


@triton.jit
def write_params(
    block, table, header, clip, clip_step, clipped, source, ROWS: tl.constexpr, PACKED: tl.constexpr, OWN: tl.constexpr
):  # fmt: skip
    """Scales, one a token, or minima and scales, one pair a token and group. Kinds that are neither
    get root mean squares."""
    tokens: tl.constexpr = 8 * ROWS
    width: tl.constexpr = tile_width(TOKEN_TILE, tokens)
    dim, nbytes, size = header.head_dim, header.param_nbytes, header.group_size
    from_minimum = header.kind == SCALE_MIN
    coded = tl.zeros((tokens,), tl.float32) + tl.load(table + CODED).to(tl.float32)
    top = tl.zeros((tokens,), tl.float32) + (tl.load(table + HEADER + LEVELS * dim) - 1).to(
        tl.float32
    )
    token = tl.arange(0, tokens)
    t = token[:, None]
    s = tl.arange(0, width)[None, :]
    at = header.params + ((token % ROWS) * 8 + token // ROWS) * nbytes
    every = token < tokens
    for start in range(0, dim, size):  # a group
        low = tl.full((tokens, width), float("inf"), tl.float32)
        high = tl.full((tokens, width), float("-inf"), tl.float32)
        total = tl.zeros((tokens, width), tl.float32)
        for first in range(start, start + size, width):
            c = first + s
            inside = c < start + size
            x = load_source(source, t // ROWS, t % ROWS, c, inside, ROWS, PACKED, OWN)
            low = tl.minimum(low, tl.where(inside, x, float("inf")))
            high = tl.maximum(high, tl.where(inside, x, float("-inf")))
            total += tl.where(channel_row(table, dim, c, inside, LEVELS) > 0, x * x, 0.0)
        factor = tl.load(clip, mask=clipped > 0, other=1.0)
        least = tl.min(low, 1) * factor
        scale = tl.math.div_rn(tl.max(high, 1) * factor - least, top)
        lone = tl.math.sqrt_rn(tl.math.div_rn(tl.sum(total, 1), coded))
        if header.kind == SCALE:
            lone = best_scale(table, header, lone, source, ROWS, PACKED, OWN)
        store_param(block, tl.where(from_minimum, least, lone), at, nbytes, every)
        store_param(block, scale, at + tokens * nbytes, nbytes, every & from_minimum)
        at += 2 * tokens * nbytes
        clip += clip_step


@triton.jit
def _write_known(
    block, table, clip, clip_step, clipped, source, ROWS: tl.constexpr, PACKED: tl.constexpr, OWN: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """`write_block` of the kinds that need no code of their own."""
    header = read_header(table)
    if header.kind == RAW:
        write_rows(block, header.head_dim, source, load_source, ROWS, PACKED, OWN)
    else:
        write_params(block, table, header, clip, clip_step, clipped, source, ROWS, PACKED, OWN)
        tl.debug_barrier()  # the parameters are read back
        write_codes(block, table, header, source, ROWS, PACKED, OWN, UNROLL)


@triton.jit
def write_block(
    block, table, clip, clip_step, clipped, source, ROWS: tl.constexpr, PACKED: tl.constexpr, OWN: tl.constexpr,
    UNROLL: tl.constexpr, FIRST: tl.constexpr = 0,
):  # fmt: skip
    """Encodes one head's page.

    Args:
        block: uint8 pointer to the head's block of the page.
        table: int32 pointer to the table of its format.
        clip, clip_step, clipped: float32 pointer to factors on (minimum, maximum), numbers from one
            group's to the next one's, and whether there are any.
        source, PACKED: see `load_source`.
        ROWS: R, rows of words in a page.
        OWN, FIRST: kinds with code of their own, and the first of them that it may be; see
            kinds.py.
        UNROLL: fields that are asked for at a time: the more, the less is waited for memory, and
            the longer the compiler takes.
    """
    if count(OWN) > FIRST:
        header = read_header(table)
        if header.kind == OWN_CODE + FIRST:
            pick(OWN, FIRST).write_block(
                block,
                table,
                header,
                clip,
                clip_step,
                clipped,
                source,
                load_source,
                ROWS,
                PACKED,
                OWN,
            )
        else:
            write_block(
                block, table, clip, clip_step, clipped, source, ROWS, PACKED, OWN, UNROLL, FIRST + 1
            )
    else:
        _write_known(block, table, clip, clip_step, clipped, source, ROWS, PACKED, OWN, UNROLL)
