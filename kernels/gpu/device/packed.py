"""The pages' part of the split-K attention kernel.

Everything is transposed: tokens are the rows of the tensor cores' left operand, queries the columns
of the right one, so that eight query columns suffice where the other way round sixteen rows would
be padded. One program is one warp. It takes 128 tokens at a time: 16 rows of words, each word the
codes of one channel of eight tokens (kinds/bits.py), so that masking a word gives an operand
without a
shift or a conversion: an fp16 subnormal, code·4^g·2^−24. What those factors leave to be divided by
is folded into the scale of the score, for keys, and of the probability, for values. Scales never
touch elements:

    q·k_t = τ_t·(Σ_i q_i·step_i·c_ti − Σ_i q_i·step_i·(L_i − 1)/2)      "scale"
    q·k_t = s_t·Σ_i q_i·c_ti + m_t·Σ_i q_i                              "scale_min", per group
    Σ_t p_t·v_t = Σ_t (p_t·s_t)·c_t + Σ_t p_t·m_t                       values

Online softmax in base 2 (FlashAttention); partial results are merged by their maxima (split-K,
FlashDecoding).

The compiler's time goes into two passes that, for every load and store (TritonGPUCoalesce) and
every dot (AccelerateMatmul), walk from each operation that is connected with it to all that it
needs and all that needs it. The second stops at a `tl.trans`, so pointers, scores and weights are
turned where that costs no instruction; the first at the results of a branch, so where tiles begin
and end, the queries, the softmax and what follows the loop stand in branches that only LLVM knows
to be always taken. In the loop none may hold a load or a dot: loads in a branch are not pipelined,
and the tensor cores' layouts do not reach into it.
"""

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.constants import NEVER, SUBNORMAL
from kvfold.kernels.gpu.device.places import load_pages
from kvfold.kernels.gpu.device.scores import (
    add_mean,
    cap_scores,
    code_products,
    load_queries,
    load_turns,
    mask_scores,
    query_middles,
    scale_scores,
    zero_queries,
)
from kvfold.kernels.gpu.device.values import (
    finish,
    largest,
    rescale,
    scale_weights,
    weights,
    zero_outputs,
)


@triton.jit
def packed_part(
    q_ptr, q_scale, shift, anchor, table, tile_page, first_page, last_page, begin, end, head, sinks, limit, lowest,
    kv_offset, coefficients, bias, spans, within, first_place, block_step, page_step,
    K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, CAP: tl.constexpr, SHIFT: tl.constexpr,
    MEAN: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr, INTERPRET: tl.constexpr,
    PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention of N query columns to tiles begin … end − 1, of 16 rows of words each, the first of
    which begins with page `tile_page`, as far as they are pages first_page … last_page − 1.

    With SHIFT, `shift` [N] is added to every logit; with MEAN, twice the fast pairs that a kernel
    has, what keys lack that were stored without their rotating mean (mean.py; `coefficients` and
    `bias` are of this place, step 0). `table`, with first_place, block_step, page_step and PER_BLOCK:
    see `load_pages`. K, V: a HeadLayout.

    Returns:
        (output runs [size, N] not yet divided, largest scores [N], sums of weights [N])
    """
    pages_each: tl.constexpr = 16 // K.rows
    page_tokens: tl.constexpr = K.page_tokens
    v_groups: tl.constexpr = V.groups
    k_groups: tl.constexpr = K.groups
    n = tl.arange(0, N)
    i = tl.arange(0, 16)
    row = i % K.rows
    always = (tl.program_id(0) | 1) != 0  # true; see above
    nought = (
        tl.program_id(0) >> 31
    )  # 0, in the same sense: a branch that computes nothing would be folded
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
    k_base = anchor + head * K.nbytes
    v_base = anchor + (kv_offset + head * V.nbytes)

    number = tile_page + begin * pages_each + i // K.rows
    exists = (number >= first_page) & (number < last_page)
    place = load_pages(table, number, exists, first_place, block_step, page_step, PER_BLOCK)
    if always:
        q = load_queries(q_ptr, n, K, N)
        middles = query_middles(q, q_scale, K, N)
    else:
        q = zero_queries(K, N)
        middles = ()
        for g in tl.static_range(k_groups):
            middles = middles + (tl.zeros((N,), tl.float32),)
    q_unit = q_scale if K.raw else q_scale * (SUBNORMAL * K.unit)
    acc, acc_high = zero_outputs(N, V)
    z = ()
    for g in tl.static_range(v_groups):
        z = z + (tl.zeros((N, 16), tl.float32),)
    if MEAN > 0:
        m = tl.arange(0, MEAN)
        a = tl.load(coefficients + m[:, None] * N + n[None, :])
        b = tl.load(coefficients + MEAN * N + m[:, None] * N + n[None, :])
        turns = load_turns(within, i, row, K, MEAN)
    m_i = tl.full((N,), NEVER, tl.float32)
    l_i = tl.zeros((N, 16), tl.float32)  # over the rows only at the end: no shuffles in the loop

    for tile in tl.range(begin, end, num_stages=STAGES):
        number = tile_page + tile * pages_each + i // K.rows
        exists = (number >= first_page) & (number < last_page)
        if PREFETCH:
            page = place
            later = number + pages_each
            place = load_pages(
                table, later, later < last_page, first_place, block_step, page_step, PER_BLOCK
            )
        else:
            page = load_pages(table, number, exists, first_place, block_step, page_step, PER_BLOCK)
        absent = tl.where(exists, 0.0, NEVER)
        start = (
            absent[None, :] + shift[:, None]
            if SHIFT
            else tl.zeros((N, 16), tl.float32) + absent[None, :]
        )
        for g in tl.static_range(k_groups):
            products = code_products(k_base, page, row, q, middles, g, K, N, INTERPRET)
            if g == 0:  # not before the products, so that scores do not take registers beside them
                if MEAN > 0:
                    span = tile_page // pages_each + tile
                    qk = add_mean(
                        start, a, b, turns, bias, spans, span, number, row, n, exists, K, N, MEAN
                    )
                else:
                    qk = ()
                    for f in tl.static_range(8):
                        qk = qk + (start,)
            qk = scale_scores(products, qk, k_base, page, row, q_unit, middles, g, K, INTERPRET)
        if CAP > 0:
            qk = cap_scores(qk, exists, CAP)
        if MASKED:
            qk = mask_scores(qk, sinks + number * page_tokens, row, limit, lowest, K)
        m_new = tl.maximum(m_i, largest(qk))
        if always:
            alpha = tl.exp2(m_i - m_new)
            p = weights(qk, m_new, MASKED)
        else:
            alpha = m_i
            p = qk
        m_i = m_new
        l_i = l_i * alpha[:, None] + (
            ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]))
        )
        scaled, z = scale_weights(p, z, alpha, v_base, page, row, V, INTERPRET)
        acc, acc_high = rescale(acc, acc_high, alpha, V)
        acc, acc_high = V.device.add_values(v_base, page, row, scaled, acc, acc_high, V, INTERPRET)
    if always:
        outs = finish(acc, acc_high, z, V)
        total = tl.sum(l_i, 1)
        best = tl.maximum(m_i, NEVER)
    else:
        outs = acc
        total = m_i
        best = tl.zeros((N,), tl.float32)
    return outs, best, total
