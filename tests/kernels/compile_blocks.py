"""Compiles the kernels over an engine's blocks for sm_90, as a step would launch them; in a process
of its own, with the compiler."""

from collections.abc import Sequence

import torch
from compile_kernels import POINTERS  # noqa: F401 - it turns the interpreter off

from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.compile import build as ahead
from kvfold.kernels.compile.launch import noting
from kvfold.kernels.formats import Format, uniform
from kvfold.runtime.backends.base import LogitOptions, Workspace
from kvfold.runtime.vllm.batch import DeviceBatch
from kvfold.runtime.vllm.blocks import block_layout
from kvfold.runtime.vllm.layer import ServedLayer
from kvfold.runtime.vllm.torch_attention import Blocks
from kvfold.runtime.vllm.triton_attention import attend_step

HEADS, DIM, BATCH = 2, 64, 3
GEOMETRY = Geometry(HEADS, DIM, 64, 128, 32)
MATRIX, OFFSET = torch.eye(DIM).repeat(HEADS, 1, 1), torch.ones(HEADS, DIM)
TURNS = tuple(10000 ** (-i / 32) for i in range(32))
STEPS = {
    "mean": (
        LayerSpec(
            KeySpec(Format(((16, 8), (48, 4))), (), MATRIX, OFFSET, frequencies=TURNS),
            ValueSpec(uniform(DIM, 4, "e4m3", 32), (), torch.ones(HEADS, 2)),
        ),
        LogitOptions(),
    ),
    "cap": (
        LayerSpec(KeySpec(uniform(DIM, 16), (), MATRIX, OFFSET), ValueSpec(uniform(DIM, 3))),
        LogitOptions(30.0, torch.zeros(4 * HEADS), 256),
    ),
}


def launches(name: str) -> list:
    """What a decoding step of one layer starts."""
    spec, options = STEPS[name]
    layout = block_layout(GEOMETRY, [(spec.key.format, spec.value.format)] * 2)
    layer = ServedLayer(0, GEOMETRY, spec, layout, Workspace())
    packed = torch.zeros(4, 2 * layer.block_nbytes, dtype=torch.uint8)[:, : layer.block_nbytes]
    raw = torch.zeros(4, HEADS, layout.raw_block_tokens, 2 * DIM, dtype=torch.float16)
    tables = [torch.zeros(BATCH, width, dtype=torch.int32) for width in (40, 300)]
    lengths, slots = torch.zeros(BATCH, dtype=torch.int32), torch.zeros(BATCH, dtype=torch.int64)
    batch = DeviceBatch(BATCH, [], 5000, lengths, *tables, slots)
    query, out = (torch.zeros(BATCH, 4 * HEADS, DIM, dtype=torch.bfloat16) for _ in range(2))
    key = torch.zeros(BATCH, HEADS, DIM, dtype=torch.bfloat16)
    with noting(132) as noted:
        attend_step(layer, Blocks(packed, raw), batch, query, key, key, 0.125, options, out)
    return noted


def main(names: Sequence[str]) -> None:
    """Compiles the steps of these names, and prints how many kernels they have."""
    jobs = ahead.jobs_of([x for name in names for x in launches(name)], ahead.target_of("sm_90"))
    with ahead.Builder(1) as builder:
        builder.build(jobs)
        builder.wait()
    assert not builder.failed, builder.failed
    print(len(jobs))
