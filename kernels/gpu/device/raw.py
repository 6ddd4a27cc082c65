"""The 16-bit rows' part of the split-K attention kernel: sinks, window and, for a prompt, the
prompt itself."""

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.bits import count, pick
from kvfold.kernels.gpu.device.constants import NEVER
from kvfold.kernels.gpu.device.mean import raw_mean
from kvfold.kernels.gpu.device.places import row_offsets
from kvfold.kernels.gpu.device.scores import soft_cap


@triton.jit
def raw_rows(total_tokens, packed_end, sinks, ring):
    """Rows that may hold a token."""
    return tl.where(
        ring > 0, tl.minimum(total_tokens, sinks + ring), total_tokens - (packed_end - sinks)
    )


@triton.jit
def raw_blocks(
    total_tokens, packed_end, sinks, ring, limit, last, BLOCK: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """How many blocks of BLOCK rows the queries look at, and the number of the first of them behind
    the sinks' blocks, which come first."""
    rows = raw_rows(total_tokens, packed_end, sinks, ring)
    sink_blocks = (sinks + BLOCK - 1) // BLOCK
    first_block = sink_blocks
    end_block = (rows + BLOCK - 1) // BLOCK
    if MASKED:  # the rows in between are read packed, or come later
        first_row = sinks + tl.min(limit, 0) - packed_end
        first_block = tl.where(ring > 0, sink_blocks, tl.maximum(first_row // BLOCK, sink_blocks))
        last_row = sinks + tl.max(last, 0) + 1 - packed_end
        end_block = tl.where(
            ring > 0, end_block, tl.minimum(end_block, (last_row + BLOCK - 1) // BLOCK)
        )
    return tl.minimum((rows + BLOCK - 1) // BLOCK, sink_blocks) + tl.maximum(
        end_block - first_block, 0
    ), first_block


@triton.jit
def raw_part(
    q_ptr, q_scale, shift, k_ptr, v_ptr, token_stride, acc, m_i, l_i, begin, end, first_block,
    total_tokens, packed_end, sinks, ring, limit, lowest, last, coefficients, bias, spans, within,
    table, block_stride, block_shift,
    R: tl.constexpr, V: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, CAP: tl.constexpr, SHIFT: tl.constexpr, MEAN: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Goes on with the attention of N query columns over blocks begin … end − 1, as `raw_blocks`
    counts them, of the 16-bit rows: sinks, then either a ring (ring > 0 slots) or tokens in order.

    Row r < sinks is token r. In a ring, slot r holds the newest token congruent to it; in order,
    row r ≥ sinks is token packed_end + r − sinks. Tokens from sinks to packed_end − 1 are packed
    and not here.

    Args:
        acc, m_i, l_i: output runs [size, N], largest scores [N], sums of weights [N] so far.
        shift: [N], added to every logit with SHIFT.
        coefficients, bias, spans, within: as in `packed_part`, with MEAN.
        table, block_stride, block_shift: with BLOCKS rows are found by position, as in BlockRows.
        R, V: HeadLayout of 16-bit keys, and of the values whose runs `acc` has.
    """
    n = tl.arange(0, N)
    if (tl.program_id(0) | 1) != 0:  # always; as in packed.py, for the compiler's time
        nought = tl.program_id(0) >> 31
        begin += nought
        end += nought
        first_block += nought
    else:
        begin = 0
        end = 0
        first_block = 0
    q = ()
    for t in tl.static_range(count(R.key_runs)):
        q = q + (_raw_query(q_ptr, n, R.head_dim, pick(R.key_runs, t)),)
    sink_blocks = (sinks + BLOCK - 1) // BLOCK
    if MEAN > 0:
        m = tl.arange(0, MEAN)
        a = tl.load(coefficients + m[:, None] * N + n[None, :])
    newest = total_tokens - 1
    newest_slot = (newest - sinks) % tl.maximum(ring, 1)
    rows = raw_rows(total_tokens, packed_end, sinks, ring)
    for j in tl.range(begin, end, num_stages=1):
        block = tl.where(j < sink_blocks, j, first_block + j - sink_blocks)
        r = block * BLOCK + tl.arange(0, BLOCK)
        behind = newest_slot - (r - sinks)
        behind = tl.where(behind < 0, behind + ring, behind)
        later = tl.where(ring > 0, newest - behind, packed_end + r - sinks)
        position = tl.where(r < sinks, r, later)
        exists = (
            (r < rows) & (position < total_tokens) & ((position < sinks) | (position >= packed_end))
        )
        if BLOCKS:
            at = row_offsets(table, position, exists, block_stride, token_stride, block_shift)
        else:
            at = r.to(tl.int64) * token_stride
        qk = tl.zeros((BLOCK, N), tl.float32)
        for t in tl.static_range(count(R.key_runs)):
            qk = _raw_keys(k_ptr + at, exists, q[t], qk, pick(R.key_runs, t))
        qk = qk * q_scale
        if MEAN > 0:
            qk += raw_mean(
                a, bias, spans, within, position - sinks, exists & (position >= sinks), n, N, MEAN
            )
        if SHIFT:
            qk += shift[None, :]
        if CAP > 0:
            qk = soft_cap(qk, CAP)
        seen = exists[:, None] & (position[:, None] <= last[None, :])
        if MASKED:
            early = position < sinks
            seen = seen & (early[:, None] | (position[:, None] >= limit[None, :]))
            seen = seen & (position[:, None] >= lowest[None, :])
        qk = tl.where(seen, qk, NEVER)
        m_new = tl.maximum(m_i, tl.max(qk, 0))
        alpha = tl.exp2(m_i - m_new)
        m_i = m_new
        p = tl.where(seen, tl.exp2(qk - m_new[None, :]), 0.0)
        l_i = l_i * alpha + tl.sum(p, 0)
        p16 = p.to(tl.float16)
        new = ()
        for t in tl.static_range(count(V.value_runs)):
            rescaled = acc[t] * alpha[None, :]
            new = new + (_raw_values(v_ptr + at, exists, p16, rescaled, pick(V.value_runs, t)),)
        acc = new
    return acc, m_i, l_i


@triton.jit
def _raw_query(q_ptr, n, dim, T: tl.constexpr):
    c = tl.arange(0, T.size)
    return tl.load(
        q_ptr + n[None, :] * dim + T.start + c[:, None], mask=(c < T.valid)[:, None], other=0.0
    )


@triton.jit
def _raw_keys(ptr, exists, q, qk, T: tl.constexpr):
    c = tl.arange(0, T.size)
    k = tl.load(
        ptr[:, None] + T.start + c[None, :],
        mask=exists[:, None] & (c < T.valid)[None, :],
        other=0.0,
    )
    return tl.dot(k, q, qk)


@triton.jit
def _raw_values(ptr, exists, p, acc, T: tl.constexpr):
    c = tl.arange(0, T.size)
    v = tl.load(
        ptr[None, :] + T.start + c[:, None],
        mask=exists[None, :] & (c < T.valid)[:, None],
        other=0.0,
    )
    return tl.dot(v, p, acc)


@triton.jit
def store_part(o_ptr, columns, acc, T: tl.constexpr):
    """Writes one run of a partial output to a row-major [N, head_dim]."""
    c = tl.arange(0, T.size)
    tl.store(o_ptr + T.start + c[:, None], acc, mask=(c < T.valid)[:, None] & columns[None, :])
