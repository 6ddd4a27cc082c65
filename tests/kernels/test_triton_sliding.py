"""Kernels on layers whose sliding window has left pages behind: their block table entries are 0,
and nobody reads them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SHAPE
from transformers import MistralConfig, MistralForCausalLM

from kvfold.exports.account import Geometry, batch_nbytes
from kvfold.exports.reader import Artifact
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, uniform
from kvfold.runtime.load import attach

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {
    **SHAPE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # the interpreter is slow
SPEC = LayerSpec(KeySpec(Format(((8, 64), (8, 16)))), ValueSpec(uniform(16, 16, "fp16")))
GEOMETRY = Geometry(1, 16, 3, 16, 16, (40, 40), rollback=12)


def attached(triton):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=40))
    with torch.no_grad():
        for (
            name,
            parameter,
        ) in model.named_parameters():  # before it goes to a GPU, which draws other numbers
            if "norm" not in name:
                parameter.normal_(0, 0.3)
    model = model.to(DEVICE)
    known = SimpleNamespace(
        calibration=SimpleNamespace(covered_positions=10**9), digest="", geometry=GEOMETRY
    )
    return attach(
        model,
        Artifact(Path("tiny"), known, [SPEC] * 2),
        triton=triton,
        rollback=12,
    )


@torch.no_grad()
def test_logits_and_bytes_are_the_references(monkeypatch):
    from kvfold.kernels.pages import anchor

    models = [attached(False), attached(True)]
    ids = torch.randint(1, 128, (2, 130), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    memory = anchor(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu"))
    memory.fill_(0x35)  # what entry 0 names: read as a page, it would show
    caches, start = [None, None], 0
    try:
        for end in (101, 102, 118):
            outs = [
                model(ids[:, start:end], past_key_values=x)
                for model, x in zip(models, caches, strict=True)
            ]
            caches, start = [out.past_key_values for out in outs], end
            # products in float16 may tip a token's scale between two that are equally good
            assert float((outs[1].logits - outs[0].logits).norm() / outs[0].logits.norm()) < 3e-2
            assert (
                caches[0].nbytes
                == caches[1].nbytes
                == batch_nbytes(GEOMETRY, caches[0].formats, [end] * 2)
            )
            if end == 102:  # back over a page boundary, and on
                for cache in caches:
                    cache.crop(-5)
                start = 97
        for layer in caches[1].layers:
            passed = layer.table.sequences[0].passed
            assert (
                passed == GEOMETRY.passed_pages(118, 40) > 1
                and not layer.table.block_table[:, :passed].any()
            )
            assert layer.table.block_table[:, passed : len(layer.table.pages()[0])].ne(0).all()
    finally:
        memory.zero_()
