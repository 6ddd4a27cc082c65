"""What values with trellis-coded classes of two bits (trellis_codes.py) would take of a GPU, in
instructions of kernels that are compiled for sm_90 and never run: no GPU is needed.

usage: python benchmarks/trellis_kernel.py [KEYS/VALUES …]

Reading: the loop of the attention kernel over packed tokens (instructions.py), for pairs of the
catalogue's names at 128 channels. A window of 8 bits of a word and the next row's is the state; its
number is computed ("computed", of `trellis_codes.HASH`) or loaded from shared memory ("table"; nothing
has put one there: for counting, any address will do). Every other class is read as it is today.
Writing: the loop of a Viterbi search, a symbol a pass, without the way back.
"""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))
import compile_kernels  # first: it turns Triton's interpreter off
import torch
import triton
import triton.language as tl
from instructions import INSTRUCTION, listing, packed_loop
from trellis_codes import HASH

from kvfold.kernels.catalogue import named_keys, named_values
from kvfold.kernels.formats import Format
from kvfold.kernels.gpu.device.binary import _add_run, _own_group
from kvfold.kernels.gpu.device.bits import count, pick
from kvfold.kernels.gpu.kinds import DeviceCode, device_layout
from kvfold.kernels.layout import HeadLayout

MULTIPLIER, ADDEND = HASH
DIM, TOKENS = 128, 128  # channels; tokens of a pass of the loop
DEFAULT = ("2.5a/1.25a", "2.5a/2a", "2a/2.5a")
BANKS = 32  # of shared memory, four bytes wide
# no format of keys and of values may be the same: layouts are told apart by them
VALUES = set(named_values(DIM).values()) - set(named_keys(DIM).values())


@triton.constexpr_function
def _asm(f, table):
    """Two words and the two that follow theirs → the numbers of their field f, two halves."""
    windows = "prmt.b32 s0, $1, $2, 0x5410; prmt.b32 s1, $1, $2, 0x7632;"
    if table:  # of 2 bytes each
        shift = f"shr.u32 s{{0}}, s{{0}}, {2 * f - 1};" if f else "shl.b32 s{0}, s{0}, 1;"
        one = shift + "and.b32 s{0}, s{0}, 0x1fe; ld.shared.u16 h{0}, [s{0}];"
        return (
            "{ .reg .b32 s0, s1; .reg .b16 h0, h1;"
            + windows
            + one.format(0)
            + one.format(1)
            + "mov.b32 $0, {h0, h1}; }"
        )
    one = (
        f"shr.u32 s{{0}}, s{{0}}, {2 * f}; and.b32 s{{0}}, s{{0}}, 255;"
        f"mad.lo.u32 s{{0}}, s{{0}}, {MULTIPLIER}, {ADDEND};"
        "lop3.b32 s{0}, s{0}, 0x8fff8fff, 0x3b603b60, 0x6a;"
    )
    return (
        "{ .reg .b32 s0, s1, l, h;"
        + windows
        + one.format(0)
        + one.format(1)
        + "prmt.b32 l, s0, s1, 0x5410; prmt.b32 h, s0, s1, 0x7632; add.rn.f16x2 $0, l, h; }"
    )


@triton.constexpr_function
def _trellis(run):
    """Whether a run of value channels is of a class of two bits."""
    return len(run.low) == 1 and len(run.high) == 0 and run.low[0].width == 2


@triton.jit
def _numbers(words, more, f: tl.constexpr, TABLE: tl.constexpr):
    """Field f of int16 words as float16."""
    return tl.inline_asm_elementwise(
        _asm(f, TABLE), "=r,r,r", [words, more], dtype=tl.float16, is_pure=True, pack=2
    )


@triton.jit
def _words(base, page, row, c, T: tl.constexpr, W: tl.constexpr):
    """A tile [size, 16] of a plane, as `binary._add_plane` loads it."""
    same = tl.trans((base + row * W.stride).to(tl.pointer_type(tl.int16))[None, :]) + c[None, :]
    ptr = tl.trans(same + tl.trans((page * 8)[None, :]) + W.offset // 2)
    if T.valid < T.size:
        return tl.load(ptr, mask=(c < T.valid)[:, None], other=0)
    else:
        return tl.load(ptr)


@triton.jit
def _add_trellis(
    base, page, row, p, acc, V: tl.constexpr, T: tl.constexpr, W: tl.constexpr, TABLE: tl.constexpr
):
    """Adds a run of a class to its output [size, N]; p: eight probabilities [16, N], less the powers
    of two that they carry for masked words."""
    c = tl.arange(0, T.size)
    following = tl.where(row + 1 < V.rows, row + 1, 0)
    words = _words(base, page, row, c, T, W)
    more = _words(base, page, following, c, T, W)
    for f in tl.static_range(8):
        own = (p[f] * (1.0 / pick(V.field_units, f))).to(tl.float16)
        acc = tl.dot(_numbers(words, more, f, TABLE), own, acc)
    return acc


@triton.jit
def _add_one(base, page, row, p, low, high, V: tl.constexpr, T: tl.constexpr, TABLE: tl.constexpr):
    if _trellis(T):
        return _add_trellis(base, page, row, p, low, V, T, pick(T.low, 0), TABLE), high
    else:
        return _add_run(base, page, row, p, low, high, T, False)


@triton.jit
def _add_values(base, page, row, p, acc, acc_high, V: tl.constexpr, TABLE: tl.constexpr):
    low = ()
    high = ()
    for t in tl.static_range(count(V.value_runs)):
        own = _own_group(p, pick(V.value_runs, t))
        one_low, one_high = _add_one(
            base, page, row, own, acc[t], acc_high[t], V, pick(V.value_runs, t), TABLE
        )
        low = low + (one_low,)  # noqa: RUF005 (Triton's Python)
        high = high + (one_high,)  # noqa: RUF005
    return low, high


@triton.jit
def computed(base, page, row, p, acc, acc_high, V: tl.constexpr, INTERPRET: tl.constexpr):
    """As `binary.add_values`, with computed numbers."""
    return _add_values(base, page, row, p, acc, acc_high, V, False)


@triton.jit
def looked_up(base, page, row, p, acc, acc_high, V: tl.constexpr, INTERPRET: tl.constexpr):
    """As `binary.add_values`, with a table."""
    return _add_values(base, page, row, p, acc, acc_high, V, True)


@triton.jit
def search_kernel(y_ptr, w_ptr, code_ptr, back_ptr, n, CHOICES: tl.constexpr, GROUPS: tl.constexpr):
    """The Viterbi search over one ring by one warp, without the way back: a pass of the loop is one
    symbol."""
    ring = tl.program_id(0).to(tl.int64)
    q = tl.arange(0, GROUPS)
    code = tl.load(code_ptr + tl.arange(0, CHOICES * GROUPS))
    cost = tl.zeros((CHOICES * GROUPS,), tl.float32)
    for t in range(n):
        d = tl.load(y_ptr + ring * n + t) - code
        best, which = tl.min(tl.reshape(cost, (CHOICES, GROUPS)), 0, return_indices=True)
        tl.store(back_ptr + (ring * n + t) * GROUPS + q, which.to(tl.uint8))
        spread = tl.broadcast_to(best[:, None], (GROUPS, CHOICES))
        cost = tl.reshape(spread, (CHOICES * GROUPS,)) + tl.load(w_ptr + ring * n + t) * d * d
    tl.store(y_ptr + ring * CHOICES * GROUPS + tl.arange(0, CHOICES * GROUPS), cost)


def layout_with(function) -> object:
    """`device_layout`, but that values are read by `function`."""
    code = DeviceCode("kvfold.kernels.gpu.device.binary")
    code.add_values = function

    def layout(fmt: Format, page_tokens: int) -> HeadLayout:
        own = device_layout(fmt, page_tokens)
        return replace(own, device=code) if fmt in VALUES else own

    return layout


def counted(key: Format, value: Format, function) -> tuple[list[str], int]:
    """(operations of the loop over packed tokens, registers)."""
    with mock.patch.object(
        compile_kernels, "device_layout", layout_with(function) if function else device_layout
    ):
        sass = listing(compile_kernels.compile_pair(key, value).asm["cubin"])
    registers = re.search(r"REG:(\d+)", sass)
    assert registers
    return packed_loop(sass), int(registers[1])


def turns(states: int = 256) -> float:
    """Times that shared memory is read for one load of a warp whose lanes look numbers of two bytes up
    at random: the most words that lanes want of one bank."""
    drawn = torch.randint(0, states, (4000, 32), generator=torch.Generator().manual_seed(0)) // 2
    words = torch.zeros(4000, states // 2).scatter_(1, drawn, 1.0)
    return float(words.unflatten(1, (-1, BANKS)).sum(1).amax(1).mean())


def report(pairs: Sequence[str]) -> None:
    """Prints one Markdown table."""
    print(
        "| formats | channels of 2 bits | codes | instructions in the loop | a token | more, a lane's code "
        "| spills | registers | most frequent |\n" + "|---" * 9 + "|"
    )
    for name in pairs:
        key, value = (
            names[part]
            for names, part in zip(
                (named_keys(DIM), named_values(DIM)), name.split("/"), strict=True
            )
        )
        channels = sum(size for size, levels in value.classes if levels == 4)
        before = 0
        for label, function in (("scalar", None), ("computed", computed), ("table", looked_up)):
            loop, registers = counted(key, value, function)
            before = before or len(loop)
            each = (len(loop) - before) / (channels * TOKENS / 32)
            frequent = ", ".join(f"{op} {n}" for op, n in Counter(loop).most_common(6))
            spills = loop.count("LDL") + loop.count("STL")
            print(
                f"| {name} | {channels} | {label} | {len(loop)} | {len(loop) / TOKENS:.1f} "
                f"| {each:+.2f} | {spills} | {registers} | {frequent} |",
                flush=True,
            )


def report_writing() -> None:
    """Prints what a symbol takes that is searched for."""
    signature = dict.fromkeys(("y_ptr", "w_ptr", "code_ptr"), "*fp32") | {"back_ptr": "*u8"}
    for bits, states in ((2, 256), (2, 64), (3, 256)):
        constants = {"CHOICES": 2**bits, "GROUPS": states >> bits}
        with mock.patch.dict(compile_kernels.POINTERS, signature):
            sass = listing(compile_kernels.compile_kernel(search_kernel, constants).asm["cubin"])
        found = [(int(m[1], 16), m[2]) for m in map(INSTRUCTION.match, sass.splitlines()) if m]
        for place, text in found:
            back = re.search(r"BRA.*?0x([0-9a-f]+)", text)
            if back and int(back[1], 16) < place:
                size = sum(int(back[1], 16) <= at <= place for at, _ in found)
                print(f"a symbol of {bits} bits, {states} states: {size} instructions of a warp")


if __name__ == "__main__":
    report(sys.argv[1:] or DEFAULT)
    print(f"\nshared memory is read {turns():.2f} times for a load of a table of 256\n")
    report_writing()
