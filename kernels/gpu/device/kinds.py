"""Pages that are read and written element by element, from a format's table (gpu/tables.py), for
all kinds of code.

One kernel serves all formats whose kinds it knows: 16-bit, symmetric and minimum-maximum codes, in
bit planes or trits. The table's header says which. A kind that has code of its own
(docs/kernels.md) is given in OWN, a tuple of gpu/kinds.py's DeviceCode, and is number OWN_CODE +
its place there.
"""

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.binary import element_code as binary_code
from kvfold.kernels.gpu.device.binary import write_codes as write_binary
from kvfold.kernels.gpu.device.bits import count, pick
from kvfold.kernels.gpu.device.codec import IN_BLOCKS, channel_row, channel_step, load_params
from kvfold.kernels.gpu.device.columns import LEVELS, OWN_CODE, RAW, SCALE_MIN
from kvfold.kernels.gpu.device.places import row_offsets
from kvfold.kernels.gpu.device.ternary import element_code as ternary_code
from kvfold.kernels.gpu.device.ternary import write_codes as write_ternary


@triton.jit
def _known_elements(block, table, header, f, row, c, mask, ROWS: tl.constexpr):
    """`decode_elements` of the kinds that need no code of their own."""
    dim = header.head_dim
    if header.whole > 0:
        code = ternary_code(block, header, f, row, c, mask, ROWS)
    else:
        code = binary_code(block, table, header, f, row, c, mask, ROWS)
    levels = channel_row(table, dim, c, mask, LEVELS)
    minimum, scale = load_params(
        block, header, f, row, c // header.group_size, mask & (header.kind != RAW), ROWS
    )
    centre = tl.where(header.kind == SCALE_MIN, 0.0, (levels - 1).to(tl.float32) * 0.5)
    value = (code.to(tl.float32) - centre) * (scale * channel_step(table, dim, c, mask)) + minimum
    value = tl.where(
        header.kind == RAW, code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), value
    )
    return tl.where(levels > 0, value, 0.0)


@triton.jit
def decode_elements(
    block, table, header, f, row, c, mask, OWN: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr = 0
):  # fmt: skip
    """Elements (field f, row, channel c) of a head's block, float32; 0 where nothing is stored or
    not mask.

    Args:
        header: `read_header` of the table.
        f, row, c: integers or tensors that broadcast to the result's shape, as does mask; c and
            mask are of one shape.
        OWN, FIRST: kinds with code of their own, and the first of them that it may be.
    """
    if count(OWN) > FIRST:
        if header.kind == OWN_CODE + FIRST:
            x = pick(OWN, FIRST).element_values(block, table, header, f, row, c, mask, ROWS)
        else:
            x = decode_elements(block, table, header, f, row, c, mask, OWN, ROWS, FIRST + 1)
        return x
    else:
        return _known_elements(block, table, header, f, row, c, mask, ROWS)


@triton.jit
def _aligned(row, ROWS: tl.constexpr):
    """Pointers to 16-bit rows, of which the compiler knows that they are multiples of 16 bytes, so
    that a thread reads channels side by side. Of a page's only row (ROWS = 1) it forgets it."""
    if ROWS > 1:
        return tl.multiple_of(row, [16, 16])
    else:
        return row


@triton.jit
def load_source(
    source, f, row, c, mask, ROWS: tl.constexpr, PACKED: tl.constexpr, OWN: tl.constexpr
):
    """Elements (field f, row, channel c) of a page to be written, float32, 0 where not mask.

    Args:
        source: RawRows, or where PACKED is true a PackedBlock, or where it is IN_BLOCKS a
            BlockRows. 16-bit rows begin at addresses that are multiples of 16 bytes.
        f, row, c: integers or tensors that broadcast to the result's shape, as does mask; c and
            mask are of one shape; f or row is of two dimensions.
    """
    if PACKED == IN_BLOCKS:
        place = source.start + f * ROWS + row
        at = row_offsets(
            source.table, place, place >= 0, source.block_stride, source.stride, source.shift
        )
        return tl.load(_aligned(source.rows + at, ROWS) + c, mask=mask, other=0.0).to(tl.float32)
    elif PACKED:
        return decode_elements(
            source.block, source.table, source.header, f, row, c, mask, OWN, ROWS
        )
    else:
        place = source.start + f * ROWS + row
        place = tl.where(place >= source.end, place - source.ring, place)
        first = source.rows + place.to(tl.int64) * source.stride
        return tl.load(_aligned(first, ROWS) + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def write_codes(
    block, table, header, source, ROWS: tl.constexpr, PACKED: tl.constexpr, OWN: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """Codes and packs the elements of `source` (`load_source`), whose parameters the block has, of
    a kind that needs no code of its own."""
    if header.whole > 0:
        write_ternary(block, table, header, source, load_source, ROWS, PACKED, OWN)
    else:
        write_binary(block, table, header, source, load_source, ROWS, PACKED, OWN, UNROLL)
