"""Packed words to tensor-core operands and parameters to float32, for the Triton kernels.

Two 16-bit lanes go through one 32-bit instruction (`pack=2`), which plain Triton does not do; the
interpreter knows no inline assembly, so under it the same is written in plain operations.
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
        return tl.inline_asm_elementwise(
            _mask_asm(MASK), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )


@triton.jit
def mask_words(words, MASK: tl.constexpr, INTERPRET: tl.constexpr):
    """int16 words & mask."""
    if INTERPRET:
        return (words & MASK).to(tl.int16)
    else:
        return tl.inline_asm_elementwise(
            _mask_asm(MASK), "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )


@triton.jit
def shift_right(words, RIGHT: tl.constexpr, INTERPRET: tl.constexpr):
    """int16 words >> RIGHT (<< −RIGHT); bits that come from a neighbour or the sign must be masked
    off by the caller."""
    if RIGHT == 0:
        return words
    elif INTERPRET:
        return (words >> RIGHT).to(tl.int16) if RIGHT > 0 else (words << -RIGHT).to(tl.int16)
    else:
        return tl.inline_asm_elementwise(
            _shift_asm(RIGHT), "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )


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

    In this order: the first sum is the same in every pass of a loop over pages, and the last one
    part of the loading instruction.

    Args:
        base: pointer to the head's block in a page that would lie at the anchor.
        page: int64, the page's address from the anchor, in units of 16 bytes.
    """
    return (base + row * STRIDE) + page * 16 + OFFSET


@triton.jit
def load_params(base, page, row, INDEX: tl.constexpr, L: tl.constexpr, INTERPRET: tl.constexpr):
    """Parameter INDEX of the eight tokens of each row: eight float32 [16].

    Args:
        base, page: of the head's block, as in `row_pointers`; row: int32 [16], rows of words.
        L: its HeadLayout.
    """
    if L.param_nbytes == 2:
        ptr = row_pointers(base, page, row, L.params + INDEX * L.page_tokens * 2, 16).to(
            tl.pointer_type(tl.int64)
        )
        low, high = tl.load(ptr), tl.load(ptr + 1)
        a, b = _halves(low.to(tl.int32))
        c, d = _halves((low >> 32).to(tl.int32))
        e, f = _halves(high.to(tl.int32))
        g, h = _halves((high >> 32).to(tl.int32))
        return a, b, c, d, e, f, g, h
    else:
        w = tl.load(
            row_pointers(base, page, row, L.params + INDEX * L.page_tokens, 8).to(
                tl.pointer_type(tl.int64)
            )
        )
        a, b, c, d = _e4m3x4(w.to(tl.int32), INTERPRET)
        e, f, g, h = _e4m3x4((w >> 32).to(tl.int32), INTERPRET)
        return a, b, c, d, e, f, g, h
