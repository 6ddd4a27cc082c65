"""How many channels the kernels that write and decode pages take at a time."""

import triton
import triton.language as tl

WORD_TILE: tl.constexpr = tl.constexpr(256)  # words at a time
TOKEN_TILE: tl.constexpr = tl.constexpr(512)  # elements of all tokens at a time


@triton.constexpr_function
def tile_width(tile, rows):
    """Channels of a tile of so many elements, for `rows` rows."""
    return max(16, tile // rows)
