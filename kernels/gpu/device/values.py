"""Weights of packed tokens, and outputs of packed values, for the attention kernel; see
scores.py."""

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.bits import count, load_params, pick
from kvfold.kernels.gpu.device.constants import NEVER, SUBNORMAL


@triton.jit
def _zeros_run(N: tl.constexpr, T: tl.constexpr):
    """Empty outputs of a run: low, and high (a scalar zero where no plane needs it)."""
    size: tl.constexpr = T.size
    if count(T.high) > 0:
        return tl.zeros((size, N), tl.float32), tl.zeros((size, N), tl.float32)
    else:
        return tl.zeros((size, N), tl.float32), tl.zeros((1, N), tl.float32)


@triton.jit
def zero_outputs(N: tl.constexpr, V: tl.constexpr):
    """Empty outputs of all runs, and of their planes from bit 4 on."""
    acc = ()
    acc_high = ()
    for t in tl.static_range(count(V.value_runs)):
        zero_low, zero_high = _zeros_run(N, pick(V.value_runs, t))
        acc = acc + (zero_low,)
        acc_high = acc_high + (zero_high,)
    return acc, acc_high


@triton.jit
def largest(qk):
    """[N] of eight scores [N, 16]."""
    best = tl.maximum(
        tl.maximum(tl.maximum(qk[0], qk[1]), tl.maximum(qk[2], qk[3])),
        tl.maximum(tl.maximum(qk[4], qk[5]), tl.maximum(qk[6], qk[7])),
    )
    return tl.max(best, 1)


@triton.jit
def weights(qk, m_i, MASKED: tl.constexpr):
    """2^(score − largest): eight [N, 16]."""
    p = ()
    for f in tl.static_range(8):
        if MASKED:  # a column may have seen nothing so far
            p = p + (tl.where(qk[f] > 0.5 * NEVER, tl.exp2(qk[f] - m_i[:, None]), 0.0),)
        else:
            p = p + (tl.exp2(qk[f] - m_i[:, None]),)
    return p


@triton.jit
def scale_weights(p, z, alpha, base, page, row, V: tl.constexpr, INTERPRET: tl.constexpr):
    """(of each parameter group the weights times the tokens' scales, eight float16 [16, N]; the
    sums of minima z moved on)."""
    groups: tl.constexpr = V.groups
    new_z = ()
    scaled = ()
    for g in tl.static_range(groups):
        if V.raw:
            group = ()
            for f in tl.static_range(8):
                group = group + (tl.trans(p[f].to(tl.float16)),)
            new_z = new_z + (z[g],)
        else:
            if V.minimum:
                minimum = load_params(base, page, row, 2 * g, V, INTERPRET)
                scale = load_params(base, page, row, 2 * g + 1, V, INTERPRET)
            else:
                scale = load_params(base, page, row, 0, V, INTERPRET)
                minimum = scale
            added = z[g] * alpha[:, None]
            for f in tl.static_range(8):
                added += p[f] * minimum[f][None, :]
            new_z = new_z + (added,)
            group = ()
            for f in tl.static_range(8):
                weight = scale[f] * (V.p_factor * V.unit * pick(V.field_units, f))
                group = group + (tl.trans((p[f] * weight[None, :]).to(tl.float16)),)
        scaled = scaled + (group,)
    return scaled, new_z


@triton.jit
def rescale(acc, acc_high, alpha, V: tl.constexpr):
    """Outputs of all runs [size, N], times alpha [N]."""
    shrink = tl.trans(alpha[:, None])
    low = ()
    high = ()
    for t in tl.static_range(count(V.value_runs)):
        low = low + (acc[t] * shrink,)
        high = high + (acc_high[t] * shrink,)
    return low, high


@triton.jit
def _finish_run(low, high, z, unit, V: tl.constexpr, T: tl.constexpr):
    """A run's output [size, N] from its sums over codes and over parameters."""
    out = low * unit
    if count(T.high) > 0:
        out += high * (unit * 16.0)
    if V.raw or V.minimum:
        return out + z[T.group][None, :]
    else:
        return T.step * (out - T.middle * z[T.group][None, :])


@triton.jit
def finish(acc, acc_high, z, V: tl.constexpr):
    """Outputs of all runs, not yet divided by the sums of weights."""
    groups: tl.constexpr = V.groups
    totals = ()
    for g in tl.static_range(groups):
        totals = totals + (tl.sum(z[g], 1),)
    outs = ()
    for t in tl.static_range(count(V.value_runs)):
        unit = 1.0 if V.raw else SUBNORMAL / V.p_factor
        outs = outs + (_finish_run(acc[t], acc_high[t], totals, unit, V, pick(V.value_runs, t)),)
    return outs
