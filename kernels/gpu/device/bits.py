"""Packed words to tensor-core operands and parameters to float32, for the Triton kernels.

Two 16-bit lanes go through one 32-bit instruction (`pack=2`), which plain Triton does not do; the interpreter knows no
inline assembly, so under it the same is written in plain operations.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def count(items):
    """Length of a constant tuple."""
    return len(items)


@triton.constexpr_function
def pick(items, i):
    """Entry i of a constant tuple, as a constant itself."""
    return items[i]


@triton.constexpr_function
def pow2(n):
    """The smallest power of two that is no less than n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


@triton.constexpr_function
def field_unit(f, ternary):
    """What a field's code, masked where it stands, is multiplied with to be worth the same in all eight fields."""
    return 1.0 if ternary else 0.25 ** (f % 4)


@triton.constexpr_function
def _mask_asm(mask):
    return f"and.b32 $0, $1, {mask * 0x10001:#010x};"


@triton.constexpr_function
def _shift_asm(right):
    return f"shr.b32 $0, $1, {right};" if right > 0 else f"shl.b32 $0, $1, {-right};"


@triton.jit
def mask_code(words, MASK: tl.constexpr, INTERPRET: tl.constexpr):
    """int16 words & mask, as float16 bit patterns."""
    if INTERPRET:
        return (words & MASK).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(_mask_asm(MASK), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _mask_words(words, MASK: tl.constexpr, INTERPRET: tl.constexpr):
    if INTERPRET:
        return (words & MASK).to(tl.int16)
    else:
        return tl.inline_asm_elementwise(_mask_asm(MASK), "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)


@triton.jit
def shift_right(words, RIGHT: tl.constexpr, INTERPRET: tl.constexpr):
    """int16 words >> RIGHT (<< −RIGHT); bits that come from a neighbour or the sign must be masked off by the caller."""
    if RIGHT == 0:
        return words
    elif INTERPRET:
        return (words >> RIGHT).to(tl.int16) if RIGHT > 0 else (words << -RIGHT).to(tl.int16)
    else:
        return tl.inline_asm_elementwise(_shift_asm(RIGHT), "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)


@triton.jit
def _times_3(words, INTERPRET: tl.constexpr):
    if INTERPRET:
        return (words * 3).to(tl.int16)
    else:
        return tl.inline_asm_elementwise("mul.lo.u32 $0, $1, 3;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)


@triton.jit
def codes_of(
    words, more, WIDTH: tl.constexpr, HALF: tl.constexpr, LEFT: tl.constexpr, f: tl.constexpr, INTERPRET: tl.constexpr
):
    """Field f of packed words as float16, code · 2^LEFT · 4^(f mod 4) · 2^−24.

    Args:
        words: int16 [a, b]; for four bits, fields 0 to 3, and `more` fields 4 to 7.
        HALF: for one bit, which channel of the word.
    """
    if WIDTH == 4:
        source = words if f < 4 else more
        if f % 2 == 0:
            return mask_code(source, 15 << (2 * (f % 4)), INTERPRET)
        else:
            return mask_code(shift_right(source, 6, INTERPRET), 15 << (2 * (f % 4)), INTERPRET)
    elif WIDTH == 2:
        return mask_code(shift_right(words, 8 * (f // 4), INTERPRET), 3 << (2 * (f % 4)), INTERPRET)
    else:
        right: tl.constexpr = 8 * (f // 4) + HALF - LEFT
        return mask_code(shift_right(words, right, INTERPRET), 1 << (2 * (f % 4) + LEFT), INTERPRET)


@triton.jit
def _e4m3x4(w, INTERPRET: tl.constexpr):
    """Four e4m3 numbers of an int32, low byte first, as float32."""
    if INTERPRET:
        a = (w & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        b = ((w >> 8) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        c = ((w >> 16) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        d = ((w >> 24) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        return a, b, c, d
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 lo, hi, a0, a1, b0, b1;
            .reg .b32 a, b;
            mov.b32 {lo, hi}, $4;
            cvt.rn.f16x2.e4m3x2 a, lo;
            cvt.rn.f16x2.e4m3x2 b, hi;
            mov.b32 {a0, a1}, a;
            mov.b32 {b0, b1}, b;
            cvt.f32.f16 $0, a0;
            cvt.f32.f16 $1, a1;
            cvt.f32.f16 $2, b0;
            cvt.f32.f16 $3, b1;
            }""",
            "=f,=f,=f,=f,r",
            [w],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _halves(w):
    """Two float16 numbers of an int32, low one first, as float32."""
    low = (w & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = ((w >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def row_pointers(base, page, row, OFFSET: tl.constexpr, STRIDE: tl.constexpr):
    """uint8 pointers to the rows of a head's block.

    In this order: the first sum is the same in every pass of a loop over pages, and the last one part of the loading instruction.

    Args:
        base: pointer to the head's block in a page that would lie at the anchor.
        page: int64, the page's address from the anchor, in units of 16 bytes.
    """
    return (base + row * STRIDE) + page * 16 + OFFSET


@triton.jit
def load_params(
    base,
    page,
    row,
    BASE: tl.constexpr,
    INDEX: tl.constexpr,
    TOKENS: tl.constexpr,
    FP16: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Parameter INDEX of the eight tokens of each row: eight float32 [16].

    Args:
        base, page: of the head's block, as in `row_pointers`; row: int32 [16], rows of words.
        BASE: bytes from the block to its parameters; TOKENS: of a page.
    """
    if FP16:
        ptr = row_pointers(base, page, row, BASE + INDEX * TOKENS * 2, 16).to(tl.pointer_type(tl.int64))
        low, high = tl.load(ptr), tl.load(ptr + 1)
        a, b = _halves(low.to(tl.int32))
        c, d = _halves((low >> 32).to(tl.int32))
        e, f = _halves(high.to(tl.int32))
        g, h = _halves((high >> 32).to(tl.int32))
        return a, b, c, d, e, f, g, h
    else:
        w = tl.load(row_pointers(base, page, row, BASE + INDEX * TOKENS, 8).to(tl.pointer_type(tl.int64)))
        a, b, c, d = _e4m3x4(w.to(tl.int32), INTERPRET)
        e, f, g, h = _e4m3x4((w >> 32).to(tl.int32), INTERPRET)
        return a, b, c, d, e, f, g, h


@triton.jit
def _tile_ptr(base, page, row, OFFSET: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Pointers to words [rows, 16 channels], or [16 channels, rows]."""
    c = tl.arange(0, 16)
    ptr = row_pointers(base, page, row, OFFSET, 32).to(tl.pointer_type(tl.int16))
    if TRANSPOSED:
        return ptr[None, :] + c[:, None]
    else:
        return ptr[:, None] + c[None, :]


@triton.jit
def _across(row, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        return row[None, :]
    else:
        return row[:, None]


@triton.jit
def _half_word_digits(x, H: tl.constexpr, WHOLE: tl.constexpr, LEFT: tl.constexpr, INTERPRET: tl.constexpr):
    """Ternary codes of half-word H: five, or what is left over; each float16, code · 2^8 · 2^−24."""
    out = ()
    if H < WHOLE:
        for _ in tl.static_range(5):
            x3 = _times_3(x, INTERPRET)
            out = out + (mask_code(x3, 0x300, INTERPRET),)
            x = _mask_words(x3, 0xFF, INTERPRET)
    else:
        for j in tl.static_range(LEFT):
            out = out + (mask_code(shift_right(x, 2 * j - 8, INTERPRET), 0x300, INTERPRET),)
    return out


@triton.jit
def trit_digits(base, page, row, TRANSPOSED: tl.constexpr, V: tl.constexpr, INTERPRET: tl.constexpr):
    """All ternary codes of the tokens of 16 rows of words, in the order of their numbers c·8 + f (packing.py).

    Args:
        base, page: of the plane, as in `row_pointers`; row: int32 [16]; V: a tiles.TritLayout.
    Returns:
        float16 [16, 16] each: rows by channels, or channels by rows if TRANSPOSED; code · 2^8 · 2^−24.
    """
    whole: tl.constexpr = pick(V, 1)
    left: tl.constexpr = pick(V, 2)
    words: tl.constexpr = pick(V, 3)
    rows: tl.constexpr = pick(V, 4)
    halves: tl.constexpr = whole + (1 if left > 2 else 0)
    out = ()
    for k in tl.static_range(words):
        w = tl.load(_tile_ptr(base, page, row, k * rows * 32, TRANSPOSED))
        out = out + _half_word_digits(_mask_words(w, 0xFF, INTERPRET), 2 * k, whole, left, INTERPRET)
        x = _mask_words(shift_right(w, 8, INTERPRET), 0xFF, INTERPRET)
        out = out + _half_word_digits(x, 2 * k + 1, whole, left, INTERPRET)
    if halves % 2 == 1:  # two rows to a word
        w = tl.load(_tile_ptr(base, page, row // 2, words * rows * 32, TRANSPOSED))
        x = tl.where(_across(row % 2 == 1, TRANSPOSED), shift_right(w, 8, INTERPRET), w)
        out = out + _half_word_digits(_mask_words(x, 0xFF, INTERPRET), 2 * words, whole, left, INTERPRET)
    if left == 1 or left == 2:  # four rows to a word
        start: tl.constexpr = words * rows * 32 + (halves % 2) * ((rows + 1) // 2) * 32
        w = tl.load(_tile_ptr(base, page, row // 4, start, TRANSPOSED))
        x = tl.where(_across((row // 2) % 2 == 1, TRANSPOSED), shift_right(w, 8, INTERPRET), w)
        x = tl.where(_across(row % 2 == 1, TRANSPOSED), shift_right(x, 4, INTERPRET), x)
        out = out + _half_word_digits(_mask_words(x, 15, INTERPRET), whole + 1, whole, left, INTERPRET)
    return out
