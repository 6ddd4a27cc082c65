"""Pages of 16-bit channels on the device: rows of float16, field by field."""

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.bits import count, pick, row_pointers
from kvfold.kernels.gpu.device.codec import to_fp16
from kvfold.kernels.gpu.device.tiles import TOKEN_TILE, tile_width


@triton.jit
def _add_run_products(base, page, row, q, qk, K: tl.constexpr, T: tl.constexpr):
    """Adds a run of channels of 16-bit keys to the eight scores [16, N]; K: a HeadLayout."""
    c = tl.arange(0, T.size)
    new = ()
    for f in tl.static_range(8):
        at = row_pointers(base, page, row, f * K.rows * K.head_dim * 2, K.head_dim * 2)
        at = at.to(tl.pointer_type(tl.float16))
        ptr = at[:, None] + T.start + c[None, :]
        k = (
            tl.load(ptr, mask=(c < T.valid)[None, :], other=0.0)
            if T.valid < T.size
            else tl.load(ptr)
        )
        new = new + (tl.dot(k, q, qk[f]),)
    return new


@triton.jit
def _add_run_values(base, page, row, p, acc, V: tl.constexpr, T: tl.constexpr):
    """Adds a run of channels of 16-bit values to its output [size, N]; V: a HeadLayout."""
    c = tl.arange(0, T.size)
    for f in tl.static_range(8):
        at = row_pointers(base, page, row, f * V.rows * V.head_dim * 2, V.head_dim * 2)
        at = at.to(tl.pointer_type(tl.float16))
        ptr = at[None, :] + T.start + c[:, None]
        v = (
            tl.load(ptr, mask=(c < T.valid)[:, None], other=0.0)
            if T.valid < T.size
            else tl.load(ptr)
        )
        acc = tl.dot(v, p[f], acc)
    return acc


@triton.jit
def add_products(base, page, row, q, qk, g: tl.constexpr, K: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds products with keys to the eight scores [16, N] of the one group; q: one [size, N] for
    each run."""
    for t in tl.static_range(count(K.key_runs)):
        qk = _add_run_products(base, page, row, q[t], qk, K, pick(K.key_runs, t))
    return qk


@triton.jit
def add_values(base, page, row, p, acc, acc_high, V: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds weighted values to the outputs of all runs; p: of the one group eight [16, N]."""
    new = ()
    for t in tl.static_range(count(V.value_runs)):
        new = new + (_add_run_values(base, page, row, p[0], acc[t], V, pick(V.value_runs, t)),)
    return new, acc_high


@triton.jit
def write_rows(
    block, dim, source, LOAD: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, OWN: tl.constexpr
):  # fmt: skip
    """Writes the elements of `source` (`load_source`, which is LOAD) as float16."""
    width: tl.constexpr = tile_width(TOKEN_TILE, 8 * ROWS)
    t = tl.arange(0, 8 * ROWS)[:, None]
    for first in range(0, dim, width):
        c = first + tl.arange(0, width)[None, :]
        x = LOAD(source, t // ROWS, t % ROWS, c, c < dim, ROWS, PACKED, OWN)
        tl.store(block.to(tl.pointer_type(tl.float16)) + t * dim + c, to_fp16(x), mask=c < dim)
