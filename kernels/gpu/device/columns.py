"""Where the numbers of a format's table (gpu/tables.py) stand; `.value` is the number on the
host."""

import triton.language as tl

HEADER: tl.constexpr = tl.constexpr(24)  # numbers before the rows
# places in the header
NBYTES: tl.constexpr = tl.constexpr(0)  # of one head's block
HEAD_DIM: tl.constexpr = tl.constexpr(1)  # channels
KIND: tl.constexpr = tl.constexpr(2)  # of codes, one of:
SCALE, SCALE_MIN, RAW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
OWN_CODE: tl.constexpr = tl.constexpr(3)  # the first of those that have code of their own
PARAMS: tl.constexpr = tl.constexpr(3)  # bytes from the block to the first parameter
PARAM_NBYTES: tl.constexpr = tl.constexpr(4)  # of one parameter: 1 is e4m3, 2 float16
GROUP_SIZE: tl.constexpr = tl.constexpr(5)  # channels of a parameter group
CODED: tl.constexpr = tl.constexpr(6)  # channels of more than 0 levels
PARTS: tl.constexpr = tl.constexpr(7)  # `Storage.parts`, three numbers:
WHOLE: tl.constexpr = PARTS  # ternary: bytes of five codes; 0 if the codes are binary
LEFT: tl.constexpr = tl.constexpr(8)  # ternary: codes left over
WORDS: tl.constexpr = tl.constexpr(9)  # ternary: word tiles of R rows
# bits of float32, of symmetric codes: what the error along a token counts more, what a channel's
# error is cut off at, and what a root mean square is multiplied by, TRIALS numbers
ALONG, MOST_UNITS, FACTORS = tl.constexpr(10), tl.constexpr(11), tl.constexpr(16)
TRIALS: tl.constexpr = tl.constexpr(8)

# rows
LEVELS: tl.constexpr = tl.constexpr(0)  # 0: not stored
STEP: tl.constexpr = tl.constexpr(
    1
)  # bits of a float32: of symmetric codes, in units of the token's scale; else 1
PARTNER: tl.constexpr = tl.constexpr(2)  # channel that this one's words of one bit take in, or −1
# bits of a code in the first plane, 2^8 · those in the second, 2^16 · which of two channels of a
# word of one bit
WIDTHS: tl.constexpr = tl.constexpr(3)
# words from the block to the first plane's word in row 0, and 2^16 · words from a row to the next;
# the same of the second plane
PLANE_0, PLANE_1 = tl.constexpr(4), tl.constexpr(5)
# bits of a float32: of symmetric codes, how much a channel's error counts; else 0
WEIGHT: tl.constexpr = tl.constexpr(6)
ROWS: tl.constexpr = tl.constexpr(7)
