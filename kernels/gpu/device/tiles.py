"""Products of queries and probabilities with one tile of packed keys or values, for the attention kernel.

Tiles and pieces are constant tuples (tiles.py); a tuple of eight is one entry for each field of a word (packing.py).

Keys and values have their rows along different axes. Their pointers are turned so that the rows of both lie along the second: else
the compiler gives each its own copy of the pages' addresses, loaded and carried from pass to pass, and a prompt's 16 columns have no
registers left for that.
"""

import triton
import triton.language as tl

from kvfold.kernels.gpu.device.bits import codes_of, count, pick, row_pointers, trit_digits


@triton.jit
def queries(
    q_ptr, n, dim, start: tl.constexpr, size: tl.constexpr, valid: tl.constexpr, step: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """A run of channels of the queries, float16 [size, N], times the step of its codes."""
    c = tl.arange(0, size)
    if size * N <= 128:
        # Four numbers a thread: loaded four channels at once, they would be shuffled to where the tensor cores want them, and that in
        # every pass of the loop. So the compiler may not know that they are aligned: it then goes through shared memory, where
        # they stay, and a pass takes them by one instruction.
        nought = tl.program_id(0) >> 31
        ptr = q_ptr + nought + n[:, None] * dim + start + c[None, :]
        q = tl.trans(tl.load(ptr, mask=(c < valid)[None, :], other=0.0))
    else:
        q = tl.load(q_ptr + n[None, :] * dim + start + c[:, None], mask=(c < valid)[:, None], other=0.0)
    return (q.to(tl.float32) * step).to(tl.float16)


@triton.jit
def tile_queries(q_ptr, n, dim, T: tl.constexpr, N: tl.constexpr):
    """The queries that meet a key tile, times the step of its codes."""
    start: tl.constexpr = pick(T, 5)
    size: tl.constexpr = pick(T, 6)
    valid: tl.constexpr = pick(T, 7)
    step: tl.constexpr = pick(T, 9)
    return queries(q_ptr, n, dim, start, size, valid, step, N)


@triton.jit
def piece_queries(q_ptr, n, dim, P: tl.constexpr, N: tl.constexpr):
    """The queries of a run of channels, times the step of its codes."""
    start: tl.constexpr = pick(P, 0)
    size: tl.constexpr = pick(P, 1)
    valid: tl.constexpr = pick(P, 2)
    step: tl.constexpr = pick(P, 4)
    return queries(q_ptr, n, dim, start, size, valid, step, N)


@triton.constexpr_function
def has_size(items, size, g, at_size, at_group):
    """Whether any of the tiles or pieces `items`, their sizes and groups at entries at_size and at_group, is of this size and group."""
    return any(x[at_size] == size and x[at_group] == g for x in items)


@triton.jit
def add_middle(q, wide, g: tl.constexpr, size: tl.constexpr, T: tl.constexpr, SCALE_MIN: tl.constexpr):
    """Adds to `wide` [size, N] what, summed over channels, the zero point of a tile's codes adds to group g, if the tile is of that
    size and group: q·(L − 1)/2, or q where codes have a minimum; once a channel, so only for the plane of the low bits."""
    step: tl.constexpr = pick(T, 9)
    middle: tl.constexpr = pick(T, 10)
    if pick(T, 8) != g or pick(T, 6) != size:
        return wide
    elif SCALE_MIN:
        return wide + q.to(tl.float32) if step == 1.0 else wide
    else:
        return wide + q.to(tl.float32) * middle if middle != 0.0 else wide


@triton.jit
def key_tile(base, page, row, q, s, g: tl.constexpr, T: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds one tile of keys to the eight scores [16, N] of group g."""
    width: tl.constexpr = pick(T, 0)
    half: tl.constexpr = pick(T, 1)
    offset: tl.constexpr = pick(T, 2)
    stride: tl.constexpr = pick(T, 3)
    fields_4: tl.constexpr = pick(T, 4)
    size: tl.constexpr = pick(T, 6)
    valid: tl.constexpr = pick(T, 7)
    group: tl.constexpr = pick(T, 8)
    if group == g:
        c = tl.arange(0, size)
        same = (base + row * stride).to(tl.pointer_type(tl.int16))[None, :] + c[:, None]
        ptr = tl.trans(same + (page * 8)[None, :] + offset // 2)
        if valid < size:
            words = tl.load(ptr, mask=(c < valid)[None, :], other=0)
            more = tl.load(ptr + fields_4 // 2, mask=(c < valid)[None, :], other=0) if width == 4 else words
        else:
            words = tl.load(ptr)
            more = tl.load(ptr + fields_4 // 2) if width == 4 else words
        new = ()
        for f in tl.static_range(8):
            new = new + (tl.dot(codes_of(words, more, width, half, 0, f, INTERPRET), q, s[f]),)
        return new
    else:
        return s


@triton.jit
def value_plane(
    base, page, row, p, acc, size: tl.constexpr, valid: tl.constexpr, C: tl.constexpr, INTERPRET: tl.constexpr
):
    """Adds one plane of a run of value channels to its output [size, N]; p: eight probabilities [16, N]."""
    width: tl.constexpr = pick(C, 0)
    half: tl.constexpr = pick(C, 1)
    offset: tl.constexpr = pick(C, 2)
    stride: tl.constexpr = pick(C, 3)
    fields_4: tl.constexpr = pick(C, 4)
    left: tl.constexpr = pick(C, 5)
    c = tl.arange(0, size)
    same = tl.trans((base + row * stride).to(tl.pointer_type(tl.int16))[None, :]) + c[None, :]
    ptr = tl.trans(same + tl.trans((page * 8)[None, :]) + offset // 2)
    if valid < size:
        words = tl.load(ptr, mask=(c < valid)[:, None], other=0)
        more = tl.load(ptr + fields_4 // 2, mask=(c < valid)[:, None], other=0) if width == 4 else words
    else:
        words = tl.load(ptr)
        more = tl.load(ptr + fields_4 // 2) if width == 4 else words
    for f in tl.static_range(8):
        acc = tl.dot(codes_of(words, more, width, half, left, f, INTERPRET), p[f], acc)
    return acc


@triton.jit
def value_piece(base, page, row, p, low, high, P: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds all planes of a run of value channels: (low, high) outputs [size, N], high worth 16."""
    size: tl.constexpr = pick(P, 1)
    valid: tl.constexpr = pick(P, 2)
    planes_low: tl.constexpr = pick(P, 6)
    planes_high: tl.constexpr = pick(P, 7)
    for i in tl.static_range(count(planes_low)):
        low = value_plane(base, page, row, p, low, size, valid, pick(planes_low, i), INTERPRET)
    for i in tl.static_range(count(planes_high)):
        high = value_plane(base, page, row, p, high, size, valid, pick(planes_high, i), INTERPRET)
    return low, high


@triton.jit
def piece_group(p, P: tl.constexpr):
    """The probabilities of a run's parameter group."""
    group: tl.constexpr = pick(P, 3)
    return p[group]


@triton.jit
def zeros_piece(N: tl.constexpr, P: tl.constexpr):
    """Empty outputs of a run: low, and high (a scalar zero where no plane needs it)."""
    size: tl.constexpr = pick(P, 1)
    high: tl.constexpr = pick(P, 7)
    if count(high) > 0:
        return tl.zeros((size, N), tl.float32), tl.zeros((size, N), tl.float32)
    else:
        return tl.zeros((size, N), tl.float32), tl.zeros((1, N), tl.float32)


@triton.jit
def raw_page_keys(base, page, row, q, s, rows: tl.constexpr, dim: tl.constexpr, P: tl.constexpr):
    """Adds a run of channels of 16-bit keys to the eight scores [16, N]."""
    start: tl.constexpr = pick(P, 0)
    size: tl.constexpr = pick(P, 1)
    valid: tl.constexpr = pick(P, 2)
    c = tl.arange(0, size)
    new = ()
    for f in tl.static_range(8):
        at = row_pointers(base, page, row, f * rows * dim * 2, dim * 2).to(tl.pointer_type(tl.float16))
        ptr = at[:, None] + start + c[None, :]
        k = tl.load(ptr, mask=(c < valid)[None, :], other=0.0) if valid < size else tl.load(ptr)
        new = new + (tl.dot(k, q, s[f]),)
    return new


@triton.jit
def raw_page_values(base, page, row, p, acc, rows: tl.constexpr, dim: tl.constexpr, P: tl.constexpr):
    """Adds a run of channels of 16-bit values to its output [size, N]."""
    start: tl.constexpr = pick(P, 0)
    size: tl.constexpr = pick(P, 1)
    valid: tl.constexpr = pick(P, 2)
    c = tl.arange(0, size)
    for f in tl.static_range(8):
        at = row_pointers(base, page, row, f * rows * dim * 2, dim * 2).to(tl.pointer_type(tl.float16))
        ptr = at[None, :] + start + c[:, None]
        v = tl.load(ptr, mask=(c < valid)[:, None], other=0.0) if valid < size else tl.load(ptr)
        acc = tl.dot(v, p[f], acc)
    return acc


@triton.jit
def trit_keys(base, page, row, q, s, V: tl.constexpr, INTERPRET: tl.constexpr, g: tl.constexpr, G: tl.constexpr):
    """Adds ternary keys to the eight scores of group g of G; q: one [16, N] for each 16 channels."""
    chunks: tl.constexpr = pick(V, 0)
    digits = trit_digits(base, page, row, False, V, INTERPRET)
    for c in tl.static_range(chunks):
        if c * G // chunks == g:
            new = ()
            for f in tl.static_range(8):
                new = new + (tl.dot(digits[c * 8 + f], q[c], s[f]),)
            s = new
    return s


@triton.jit
def trit_values(base, page, row, p, acc, V: tl.constexpr, INTERPRET: tl.constexpr, G: tl.constexpr):
    """Adds ternary values; acc: one [16, N] for each 16 channels, p: for each group eight [16, N]."""
    chunks: tl.constexpr = pick(V, 0)
    digits = trit_digits(base, page, row, True, V, INTERPRET)
    new = ()
    for c in tl.static_range(chunks):
        a = acc[c]
        for f in tl.static_range(8):
            a = tl.dot(digits[c * 8 + f], p[c * G // chunks][f], a)
        new = new + (a,)
    return new


@triton.jit
def add_trit_middle(q, wide, g: tl.constexpr, P: tl.constexpr, SCALE_MIN: tl.constexpr):
    """`add_middle` for 16 ternary channels."""
    middle: tl.constexpr = pick(P, 5)
    if pick(P, 3) == g:
        return wide + q.to(tl.float32) * (1.0 if SCALE_MIN else middle)
    else:
        return wide
