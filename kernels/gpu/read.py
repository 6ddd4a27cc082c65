"""Kernels that only read, in several shapes of grid, program and pipeline: what a device's memory
gives at the most."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.compile.launch import launch


class Setting(NamedTuple):
    """How `read_words` reads.

    Attributes:
        words: int32 words that a program loads at a time, a power of two; each thread loads runs of
            four (16 bytes).
        warps: of a program.
        programs: for each multiprocessor.
        stages: loads in flight of the pipeline, through shared memory; 1 for none, straight into
            registers.
    """

    words: int
    warps: int
    programs: int
    stages: int

    def __str__(self) -> str:
        warps = "1 warp" if self.warps == 1 else f"{self.warps} warps"
        stages = f", {self.stages} stages" if self.stages > 1 else ""
        return f"Triton read, {4 * self.words >> 10} KiB by {warps}, {self.programs} programs a multiprocessor{stages}"


SETTINGS = (
    Setting(1024, 1, 16, 1),
    Setting(2048, 4, 8, 1),
    Setting(4096, 4, 8, 1),
    Setting(8192, 8, 4, 1),
    Setting(8192, 8, 64, 1),  # short programs, one after the other
    Setting(1024, 1, 8, 4),  # as attention reads: one warp, its tiles ahead in shared memory
    Setting(2048, 4, 8, 3),
    Setting(4096, 8, 4, 4),
)


@triton.jit(do_not_specialize=["blocks"])
def _read_kernel(x, out, blocks, WORDS: tl.constexpr, STAGES: tl.constexpr):
    """Grid: (programs,). XORs every programs-th block of WORDS int32 words and stores the result,
    so that no load can go."""
    word = tl.arange(0, WORDS)
    total = tl.zeros((WORDS,), tl.int32)
    for i in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        total ^= tl.load(x + i * WORDS + word)
    tl.store(out + tl.program_id(0), tl.xor_sum(total, 0))


def read_words(x: Tensor, out: Tensor, setting: Setting) -> None:
    """Reads all of `x` once.

    Args:
        x: int32, contiguous, whole blocks of `setting.words`, fewer than 2³¹ words.
        out: int32 [programs]: the XOR of each program's words; its length is the grid.
    """
    blocks = x.numel() // setting.words
    assert x.dtype == out.dtype == torch.int32 and blocks * setting.words == x.numel() < 2**31
    launch(
        _read_kernel,
        (len(out),),
        x,
        out,
        blocks,
        WORDS=setting.words,
        STAGES=setting.stages,
        num_warps=setting.warps,
    )
