"""Compiles the attention kernels of pairs of formats for sm_90; in a process of its own, because the
interpreter is off here."""

import os
from collections.abc import Sequence
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvfold.kernels.formats import Format, raw16
from kvfold.kernels.gpu import attention as kernels
from kvfold.kernels.gpu import merge
from kvfold.kernels.gpu import prompt as triton_prompt
from kvfold.kernels.gpu.kinds import device_layout
from kvfold.kernels.gpu.tables import warps_for
from kvfold.kernels.key_mean import padded_fast

NIGHTLY = os.environ.get("KVFOLD_TESTS") == "nightly"
POINTERS = {
    "q_ptr": "*fp16", "q_scale_ptr": "*fp32", "anchor": "*u8", "table": "*i64", "state": "*i32", "raw_k": "*fp16",
    "raw_v": "*fp16", "o_ptr": "*fp32", "ml_ptr": "*fp32", "first_query": "*i32", "packed_before": "*i32",
    "out": "*bf16", "aux": "*fp32", "q_shift_ptr": "*fp32", "mean_ptr": "*fp32", "bias_ptr": "*fp32", "spans": "*fp32",
    "within": "*fp16", "segments": "*i32", "anchor_ptr": "*u8", "pages": "*i64", "fast": "*fp32", "slow": "*fp32",
    "keys": "*fp16", "values": "*fp16", "tables": "*i32", "raw_table": "*i32",
}  # fmt: skip


def compile_kernel(function, constants: dict, num_warps: int = 1) -> Any:
    """A kernel for sm_90, pointers aligned to 16 bytes where kernels are specialised on that."""
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names}
    loose = set(function.do_not_specialize_on_alignment or ())
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n in POINTERS and n not in loose
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": 4}
    )


def compile_pair(
    key_format: Format, value_format: Format, prompt: bool = False, cap: float = 0.0, mean: int = 0
) -> Any:
    dim, columns = key_format.head_dim, 16 if prompt else 4
    return compile_kernel(
        kernels._attention_kernel,
        {
            "K": device_layout(key_format, 32), "V": device_layout(value_format, 32),
            "R": device_layout(raw16(dim), 32),
            "N": max(8, columns), "COLUMNS": columns, "GROUP": 4, "PROMPT": prompt, "MASKED": prompt, "CAP": cap,
            "SHIFT": cap > 0, "MEAN": mean, "STAGES": 4, "PREFETCH": False, "BLOCK": kernels.RAW_BLOCK,
            "INTERPRET": False, "PER_BLOCK": 0,
        },
    )  # fmt: skip


def compile_merge(dim: int, block: int = 256, once: bool = True, shift: bool = False) -> None:
    compile_kernel(
        merge._merge_kernel,
        {"DIM": dim, "CHANNELS": 16, "BLOCK": block, "ONCE": once, "AUX": True, "SHIFT": shift},
        num_warps=4,
    )


def compile_decode() -> Any:
    """Decoding of pages that a prompt's queries read."""
    return compile_kernel(
        triton_prompt._decode_kernel,
        {"ROWS": 4, "OWN": (), "MEAN": 32, "DIM": 128},
        num_warps=warps_for(32),
    )


def main(names: Sequence[str], prompt: bool) -> None:
    """Compiles pairs; a name may also be "cap" (soft-cap), "mean", "merge" or "decode" (of pages)."""
    for name in names:
        compile_named(name, prompt)


def compile_named(name: str, prompt: bool) -> None:
    from test_triton_attention import PAIRS

    if name == "cap":
        compile_pair(*PAIRS["mixed keys"], prompt, cap=30.0)
        if NIGHTLY:  # test_blocks_compile.py has 16 bits under a soft-cap each time
            compile_pair(raw16(64), raw16(64), prompt, cap=30.0)
    elif name == "mean":  # of mixed keys each time in test_blocks_compile.py
        for pair in ("mixed keys", "2 bits") if NIGHTLY else ("2 bits",):
            compile_pair(*PAIRS[pair], prompt, mean=2 * padded_fast(PAIRS[pair][0].head_dim))
    elif name == "merge":
        for block, once in (
            (merge.FEW_SLOTS, True),
            (merge.MANY_SLOTS, True),
            (merge.MANY_SLOTS, False),
        ):
            compile_merge(64, block, once, shift=not once)
    elif name == "decode":
        compile_decode()
    else:
        compile_pair(*PAIRS[name], prompt)
