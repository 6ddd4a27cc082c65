"""A real model's artifact and prompts (a plug-in of the tests marked `real`).

KVFOLD_REAL_MODEL names another model than SmolLM2-135M; KVFOLD_REAL_ARTIFACT names an artifact that
is taken as it is.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor
from transformers import AutoTokenizer

import kvfold.compress
from kvfold.exports.reader import read_artifact
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import raw16
from kvfold.runtime.load import attach, stock_from_pretrained

MODEL = os.environ.get("KVFOLD_REAL_MODEL", "smollm2-135m")
GIVEN = os.environ.get("KVFOLD_REAL_ARTIFACT")
BUDGET = "2.5"


def command(*args: object, environment: Mapping[str, str] = os.environ) -> str:
    """Standard output of a `kvfold …` that must succeed."""
    words = [sys.executable, "-m", "kvfold.compress.cli", *map(str, args)]
    kept = {k: v for k, v in environment.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(words, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def real_artifact(tmp_path_factory) -> Path:
    """What `kvfold compress MODEL --budget 2.5` writes, once for all workers of a run; don't write
    into it."""
    if GIVEN:
        return Path(GIVEN).resolve()
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "real" / Path(MODEL).stem
    with FileLock(out.parent.with_suffix(".lock")):
        if not out.exists():
            assert command("compress", MODEL, "--budget", BUDGET, "--out", out).splitlines()[
                -1
            ] == str(out)
            if MODEL == "smollm2-135m":
                assert (
                    resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20
                )  # KiB: 4 GiB
    return out


def prose(artifact: Path) -> Tensor:
    """int64 [n]: the held-out text that the package ships."""
    text = (Path(kvfold.compress.__file__).parent / "data" / "heldout.txt").read_text(
        encoding="utf-8"
    )
    return AutoTokenizer.from_pretrained(artifact)(text, return_tensors="pt").input_ids[0]


def padded(tokens: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(ids, mask), int64 [B, longest]: pieces of the text of these lengths, padded on the left."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, n in enumerate(lengths):
        ids[b, -n:], mask[b, -n:] = tokens[1000 * b : 1000 * b + n], 1
    return ids, mask


def in_16_bit_pages(artifact: Path, page_tokens: int = 32) -> Any:
    """The artifact's weights on a cache whose pages hold 16 bits. In pages of few bits, a sum that
    is rounded otherwise, as in a batch of another size, turns codes now and then, and a near tie in
    the logits can go the other way."""
    stored = read_artifact(artifact)
    dim = stored.geometry.head_dim
    specs = [LayerSpec(KeySpec(raw16(dim)), ValueSpec(raw16(dim)))] * len(stored.specs)
    model = stock_from_pretrained(stored.path, dtype=torch.float32)
    geometry = replace(stored.geometry, page_tokens=page_tokens)
    artifact = SimpleNamespace(
        specs=specs, geometry=geometry, metadata=stored.metadata, digest=stored.digest
    )
    return attach(model, artifact)


def greedy(
    model: Any, ids: Tensor, mask: Tensor | None = None, new: int = 24, **options: Any
) -> Tensor:
    """`new` greedy tokens behind the prompt, never fewer."""
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options
    )


def rms(x: Tensor) -> float:
    """Root of the mean square."""
    return float(x.square().mean().sqrt())
