"""16-bit rows of many tokens: written from keys and values as a model gives them, and read for a
prompt's attention.

A step's rows are append.py's. Runs under Triton's interpreter on a CPU too.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.compile.launch import INTERPRET, launch
from kvfold.kernels.gpu.device.bits import pow2
from kvfold.kernels.gpu.device.codec import to_fp16
from kvfold.kernels.gpu.device.mean import stored_mean
from kvfold.kernels.gpu.device.products import add_product
from kvfold.kernels.gpu.mean import StoredMean, mean_rows, stored_mean_arguments

STORE_TOKENS, GATHER_TOKENS = 32, 32  # of a program
BLOCK: tl.constexpr = tl.constexpr(32)  # rows of a matrix at a time
WARPS = 4


@triton.constexpr_function
def row_width(dim):
    """Channels of a row at a time, as registers and shared memory allow."""
    return pow2(dim) if dim <= 128 else 64


@triton.jit(
    do_not_specialize=["tokens", "sinks", "k_step_t", "k_step_h", "v_step_t", "v_step_h", "slow_steps", "to_step_h"],
    do_not_specialize_on_alignment=["slow", "positions", "places"],
)  # fmt: skip
def _store_kernel(
    keys, values, k_step_t, k_step_h, v_step_t, v_step_h, positions, places, matrix, offset, fast, slow, spans, within,
    slow_steps, out, value_out, to_step_h, tokens, sinks,
    DIM: tl.constexpr, TOKENS: tl.constexpr, MATRIX: tl.constexpr, OFFSET: tl.constexpr, MEAN: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of TOKENS tokens, KV heads). A row whose place is negative is not written."""
    head = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = t < tokens
    place = tl.load(places + t, mask=there, other=-1)
    to = tl.multiple_of(place + head * to_step_h, 8)[:, None]
    written = (place >= 0)[:, None]
    u = tl.load(positions + t, mask=there, other=0).to(tl.int32) - sinks
    source = (keys + t.to(tl.int64) * k_step_t + head * k_step_h)[:, None]
    value_source = (values + t.to(tl.int64) * v_step_t + head * v_step_h)[:, None]
    width: tl.constexpr = row_width(DIM)
    for first in tl.range(0, DIM, width, num_stages=1):
        c = first + tl.arange(0, width)[None, :]
        inside = c < DIM
        if MATRIX:
            x = tl.zeros((TOKENS, width), tl.float32)
            for start in tl.range(0, pow2(DIM), BLOCK):
                i = start + tl.arange(0, BLOCK)
                known = there[:, None] & (i < DIM)[None, :]
                a = tl.load(source + i[None, :], mask=known, other=0.0)
                if OFFSET:
                    own = tl.load(offset + head * DIM + i, mask=i < DIM, other=0.0)
                    a = a.to(tl.float32) - own[None, :]
                m = tl.load(
                    matrix + head * (DIM * DIM) + c * DIM + i[:, None],
                    mask=inside & (i < DIM)[:, None],
                    other=0.0,
                )
                x = add_product(a, m, x, INTERPRET)
        else:
            x = tl.load(source + c, mask=there[:, None] & inside, other=0.0).to(tl.float32)
            if OFFSET:
                x = x - tl.load(offset + head * DIM + c, mask=inside, other=0.0)
        if MEAN > 0:
            x -= stored_mean(
                fast + head * (MEAN * DIM), slow + head * slow_steps * DIM, spans, within, u, there & (u >= 0), c,
                inside, DIM, MEAN,
            )  # fmt: skip
        tl.store(out + to + c, to_fp16(x), mask=written & inside)
        v = tl.load(value_source + c, mask=there[:, None] & inside, other=0.0).to(tl.float32)
        tl.store(value_out + to + c, to_fp16(v), mask=written & inside)


def store_rows(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    places: Tensor,
    matrix: Tensor | None,
    offset: Tensor | None,
    mean: StoredMean | None,
    sinks: int,
    out: Tensor,
    value_out: Tensor,
    head_step: int,
) -> None:
    """Writes keys, in their stored basis, and values as 16-bit rows, saturating.

    Args:
        keys, values: [T, Hkv, head_dim], any float type and layout, channels next to each other.
        positions: int64 [T], tokens counted from the sequence's first.
        places: int64 [T], numbers from the beginning of `out`, and of `value_out`, to a token's row
            of head 0; negative for a row that is not to be written.
        matrix, offset: as in KeyTransform; no offset where `mean` is given.
        mean: where it turns.
        out, value_out: float16, written; they may be parts of one tensor.
        head_step: numbers from a row of one head to that of the next.
    """
    tokens, heads, dim = keys.shape
    if not tokens:
        return
    none = torch.empty(0, device=keys.device)  # in place of what is not there; nothing reads it
    launch(
        _store_kernel,
        (-(-tokens // STORE_TOKENS), heads),
        keys, values, *keys.stride()[:2], *values.stride()[:2], positions, places,
        none if matrix is None else matrix, none if offset is None else offset,
        *stored_mean_arguments(mean, keys.device),
        out, value_out, head_step, tokens, sinks,
        DIM=dim, TOKENS=STORE_TOKENS, MATRIX=matrix is not None, OFFSET=offset is not None, MEAN=mean_rows(mean),
        INTERPRET=INTERPRET, num_warps=WARPS,
    )  # fmt: skip


class GatheredRows(NamedTuple):
    """16-bit rows of one sequence, float16 [Hkv, R, head_dim] each, contiguous.

    Attributes:
        read_keys: as a prompt's attention reads them, with their mean.
        keys: as they are stored; values.
    """

    read_keys: Tensor
    keys: Tensor
    values: Tensor


@triton.jit(
    do_not_specialize=["rows", "sinks", "slow_steps", "step_h"],
    do_not_specialize_on_alignment=["slow", "positions", "places"],
)  # fmt: skip
def _gather_kernel(
    keys, values, step_h, positions, places, fast, slow, spans, within, slow_steps, read_keys, out, value_out, rows,
    sinks, DIM: tl.constexpr, TOKENS: tl.constexpr, MEAN: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of TOKENS rows, KV heads)."""
    head = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = r < rows
    at = tl.load(places + r, mask=there, other=0) + head * step_h
    at = tl.multiple_of(at, 8)[:, None]
    to = (head * rows + r)[:, None] * DIM
    u = tl.load(positions + r, mask=there, other=0).to(tl.int32) - sinks
    width: tl.constexpr = row_width(DIM)
    for first in tl.range(0, DIM, width, num_stages=1):
        c = first + tl.arange(0, width)[None, :]
        inside = c < DIM
        mask = there[:, None] & inside
        k = tl.load(keys + at + c, mask=mask, other=0.0)
        x = k.to(tl.float32)
        if MEAN > 0:
            x += stored_mean(
                fast + head * (MEAN * DIM), slow + head * slow_steps * DIM, spans, within, u, there & (u >= 0), c,
                inside, DIM, MEAN,
            )  # fmt: skip
        tl.store(read_keys + to + c, to_fp16(x), mask=mask)
        if COPY:
            tl.store(out + to + c, k, mask=mask)
            tl.store(value_out + to + c, tl.load(values + at + c, mask=mask, other=0.0), mask=mask)


def gather_rows(
    keys: Tensor,
    values: Tensor,
    head_step: int,
    positions: Tensor,
    places: Tensor,
    heads: int,
    dim: int,
    mean: StoredMean | None,
    sinks: int,
    *,
    copy: bool,
) -> GatheredRows:
    """Rows as a prompt's attention reads them.

    Args:
        keys, values: float16; they may be parts of one tensor.
        head_step: numbers from a row of one head to that of the next.
        positions: int64 [R], tokens counted from the sequence's first.
        places: int64 [R], numbers from the beginning of `keys`, and of `values`, to a token's row
            of head 0.
        mean: where it turns.
        copy: also the keys as they are stored, and the values; else these two are empty.
    """
    rows, device = len(positions), keys.device
    shape = (heads, rows, dim)
    read_keys = torch.empty(shape, dtype=torch.float16, device=device)
    out, value_out = (
        torch.empty(shape if copy else (0, 0, 0), dtype=torch.float16, device=device)
        for _ in range(2)
    )
    if rows:
        launch(
            _gather_kernel,
            (-(-rows // GATHER_TOKENS), heads),
            keys, values, head_step, positions, places, *stored_mean_arguments(mean, device), read_keys, out, value_out,
            rows, sinks,
            DIM=dim, TOKENS=GATHER_TOKENS, MEAN=mean_rows(mean), COPY=copy, num_warps=WARPS,
        )  # fmt: skip
    return GatheredRows(read_keys, out, value_out)
