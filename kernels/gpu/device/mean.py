"""What the logits of packed and of 16-bit keys get back for the rotating mean that was taken off
them, for the Triton kernels.

key_mean.py defines the mean. Of a query column with coefficients c, in the units of its scores, a
kernel reads

    A [2F, N]  Re c, then −Im c                B [2F, N]  −Im c, then −Re c            of the fast
    pairs bias [steps, N]                            Re Σ c_i·(turn of step m) of the slow pairs

so that with the turn (cos, sin) of a span of 128 tokens C = cos·A + sin·B holds the coefficients
turned there, and T·C is what the fast pairs add to each of its tokens. |q·m| may be in the
hundreds, so C goes through the tensor cores in two float16 halves; T is float16 by definition. The
bias is added in float32.
"""

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.bits import pow2


@triton.jit
def turned_coefficients(a, b, spans, span, ROWS: tl.constexpr):
    """C of one span in two float16 halves [ROWS, N], which the sum of gives it; `spans` the table,
    `span` its entry."""
    k = tl.arange(0, ROWS)
    at = spans + span * (2 * ROWS) + k
    c = tl.load(at)[:, None] * a + tl.load(at + ROWS)[:, None] * b
    high = c.to(tl.float16)
    return high, (c - high.to(tl.float32)).to(tl.float16)


@triton.jit
def slow_bias(bias, step, n, mask, N: tl.constexpr):
    """The slow pairs' share [N, rows] in the scores of keys of steps [rows], 0 where not `mask`."""
    return tl.load(bias + step[None, :] * N + n[:, None], mask=mask[None, :], other=0.0)


@triton.jit
def raw_mean(a, bias, spans, within, u, mask, n, N: tl.constexpr, ROWS: tl.constexpr):
    """What 16-bit rows of tokens u [rows] behind the sinks add to the scores [rows, N]; 0 where not
    `mask`.

    a: float32 [ROWS, N]; bias: pointer to [steps, N] of this place.
    """
    half: tl.constexpr = ROWS // 2
    k = tl.arange(0, ROWS)
    span = tl.where(mask, u, 0) // 128
    place = tl.where(mask, u, 0) % 128
    # kernels are not specialised on how the tables are aligned, and else a thread would load number
    # by number, and of every row
    at = tl.multiple_of(spans + span[:, None] * (2 * ROWS) + k[None, :], [1, 16])
    cos = tl.load(at)
    sin = tl.load(tl.multiple_of(at + ROWS, [1, 16]))
    t = within + place[:, None] * ROWS
    own = tl.load(tl.multiple_of(t + k[None, :], [1, 16])).to(tl.float32)
    other = tl.load(t + ((k + half) % ROWS)[None, :]).to(tl.float32)
    x = cos * own + tl.where(k < half, -1.0, 1.0)[None, :] * sin * other
    x = tl.where(mask[:, None], x, 0.0)
    slow = slow_bias(bias, tl.where(mask, u, 0) // 32, n, mask, N)
    return tl.dot(x, a, input_precision="tf32x3") + tl.trans(slow)


@triton.jit
def key_mean(
    offset, spans, within, steps, channels, u, j, DIM: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """m_t of one head, float32 [j], of a token u ≥ 0 behind the sinks; `offset`: pointer to the
    head's mean."""
    slow: tl.constexpr = DIM // 2 - FAST
    inside = j < DIM
    pair = tl.load(channels + j, mask=inside, other=0)
    partner = tl.load(channels + DIM + j, mask=inside, other=0)
    first = partner < 0
    partner = tl.where(first, partner + DIM, partner)
    fast = inside & (pair < FAST)
    far = inside & (pair >= FAST)
    span = spans + (u // 128) * (2 * ROWS) + pair
    cos = tl.load(span, mask=fast, other=0.0)
    sin = tl.load(span + ROWS, mask=fast, other=0.0)
    near = within + (u % 128) * ROWS + pair
    t_cos = tl.load(near, mask=fast, other=0.0).to(tl.float32)
    t_sin = tl.load(near + ROWS // 2, mask=fast, other=0.0).to(tl.float32)
    step = steps + (u // 32) * (2 * slow) + pair - FAST
    turn_cos = tl.where(fast, cos * t_cos - sin * t_sin, tl.load(step, mask=far, other=0.0))
    turn_sin = tl.where(fast, sin * t_cos + cos * t_sin, tl.load(step + slow, mask=far, other=0.0))
    own = tl.load(offset + j, mask=inside, other=0.0)
    other = tl.load(offset + partner, mask=inside, other=0.0)
    return own * turn_cos + tl.where(first, -1.0, 1.0) * other * turn_sin


@triton.jit
def stored_mean(
    fast, slow, spans, within, u, known, c, inside, DIM: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """What keys of tokens u [rows] behind the sinks were stored without, in their stored basis:
    float32 [rows, channels] of channels c [1, channels], 0 where not `known` or not `inside`.

    fast: pointer to a head's [ROWS, DIM], what the cosines and then the sines of the fast pairs are
    multiplied with; slow: to its [steps, DIM], the slow pairs' share (kernels.gpu.mean.StoredMean).
    """
    half: tl.constexpr = ROWS // 2
    k = tl.arange(0, ROWS)
    u = tl.where(known, u, 0)
    at = tl.multiple_of(spans + (u // 128)[:, None] * (2 * ROWS) + k[None, :], [1, 16])
    t = within + (u % 128)[:, None] * ROWS
    own = tl.load(tl.multiple_of(t + k[None, :], [1, 16])).to(tl.float32)
    other = tl.load(t + ((k + half) % ROWS)[None, :]).to(tl.float32)
    sign = tl.where(k < half, -1.0, 1.0)[None, :]
    x = tl.load(at) * own + sign * tl.load(tl.multiple_of(at + ROWS, [1, 16])) * other
    w = tl.load(fast + k[:, None] * DIM + c, mask=inside, other=0.0)
    base = tl.load(slow + (u // 32)[:, None] * DIM + c, mask=inside, other=0.0)
    if x.shape[0] < 16:  # too few rows for a matrix product
        mean = tl.sum(x[:, :, None] * w[None, :, :], 1) + base
    else:
        mean = tl.dot(x, w, base, input_precision="tf32x3")
    return tl.where(known[:, None], mean, 0.0)


@triton.jit
def write_coefficients(
    out, q_ptr, stride, offset, pairs, factor, DIM: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr,
    FAST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A and B of the queries of one step."""
    half: tl.constexpr = ROWS // 2
    p = tl.arange(0, half)
    n = tl.arange(0, N)
    real, imag = _coefficients(q_ptr, stride, offset, pairs, factor, p, n, p < FAST, DIM, GROUP)
    to = out + p[:, None] * N + n[None, :]
    tl.store(to, real)
    tl.store(to + half * N, -imag)
    tl.store(to + ROWS * N, -imag)
    tl.store(to + (ROWS + half) * N, -real)


@triton.jit
def _coefficients(
    q_ptr, stride, offset, pairs, factor, p, n, known, DIM: tl.constexpr, GROUP: tl.constexpr
):
    """Re c and Im c [p, n] of pairs p of query heads n, 0 where there is none."""
    first = tl.load(pairs + p, mask=known, other=0)
    second = tl.load(pairs + DIM // 2 + p, mask=known, other=0)
    mask = known[:, None] & (n < GROUP)[None, :]
    q = q_ptr + n[None, :] * stride
    q_real = tl.load(q + first[:, None], mask=mask, other=0.0).to(tl.float32)
    q_imag = tl.load(q + second[:, None], mask=mask, other=0.0).to(tl.float32)
    b_real = tl.load(offset + first, mask=known, other=0.0)[:, None] * factor
    b_imag = tl.load(offset + second, mask=known, other=0.0)[:, None] * factor
    return q_real * b_real + q_imag * b_imag, q_real * b_imag - q_imag * b_real


@triton.jit
def write_bias(
    out, q_ptr, stride, offset, pairs, steps, factor, start, end, DIM: tl.constexpr, GROUP: tl.constexpr,
    N: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bias of steps start … start + BLOCK − 1, those below `end`."""
    slow: tl.constexpr = DIM // 2 - FAST
    width: tl.constexpr = max(16, pow2(slow))
    k = tl.arange(0, width)
    n = tl.arange(0, N)
    m = start + tl.arange(0, BLOCK)
    real, imag = _coefficients(
        q_ptr, stride, offset, pairs, factor, FAST + k, n, k < slow, DIM, GROUP
    )
    at = steps + m[:, None] * (2 * slow) + k[None, :]
    known = (m < end)[:, None] & (k < slow)[None, :]
    cos = tl.load(at, mask=known, other=0.0)
    sin = tl.load(at + slow, mask=known, other=0.0)
    total = tl.dot(cos, real, input_precision="tf32x3")
    total = tl.dot(sin, -imag, total, input_precision="tf32x3")
    tl.store(
        out + m[:, None] * N + n[None, :], total, mask=(m < end)[:, None] & (n < GROUP)[None, :]
    )
