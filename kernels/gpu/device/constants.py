"""Numbers that several kernels share; `.value` is the number on the host."""

import triton.language as tl

NEVER: tl.constexpr = tl.constexpr(
    -1.0e30
)  # a score that no query sees; finite, so that differences of two are no NaN
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
SUBNORMAL: tl.constexpr = tl.constexpr(
    16777216.0
)  # 2^24: a code read as the bits of a float16 is worth code · 2^−24
ROUNDING: tl.constexpr = tl.constexpr(
    8388608.0
)  # 2^23: a float32 of this size has no bits behind the point
