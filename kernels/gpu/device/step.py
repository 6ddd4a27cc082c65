"""What a step brings: its key and value as a 16-bit row, and its queries as attention reads them."""

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.bits import pow2
from kvfold.kernels.gpu.device.codec import to_fp16
from kvfold.kernels.gpu.device.mean import key_mean, write_bias, write_coefficients

BLOCK: tl.constexpr = tl.constexpr(32)  # rows of a matrix at a time
# marks of one token; twice as many as there may be layers
LABELS: tl.constexpr = tl.constexpr(65536)


@triton.jit
def _mark(mark, x, j, token, label):
    """mark = min(mark, token · LABELS + label) if a channel of x is NaN or infinite. Each thread
    sees to its own channels and nothing waits for it; where all is finite nothing is written."""
    code = (j * 0).to(tl.int64) + (token.to(tl.int64) * LABELS + label)
    finite = tl.abs(x) < float("inf")
    tl.atomic_min(mark + j * 0, code, mask=finite == 0, sem="relaxed")


@triton.jit
def write_row(
    out, x_ptr, matrix, offset, mark, token, label, u, spans, within, steps, channels,
    DIM: tl.constexpr, MATRIX: tl.constexpr, OFFSET: tl.constexpr, MARKS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """out = float16(M(x − μ)), saturating; with MARKS, x that is not finite is marked, of which
    saturation leaves no trace.

    With MEAN, μ is the rotating mean of token u behind the sinks, 0 where u < 0.
    """
    j = tl.arange(0, pow2(DIM))
    x = tl.load(x_ptr + j, mask=j < DIM, other=0.0).to(tl.float32)
    if MARKS:
        _mark(mark, x, j, token, label)
    if MEAN > 0:
        mean = key_mean(
            offset, spans, within, steps, channels, tl.maximum(u, 0), j, DIM, DIM // 8, MEAN
        )
        x = x - tl.where(u >= 0, mean, 0.0)
    elif OFFSET:
        x = x - tl.load(offset + j, mask=j < DIM, other=0.0)
    if MATRIX:
        for start in tl.static_range(0, pow2(DIM), BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = (i < DIM)[:, None] & (j < DIM)[None, :]
            m = tl.load(matrix + i[:, None] * DIM + j[None, :], mask=inside, other=0.0)
            tl.store(out + i, to_fp16(tl.sum(m * x[None, :], 1)), mask=i < DIM)
    else:
        tl.store(out + j, to_fp16(x), mask=j < DIM)


@triton.jit
def write_queries(
    out, scale, shift, q_ptr, stride, matrix, offset, factor, scaling,
    DIM: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, TOP: tl.constexpr,
    MATRIX: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """out[n] = float16(power · q_n M⁻¹) for n < GROUP, else 0; scale = factor / power, a power of
    two that brings the largest component to [2^(TOP − 1), 2^TOP]; with SHIFT, shift[n] = scaling ·
    q_n·μ."""
    rows: tl.constexpr = max(16, N) if MATRIX else N  # a matrix product has sixteen rows
    n = tl.arange(0, rows)
    j = tl.arange(0, pow2(DIM))
    if MATRIX:
        q = tl.zeros((rows, pow2(DIM)), tl.float32)
        for start in tl.range(0, pow2(DIM), BLOCK, num_stages=3):
            i = start + tl.arange(0, BLOCK)
            inside = (n < GROUP)[:, None] & (i < DIM)[None, :]
            a = tl.load(q_ptr + n[:, None] * stride + i[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            m = tl.load(
                matrix + i[:, None] * DIM + j[None, :],
                mask=(i < DIM)[:, None] & (j < DIM)[None, :],
                other=0.0,
            )
            q = tl.dot(a, m, q, input_precision="tf32x3")
    else:
        inside = (n < GROUP)[:, None] & (j < DIM)[None, :]
        q = tl.load(q_ptr + n[:, None] * stride + j[None, :], mask=inside, other=0.0).to(tl.float32)
    if SHIFT:  # of the query as it came
        mu = tl.load(offset + j, mask=j < DIM, other=0.0)
        own = (n < GROUP)[:, None] & (j < DIM)[None, :]
        given = tl.load(q_ptr + n[:, None] * stride + j[None, :], mask=own, other=0.0).to(
            tl.float32
        )
        tl.store(shift + n, tl.sum(given * mu[None, :], 1) * scaling, mask=n < N)
    largest = tl.maximum(tl.max(tl.max(tl.abs(q), 1), 0), 1.0e-30)
    bits = largest.to(tl.int32, bitcast=True)
    above = (
        (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    )  # the logarithm to base 2, rounded up
    power = ((TOP - above + 127) << 23).to(tl.float32, bitcast=True)
    back = ((above - TOP + 127) << 23).to(tl.float32, bitcast=True)
    tl.store(scale, factor * back)
    tl.store(
        out + n[:, None] * DIM + j[None, :],
        to_fp16(q * power),
        mask=(n < N)[:, None] & (j < DIM)[None, :],
    )


@triton.jit
def write_query(
    part, place, length, before, q_ptr, stride, out, scale, shift, matrix, offset, coefficients, bias, steps, pairs,
    factor, scaling, bias_steps,
    DIM: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, TOP: tl.constexpr, MATRIX: tl.constexpr,
    SHIFT: tl.constexpr, MEAN: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """What the attention kernels read of the queries of one sequence and KV head, which is number
    `place` of all. Part 0 are the queries themselves and, with MEAN, their coefficients; each
    further part is the bias of BIAS steps, of the tokens that lie behind the sinks: those at
    `length`, less `before`."""
    if part > 0:
        if MEAN > 0:
            start = (part - 1) * BIAS
            end = tl.maximum(tl.load(length) - before, 0) // 32 + 1
            if start < end:
                write_bias(
                    bias + place.to(tl.int64) * bias_steps * N, q_ptr, stride, offset, pairs, steps, factor,
                    start, end, DIM, GROUP, N, DIM // 8, BIAS,
                )  # fmt: skip
    else:
        if MEAN > 0:
            to = coefficients + place.to(tl.int64) * (2 * MEAN * N)
            write_coefficients(
                to, q_ptr, stride, offset, pairs, factor, DIM, GROUP, N, DIM // 8, MEAN
            )
        write_queries(
            out + place.to(tl.int64) * (N * DIM), scale + place, shift + place * N, q_ptr, stride, matrix, offset,
            factor, scaling,
            DIM, GROUP, N, TOP, MATRIX, SHIFT,
        )  # fmt: skip
