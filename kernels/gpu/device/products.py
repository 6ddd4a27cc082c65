"""Products with float32 matrices, as exact as float32 needs them."""

import triton
import triton.language as tl


@triton.jit
def add_product(a, m, x, INTERPRET: tl.constexpr):
    """x + a @ m: a of any float type, m and x float32.

    Tensor cores multiply bfloat16 at twice the rate of float32's rounded pieces. Numbers that are
    bfloat16 already need no second piece, so only the matrix is cut in two, which keeps 16 of its
    bits; the result goes into 11. What is infinite stays so: the low piece's part may be NaN there,
    and is left out. The interpreter has no products of bfloat16.
    """
    if a.dtype == tl.bfloat16 and not INTERPRET:
        high = m.to(tl.bfloat16)
        low = (m - high.to(tl.float32)).to(tl.bfloat16)
        rest = tl.dot(a, low)
        return tl.dot(a, high, x) + tl.where(tl.abs(rest) < float("inf"), rest, 0.0)
    else:
        return tl.dot(a.to(tl.float32), m, x, input_precision="tf32x3")
