"""Scores of packed keys, for the attention kernel: eight [N, 16], one for each field of a word
(kinds/bits.py).

Runs of channels are constants (layout.py). Keys and values have their rows along different axes.
Their pointers are turned so that the rows of both lie along the second: else the compiler gives
each its own copy of the pages' addresses, loaded and carried from pass to pass, and a prompt's 16
columns have no registers left for that.
"""

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.bits import count, load_params, pick
from kvfold.kernels.gpu.device.constants import LOG2_E, NEVER, SUBNORMAL
from kvfold.kernels.gpu.device.mean import slow_bias, turned_coefficients


@triton.jit
def _run_queries(q_ptr, n, dim, T: tl.constexpr, N: tl.constexpr):
    """The queries of a run of channels, float16 [size, N], times the step of its codes."""
    c = tl.arange(0, T.size)
    if T.size * N <= 128:
        # Four numbers a thread: loaded four channels at once, they would be shuffled to where the
        # tensor cores want them, and that in every pass of the loop. So the compiler may not know
        # that they are aligned: it then goes through shared memory, where they stay, and a pass
        # takes them by one instruction.
        nought = tl.program_id(0) >> 31
        ptr = q_ptr + nought + n[:, None] * dim + T.start + c[None, :]
        q = tl.trans(tl.load(ptr, mask=(c < T.valid)[None, :], other=0.0))
    else:
        q = tl.load(
            q_ptr + n[None, :] * dim + T.start + c[:, None], mask=(c < T.valid)[:, None], other=0.0
        )
    return (q.to(tl.float32) * T.step).to(tl.float16)


@triton.jit
def _no_queries(T: tl.constexpr, N: tl.constexpr):
    """What `_run_queries` gives, zero."""
    size: tl.constexpr = T.size
    return tl.zeros((size, N), tl.float16)


@triton.constexpr_function
def _has_size(runs, size, g):
    """Whether any of the runs is of this size and group."""
    return any(run.size == size and run.group == g for run in runs)


@triton.jit
def _add_middle(
    q, wide, g: tl.constexpr, size: tl.constexpr, T: tl.constexpr, SCALE_MIN: tl.constexpr
):
    """Adds to `wide` [size, N] what, summed over channels, the zero point of a run's codes adds to
    group g, if the run is of that size and group: q·(L − 1)/2, or q where codes have a minimum;
    once a channel, so only for the plane of the low bits."""
    if T.group != g or T.size != size:
        return wide
    elif SCALE_MIN:
        return wide + q.to(tl.float32) if T.step == 1.0 else wide
    else:
        return wide + q.to(tl.float32) * T.middle if T.middle != 0.0 else wide


@triton.jit
def soft_cap(x, CAP: tl.constexpr):
    """cap·tanh(x / cap), in base-2 units of the softmax."""
    return (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E / CAP)))) * (CAP * LOG2_E)


@triton.jit
def load_queries(q_ptr, n, K: tl.constexpr, N: tl.constexpr):
    """Queries of all runs of keys."""
    q = ()
    for t in tl.static_range(count(K.key_runs)):
        q = q + (_run_queries(q_ptr, n, K.head_dim, pick(K.key_runs, t), N),)
    return q


@triton.jit
def zero_queries(K: tl.constexpr, N: tl.constexpr):
    """What `load_queries` gives, zero."""
    q = ()
    for t in tl.static_range(count(K.key_runs)):
        q = q + (_no_queries(pick(K.key_runs, t), N),)
    return q


@triton.jit
def query_middles(q, q_scale, K: tl.constexpr, N: tl.constexpr):
    """Of each parameter group, what the zero points of its codes add to a score, [N]; times q_scale
    where codes have a minimum."""
    groups: tl.constexpr = K.groups
    middles = ()
    for g in tl.static_range(groups):
        total = tl.zeros((N,), tl.float32)
        # runs of one size are added up before the sum over channels, which takes shuffles
        for size in tl.static_range(4):
            if not K.raw and _has_size(K.key_runs, 16 << size, g):
                wide = tl.zeros((16 << size, N), tl.float32)
                for t in tl.static_range(count(K.key_runs)):
                    wide = _add_middle(q[t], wide, g, 16 << size, pick(K.key_runs, t), K.minimum)
                total += tl.sum(wide, 0)
        middles = middles + (total * q_scale if K.minimum else total,)
    return middles


@triton.jit
def code_products(
    base,
    page,
    row,
    q,
    middles,
    g: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Products of queries with the codes of group g: eight [16, N], field f in units of 2^−24·4^(f
    mod 4), or of ternary digits."""
    qk = ()
    if K.minimum or K.raw:
        for f in tl.static_range(8):
            qk = qk + (tl.zeros((16, N), tl.float32),)
    else:
        back: tl.constexpr = 1.0 / SUBNORMAL / K.unit
        for f in tl.static_range(8):
            qk = qk + (
                tl.zeros((16, N), tl.float32)
                - (middles[g] * (back / pick(K.field_units, f)))[None, :],
            )
    return K.device.add_products(base, page, row, q, qk, g, K, INTERPRET)


@triton.jit
def load_turns(within, i, row, K: tl.constexpr, MEAN: tl.constexpr):
    """Turns of the fast pairs at the tile's tokens: eight [16, MEAN]."""
    m = tl.arange(0, MEAN)
    turns = ()
    for f in tl.static_range(8):
        own = (i // K.rows) * K.page_tokens + f * K.rows + row  # of the tile's tokens
        at = tl.multiple_of(within + own[:, None] * MEAN + m[None, :], [1, 16])  # as in `raw_mean`
        turns = turns + (tl.load(at),)
    return turns


@triton.jit
def add_mean(
    start, a, b, turns, bias, spans, span, number, row, n, exists,
    K: tl.constexpr, N: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Scores eight [N, 16] that begin with `start` [N, 16] and what keys lack that were stored
    without their rotating mean."""
    qk = ()
    high, low = turned_coefficients(a, b, spans, span, MEAN)
    if K.page_tokens <= 32:  # a page lies within one step of the slow pairs
        start += slow_bias(bias, number * K.page_tokens // 32, n, exists, N)
    for f in tl.static_range(8):
        first = start
        if K.page_tokens > 32:
            first += slow_bias(
                bias, (number * K.page_tokens + f * K.rows + row) // 32, n, exists, N
            )
        qk = qk + (first + tl.trans(tl.dot(turns[f], low, tl.dot(turns[f], high))),)
    return qk


@triton.jit
def scale_scores(
    products,
    qk,
    base,
    page,
    row,
    unit,
    middles,
    g: tl.constexpr,
    K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Adds the products of group g, times the tokens' scales and `unit`, to the scores, eight [N,
    16]."""
    new = ()
    if K.raw:
        for f in tl.static_range(8):
            new = new + (tl.trans(products[f]) * unit + qk[f],)
    elif K.minimum:
        minimum = load_params(base, page, row, 2 * g, K, INTERPRET)
        scale = load_params(base, page, row, 2 * g + 1, K, INTERPRET)
        for f in tl.static_range(8):
            rest = qk[f] + minimum[f][None, :] * middles[g][:, None]
            new = new + (
                tl.trans(products[f]) * (scale[f] * (unit * pick(K.field_units, f)))[None, :]
                + rest,
            )
    else:
        scale = load_params(base, page, row, 0, K, INTERPRET)
        for f in tl.static_range(8):
            new = new + (
                tl.trans(products[f]) * (scale[f] * (unit * pick(K.field_units, f)))[None, :]
                + qk[f],
            )
    return new


@triton.jit
def cap_scores(qk, exists, CAP: tl.constexpr):
    """`soft_cap` of eight scores [N, 16]; NEVER where no page is."""
    new = ()
    for f in tl.static_range(8):
        new = new + (tl.where(exists[None, :], soft_cap(qk[f], CAP), NEVER),)
    return new


@triton.jit
def mask_scores(qk, first, row, limit, lowest, K: tl.constexpr):
    """NEVER for keys that a query may not see; `first`: int32 [16], position of the page's first
    token."""
    new = ()
    for f in tl.static_range(8):
        position = first + f * K.rows + row
        seen = (position[None, :] < limit[:, None]) & (position[None, :] >= lowest[:, None])
        new = new + (tl.where(seen, qk[f], NEVER),)
    return new
