"""The pages' part of the split-K attention kernel.

Everything is transposed: tokens are the rows of the tensor cores' left operand, queries the columns of the right one, so
that eight query columns suffice where the other way round sixteen rows would be padded. One program is one warp. It takes
128 tokens at a time: 16 rows of words, each word the codes of one channel of eight tokens (packing.py), so that masking a
word gives an operand without a shift or a conversion: an fp16 subnormal, code·4^g·2^−24. What those factors leave to be
divided by is folded into the scale of the score, for keys, and of the probability, for values. Scales never touch elements:

    q·k_t = τ_t·(Σ_i q_i·step_i·c_ti − Σ_i q_i·step_i·(L_i − 1)/2)      "scale"
    q·k_t = s_t·Σ_i q_i·c_ti + m_t·Σ_i q_i                              "scale_min", per group
    Σ_t p_t·v_t = Σ_t (p_t·s_t)·c_t + Σ_t p_t·m_t                       values

Online softmax in base 2 (FlashAttention); partial results are merged by their maxima (split-K, FlashDecoding).

The compiler's time goes into two passes that, for every load and store (TritonGPUCoalesce) and every dot (AccelerateMatmul), walk
from each operation that is connected with it to all that it needs and all that needs it. The second stops at a `tl.trans`, so
pointers, scores and weights are turned where that costs no instruction; the first at the results of a branch, so where tiles begin
and end, the queries, the softmax and what follows the loop stand in branches that only LLVM knows to be always taken. In the loop
none may hold a load or a dot: loads in a branch are not pipelined, and the tensor cores' layouts do not reach into it.
"""

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.bits import count, field_unit, load_params, pick
from kvfold.kernels.gpu.device.constants import LOG2_E, NEVER, SUBNORMAL
from kvfold.kernels.gpu.device.mean import slow_bias, turned_coefficients
from kvfold.kernels.gpu.device.tiles import (
    add_middle,
    add_trit_middle,
    has_size,
    key_tile,
    piece_group,
    piece_queries,
    raw_page_keys,
    raw_page_values,
    tile_queries,
    trit_keys,
    trit_values,
    value_piece,
    zeros_piece,
)


@triton.jit
def soft_cap(x, CAP: tl.constexpr):
    """cap·tanh(x / cap), in base-2 units of the softmax."""
    return (CAP * LOG2_E) * (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E / CAP))))


@triton.jit
def _finish_piece(low, high, z, unit, P: tl.constexpr, SYMMETRIC: tl.constexpr):
    """A run's output [size, N] from its sums over codes and over parameters."""
    group: tl.constexpr = pick(P, 3)
    step: tl.constexpr = pick(P, 4)
    middle: tl.constexpr = pick(P, 5)
    planes_high: tl.constexpr = pick(P, 7)
    out = low * unit
    if count(planes_high) > 0:
        out += high * (unit * 16.0)
    if SYMMETRIC:
        return step * (out - middle * z[group][None, :])
    else:
        return out + z[group][None, :]


@triton.jit
def packed_part(
    q_ptr, q_scale, shift, anchor, table, tile_page, first_page, last_page, begin, end, head, sinks, limit, lowest,
    kv_offset, coefficients, bias, spans, within,
    K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, CAP: tl.constexpr, SHIFT: tl.constexpr,
    MEAN: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Attention of N query columns to tiles begin … end − 1, of 16 rows of words each, the first of which begins
    with page `tile_page`, as far as they are pages first_page … last_page − 1.

    With SHIFT, `shift` [N] is added to every logit; with MEAN, twice the fast pairs that a kernel has, what keys lack that were
    stored without their rotating mean (triton_mean.py; `coefficients` and `bias` are of this place, step 0).

    Returns:
        (output runs [size, N] not yet divided, largest scores [N], sums of weights [N])
    """
    k_kind: tl.constexpr = pick(K, 0)
    k_trits: tl.constexpr = pick(K, 1)
    k_tiles: tl.constexpr = pick(K, 2)
    k_pieces: tl.constexpr = pick(K, 3)
    k_groups: tl.constexpr = pick(K, 4)
    k_params: tl.constexpr = pick(K, 5)
    k_fp16: tl.constexpr = pick(K, 6)
    rows: tl.constexpr = pick(K, 7)
    k_nbytes: tl.constexpr = pick(K, 8)
    dim: tl.constexpr = pick(K, 9)
    v_kind: tl.constexpr = pick(V, 0)
    v_trits: tl.constexpr = pick(V, 1)
    v_pieces: tl.constexpr = pick(V, 3)
    v_groups: tl.constexpr = pick(V, 4)
    v_params: tl.constexpr = pick(V, 5)
    v_fp16: tl.constexpr = pick(V, 6)
    v_nbytes: tl.constexpr = pick(V, 8)
    p_one: tl.constexpr = pick(V, 10)
    k_ternary: tl.constexpr = count(k_trits) > 0
    v_ternary: tl.constexpr = count(v_trits) > 0
    scale_min: tl.constexpr = k_kind == "scale_min"
    k_raw: tl.constexpr = k_kind == "raw"
    v_raw: tl.constexpr = v_kind == "raw"
    pages_each: tl.constexpr = 16 // rows
    page_tokens: tl.constexpr = 8 * rows
    n = tl.arange(0, N)
    i = tl.arange(0, 16)
    row = i % rows
    always = (tl.program_id(0) | 1) != 0  # true; see above
    nought = tl.program_id(0) >> 31  # 0, in the same sense: a branch that computes nothing would be folded
    if always:
        tile_page += nought
        first_page += nought
        last_page += nought
        begin += nought
        end += nought
    else:
        tile_page = 0
        first_page = 0
        last_page = 0
        begin = 0
        end = 0
    k_base = anchor + head * k_nbytes
    v_base = anchor + (kv_offset + head * v_nbytes)

    number = tile_page + begin * pages_each + i // rows
    place = tl.load(table + number, mask=(number >= first_page) & (number < last_page), other=0)
    if always:
        q = ()
        if k_ternary or k_raw:
            for t in tl.static_range(count(k_pieces)):
                q = q + (piece_queries(q_ptr, n, dim, pick(k_pieces, t), N),)
        else:
            for t in tl.static_range(count(k_tiles)):
                q = q + (tile_queries(q_ptr, n, dim, pick(k_tiles, t), N),)
        middles = ()
        for g in tl.static_range(k_groups):
            total = tl.zeros((N,), tl.float32)
            # runs of one size are added up before the sum over channels, which takes shuffles
            for size in tl.static_range(4):
                if k_ternary and size == 0:
                    wide = tl.zeros((16, N), tl.float32)
                    for t in tl.static_range(count(k_pieces)):
                        wide = add_trit_middle(q[t], wide, g, pick(k_pieces, t), scale_min)
                    total += tl.sum(wide, 0)
                elif has_size(k_tiles, 16 << size, g, 6, 8):
                    wide = tl.zeros((16 << size, N), tl.float32)
                    for t in tl.static_range(count(k_tiles)):
                        wide = add_middle(q[t], wide, g, 16 << size, pick(k_tiles, t), scale_min)
                    total += tl.sum(wide, 0)
            middles = middles + (total * q_scale if scale_min else total,)
    else:
        q = ()
        if k_ternary or k_raw:
            for t in tl.static_range(count(k_pieces)):
                q = q + (tl.zeros((pick(pick(k_pieces, t), 1), N), tl.float16),)
        else:
            for t in tl.static_range(count(k_tiles)):
                q = q + (tl.zeros((pick(pick(k_tiles, t), 6), N), tl.float16),)
        middles = ()
        for g in tl.static_range(k_groups):
            middles = middles + (tl.zeros((N,), tl.float32),)
    # a field's codes stand at 4^(f mod 4), ternary digits at 4^4
    unit: tl.constexpr = 1.0 / 256 if k_ternary else 1.0
    v_unit: tl.constexpr = 1.0 / 256 if v_ternary else 1.0
    one = SUBNORMAL * unit * q_scale
    back: tl.constexpr = 1.0 / SUBNORMAL / unit
    low = ()
    high = ()
    for t in tl.static_range(count(v_pieces)):
        zero_low, zero_high = zeros_piece(N, pick(v_pieces, t))
        low = low + (zero_low,)
        high = high + (zero_high,)
    z = ()
    for g in tl.static_range(v_groups):
        z = z + (tl.zeros((N, 16), tl.float32),)
    turns = ()
    if MEAN > 0:
        m = tl.arange(0, MEAN)
        a = tl.load(coefficients + m[:, None] * N + n[None, :])
        a_2 = tl.load(coefficients + MEAN * N + m[:, None] * N + n[None, :])
        for f in tl.static_range(8):
            own = (i // rows) * page_tokens + f * rows + row  # of the tile's tokens
            at = tl.multiple_of(within + own[:, None] * MEAN + m[None, :], [1, 16])  # as in `raw_mean`
            turns = turns + (tl.load(at),)
    top = tl.full((N,), NEVER, tl.float32)
    sums = tl.zeros((N, 16), tl.float32)  # over the rows only at the end: no shuffles in the loop

    for tile in tl.range(begin, end, num_stages=STAGES):
        number = tile_page + tile * pages_each + i // rows
        exists = (number >= first_page) & (number < last_page)
        if PREFETCH:
            page = place
            place = tl.load(table + number + pages_each, mask=number + pages_each < last_page, other=0)
        else:
            page = tl.load(table + number, mask=exists, other=0)
        absent = tl.where(exists, 0.0, NEVER)
        start = absent[None, :] + shift[:, None] if SHIFT else tl.zeros((N, 16), tl.float32) + absent[None, :]
        for g in tl.static_range(k_groups):
            dots = ()
            if scale_min or k_raw:
                for f in tl.static_range(8):
                    dots = dots + (tl.zeros((16, N), tl.float32),)
            else:
                for f in tl.static_range(8):
                    dots = dots + (
                        tl.zeros((16, N), tl.float32) - (middles[g] * (back / field_unit(f, k_ternary)))[None, :],
                    )
            if k_ternary:
                dots = trit_keys(k_base, page, row, q, dots, k_trits, INTERPRET, g, k_groups)
            elif k_raw:
                for t in tl.static_range(count(k_pieces)):
                    dots = raw_page_keys(k_base, page, row, q[t], dots, rows, dim, pick(k_pieces, t))
            else:
                for t in tl.static_range(count(k_tiles)):
                    dots = key_tile(k_base, page, row, q[t], dots, g, pick(k_tiles, t), INTERPRET)
            if g == 0:  # not before the products, so that scores do not take registers beside them
                s = ()
                if MEAN > 0:
                    high_c, low_c = turned_coefficients(a, a_2, spans, tile_page // pages_each + tile, MEAN)
                    if page_tokens <= 32:  # a page lies within one step of the slow pairs
                        start += slow_bias(bias, number * page_tokens // 32, n, exists, N)
                    for f in tl.static_range(8):
                        first = start
                        if page_tokens > 32:
                            first += slow_bias(bias, (number * page_tokens + f * rows + row) // 32, n, exists, N)
                        s = s + (first + tl.trans(tl.dot(turns[f], low_c, tl.dot(turns[f], high_c))),)
                else:
                    for f in tl.static_range(8):
                        s = s + (start,)
            new = ()
            if k_raw:
                for f in tl.static_range(8):
                    new = new + (tl.trans(dots[f]) * q_scale + s[f],)
            elif scale_min:
                minimum = load_params(k_base, page, row, k_params, 2 * g, page_tokens, k_fp16, INTERPRET)
                scale = load_params(k_base, page, row, k_params, 2 * g + 1, page_tokens, k_fp16, INTERPRET)
                for f in tl.static_range(8):
                    rest = s[f] + minimum[f][None, :] * middles[g][:, None]
                    new = new + (tl.trans(dots[f]) * (scale[f] * (one * field_unit(f, k_ternary)))[None, :] + rest,)
            else:
                scale = load_params(k_base, page, row, k_params, 0, page_tokens, k_fp16, INTERPRET)
                for f in tl.static_range(8):
                    new = new + (tl.trans(dots[f]) * (scale[f] * (one * field_unit(f, k_ternary)))[None, :] + s[f],)
            s = new
        if CAP > 0:
            new = ()
            for f in tl.static_range(8):
                new = new + (tl.where(exists[None, :], soft_cap(s[f], CAP), NEVER),)
            s = new
        if MASKED:
            new = ()
            for f in tl.static_range(8):
                position = sinks + number * page_tokens + f * rows + row
                seen = (position[None, :] < limit[:, None]) & (position[None, :] >= lowest[:, None])
                new = new + (tl.where(seen, s[f], NEVER),)
            s = new
        best = tl.maximum(
            tl.maximum(tl.maximum(s[0], s[1]), tl.maximum(s[2], s[3])),
            tl.maximum(tl.maximum(s[4], s[5]), tl.maximum(s[6], s[7])),
        )
        new_top = tl.maximum(top, tl.max(best, 1))
        if always:
            alpha = tl.exp2(top - new_top)
            p = ()
            for f in tl.static_range(8):
                if MASKED:  # a column may have seen nothing so far
                    p = p + (tl.where(s[f] > 0.5 * NEVER, tl.exp2(s[f] - new_top[:, None]), 0.0),)
                else:
                    p = p + (tl.exp2(s[f] - new_top[:, None]),)
        else:
            alpha = top
            p = s
        top = new_top
        sums = sums * alpha[:, None] + (((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7])))
        new_z = ()
        scaled = ()
        for g in tl.static_range(v_groups):
            if v_raw:
                group = ()
                for f in tl.static_range(8):
                    group = group + (tl.trans(p[f].to(tl.float16)),)
                new_z = new_z + (z[g],)
            else:
                if v_kind == "scale_min":
                    minimum = load_params(v_base, page, row, v_params, 2 * g, page_tokens, v_fp16, INTERPRET)
                    scale = load_params(v_base, page, row, v_params, 2 * g + 1, page_tokens, v_fp16, INTERPRET)
                else:
                    scale = load_params(v_base, page, row, v_params, 0, page_tokens, v_fp16, INTERPRET)
                    minimum = scale
                added = z[g] * alpha[:, None]
                for f in tl.static_range(8):
                    added += p[f] * minimum[f][None, :]
                new_z = new_z + (added,)
                group = ()
                for f in tl.static_range(8):
                    weight = scale[f] * (p_one * v_unit * field_unit(f, v_ternary))
                    group = group + (tl.trans((p[f] * weight[None, :]).to(tl.float16)),)
            scaled = scaled + (group,)
        z = new_z
        shrink = tl.trans(alpha[:, None])
        new_low = ()
        new_high = ()
        for t in tl.static_range(count(v_pieces)):
            new_low = new_low + (low[t] * shrink,)
            new_high = new_high + (high[t] * shrink,)
        if v_ternary:
            low = trit_values(v_base, page, row, scaled, new_low, v_trits, INTERPRET, v_groups)
            high = new_high
        elif v_raw:
            low = ()
            for t in tl.static_range(count(v_pieces)):
                low = low + (raw_page_values(v_base, page, row, scaled[0], new_low[t], rows, dim, pick(v_pieces, t)),)
            high = new_high
        else:
            low = ()
            high = ()
            for t in tl.static_range(count(v_pieces)):
                chosen = piece_group(scaled, pick(v_pieces, t))
                one_low, one_high = value_piece(
                    v_base, page, row, chosen, new_low[t], new_high[t], pick(v_pieces, t), INTERPRET
                )
                low = low + (one_low,)
                high = high + (one_high,)
    if always:
        totals = ()
        for g in tl.static_range(v_groups):
            totals = totals + (tl.sum(z[g], 1),)
        outs = ()
        for t in tl.static_range(count(v_pieces)):
            unit_v = 1.0 if v_raw else SUBNORMAL / p_one
            outs = outs + (_finish_piece(low[t], high[t], totals, unit_v, pick(v_pieces, t), v_kind == "scale"),)
        total = tl.sum(sums, 1)
        best = tl.maximum(top, NEVER)
    else:
        outs = ()
        for t in tl.static_range(count(v_pieces)):
            outs = outs + (low[t],)
        total = top
        best = tl.zeros((N,), tl.float32)
    return outs, best, total
