"""Where pages and 16-bit rows lie in the blocks of an engine's pool, for the Triton kernels.

A block table names blocks. What a kernel goes on with is the same as from a table of addresses: of
a page its distance from a pointer, in units of 16 bytes, and of a row its distance in numbers.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class BlockRows(NamedTuple):
    """16-bit rows of one sequence and head, by position: the row of token t is row t mod 2^shift of
    block table[t >> shift]."""

    rows: Any  # pointer to float16, of block 0
    stride: Any  # from one row to the next
    table: Any  # pointer to int32 numbers of blocks
    block_stride: Any
    shift: Any
    start: Any  # position of a page's first token


@triton.jit
def row_offsets(table, position, mask, block_stride, stride, shift):
    """Distances, int64, of the rows of tokens at `position` from a block table's block 0; 0 where
    not mask."""
    block = tl.load(table + (position >> shift), mask=mask, other=0).to(tl.int64)
    return block * block_stride + tl.where(mask, position & ((1 << shift) - 1), 0) * stride


@triton.jit
def load_pages(table, number, mask, first, block_step, page_step, PER_BLOCK: tl.constexpr):
    """Addresses of pages, as `page_address` gives them; of memory that can be read and holds finite
    numbers where not mask: block 0's, or the table's first.

    With PER_BLOCK pages in a block, page `number` lies in place number + first of a sequence, and
    addresses count from block 0. With 0 the table holds addresses itself.
    """
    if PER_BLOCK > 0:
        place = tl.where(mask, number + first, 0)
        block = tl.load(table + place // PER_BLOCK, mask=mask, other=0).to(tl.int64)
        return block * block_step + place % PER_BLOCK * page_step
    else:
        return tl.load(table + number, mask=mask, other=0)
