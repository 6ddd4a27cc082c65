"""The kinds of codes, each a file of its own, that the kernels choose from: by a constant where
pages are read for tensor cores, by the table's header where they are read and written element by
element.
"""

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.binary import add_products as binary_products
from kvfold.kernels.gpu.device.binary import add_values as binary_values
from kvfold.kernels.gpu.device.binary import element_code as binary_code
from kvfold.kernels.gpu.device.binary import write_codes as write_binary
from kvfold.kernels.gpu.device.codec import channel_row, channel_step, load_params
from kvfold.kernels.gpu.device.columns import LEVELS, RAW, SCALE_MIN
from kvfold.kernels.gpu.device.sixteen import add_products as sixteen_products
from kvfold.kernels.gpu.device.sixteen import add_values as sixteen_values
from kvfold.kernels.gpu.device.ternary import add_products as ternary_products
from kvfold.kernels.gpu.device.ternary import add_values as ternary_values
from kvfold.kernels.gpu.device.ternary import element_code as ternary_code
from kvfold.kernels.gpu.device.ternary import write_codes as write_ternary
from kvfold.kernels.packing import SIXTEEN, TRIT

TERNARY: tl.constexpr = tl.constexpr(TRIT)
SIXTEEN_BITS: tl.constexpr = tl.constexpr(SIXTEEN)


@triton.jit
def add_products(base, page, row, q, qk, g: tl.constexpr, K: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds products of queries with the codes of keys to eight scores [16, N] of parameter group g.

    Args:
        base, page: of the head's block, as in `row_pointers`; row: int32 [16], rows of words.
        q: one float16 [size, N] for each run of K, a HeadLayout.
    """
    if K.storage == TERNARY:
        return ternary_products(base, page, row, q, qk, g, K, INTERPRET)
    elif K.storage == SIXTEEN_BITS:
        return sixteen_products(base, page, row, q, qk, K)
    else:
        return binary_products(base, page, row, q, qk, g, K, INTERPRET)


@triton.jit
def add_values(base, page, row, p, acc, acc_high, V: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds the codes of values, times weights, to the outputs [size, N] of each run of V, a
    HeadLayout; of planes from bit 4 on to acc_high, in units of 16.

    p: for each parameter group eight float16 [16, N].
    """
    if V.storage == TERNARY:
        return ternary_values(base, page, row, p, acc, V, INTERPRET), acc_high
    elif V.storage == SIXTEEN_BITS:
        return sixteen_values(base, page, row, p[0], acc, V), acc_high
    else:
        return binary_values(base, page, row, p, acc, acc_high, V, INTERPRET)


@triton.jit
def decode_elements(block, table, header, f, row, c, mask, ROWS: tl.constexpr):
    """Elements (field f, row, channel c) of a head's block, float32; 0 where nothing is stored or not mask.

    Args:
        header: `read_header` of the table.
        f, row, c: integers or tensors that broadcast to the result's shape, as does mask; c and mask are of one shape.
    """
    dim = header.head_dim
    if header.whole > 0:
        code = ternary_code(block, header, f, row, c, mask, ROWS)
    else:
        code = binary_code(block, table, header, f, row, c, mask, ROWS)
    levels = channel_row(table, dim, c, mask, LEVELS)
    minimum, scale = load_params(block, header, f, row, c // header.group_size, mask & (header.kind != RAW), ROWS)
    centre = tl.where(header.kind == SCALE_MIN, 0.0, (levels - 1).to(tl.float32) * 0.5)
    value = (code.to(tl.float32) - centre) * (scale * channel_step(table, dim, c, mask)) + minimum
    value = tl.where(header.kind == RAW, code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32), value)
    return tl.where(levels > 0, value, 0.0)


@triton.jit
def load_source(source, f, row, c, mask, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """Elements (field f, row, channel c) of a page to be written, float32, 0 where not mask.

    Args:
        source: RawRows, or with PACKED a PackedBlock.
        f, row, c: integers or tensors that broadcast to the result's shape, as does mask; c and mask are of one shape.
    """
    if PACKED:
        return decode_elements(source.block, source.table, source.header, f, row, c, mask, ROWS)
    else:
        place = source.start + f * ROWS + row
        place = tl.where(place >= source.end, place - source.ring, place)
        ptr = source.rows + place.to(tl.int64) * source.stride + c
        return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def write_codes(block, table, header, source, ROWS: tl.constexpr, PACKED: tl.constexpr, UNROLL: tl.constexpr):
    """Codes and packs the elements of `source` (`load_source`), whose parameters the block has."""
    if header.whole > 0:
        write_ternary(block, table, header, source, load_source, ROWS, PACKED)
    else:
        write_binary(block, table, header, source, load_source, ROWS, PACKED, UNROLL)
