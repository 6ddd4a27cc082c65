"""An artifact on two processes, each with a part of the heads: the text and logits of one."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NIGHTLY
from several import several
from torchrun_generate import answer, prompts

from kvfold import runtime
from kvfold.errors import KvfoldError
from kvfold.runtime import parallel
from kvfold.runtime.generate import compile as compilation

SCRIPT = Path(__file__).parents[1] / "helpers" / "torchrun_generate.py"


def torchrun(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            *words,
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )


def check(policy: str, whole: Any, ranks: list[dict]) -> None:
    """What two ranks gave by a policy, against the model on one process."""
    one = answer(whole)
    cache = one.past_key_values
    report = json.dumps([layer["pages"] for layer in cache.report()], default=str)
    want = torch.stack(one.logits).float().flatten()
    for found in ranks:
        assert found["tokens"] == one.sequences.tolist()
        got = torch.tensor(found["logits"])
        assert (got - want).norm() < 1e-2 * want.norm()  # a scale that is searched may tip
        assert found["heads"] == 1 and found["pages"] == ranks[0]["pages"]
        assert found["nbytes"] < 0.6 * cache.nbytes  # tables and lengths stand in each
        assert "a part of the model" in found["refused"]
    with torch.no_grad():
        more = whole.generate(
            one.sequences, past_key_values=cache, max_new_tokens=5, do_sample=False
        )
    assert [found["again"] for found in ranks] == [more.tolist()] * 2
    if policy == "floor":
        assert ranks[0]["pages"] == json.loads(report)
    else:  # block tables stand in each, so pages go down sooner
        assert any(len([n for n in layer.values() if n]) > 1 for layer in ranks[0]["pages"])


def test_two_processes_give_the_text_of_one(tiny_artifact, tmp_path):
    ids = prompts()[0]
    plain = runtime.load_pretrained(tiny_artifact, device="cpu")
    probe = plain.new_kv_cache()
    with torch.no_grad():
        plain(torch.cat((ids, ids[:, :40]), 1), past_key_values=probe)
    budget = int(probe.nbytes * 0.95) * 2  # pages go down on the way, but all fit
    lowered = runtime.load_pretrained(
        tiny_artifact, device="cpu", policy="progressive", kv_budget=budget
    )
    runs = ("floor=0", f"progressive={budget // 2}")
    words = (str(tiny_artifact), str(tmp_path), *runs)
    if NIGHTLY:  # test_processes.py has torchrun's own start of processes each time
        done = [torchrun(str(SCRIPT), *words)]
    else:
        code = "from torchrun_generate import run; run()"
        done = several(2, tmp_path / "said", *words, code=code)
    assert not any(x.returncode for x in done), [x.stderr[:6000] for x in done]
    for policy, whole in (("floor", plain), ("progressive", lowered)):
        ranks = [json.loads((tmp_path / f"{policy}{r}.json").read_text()) for r in range(2)]
        check(policy, whole, ranks)
    floor = [json.loads((tmp_path / f"floor{r}.json").read_text()) for r in range(2)]
    # a part's cache is not the whole model's, nor the other part's
    with pytest.raises(KvfoldError, match="KV heads 0 to 0, but this model has all KV heads"):
        runtime.load_cache(tmp_path / "floor0.safetensors", plain)
    assert "KV heads 1 to 1, but this model has KV heads 0 to 0" in floor[0]["other"]
    assert "KV heads 0 to 0, but this model has KV heads 1 to 1" in floor[1]["other"]


def test_what_takes_one_process_is_refused(tiny_artifact, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(KvfoldError, match="torchrun --nproc-per-node 2"):
        runtime.load_pretrained(tiny_artifact, tp_plan="auto")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for options, word in (
        ({"tp_plan": "colwise"}, "'colwise'"),
        ({"tp_plan": "auto", "device": "cpu"}, "device='cpu' and tp_plan='auto' exclude"),
        ({"tp_plan": "auto", "device_map": "cpu"}, "device_map='cpu' and tp_plan='auto' exclude"),
        ({"tp_plan": "auto", "cuda_graph": True}, "one process"),
        ({"tp_plan": "auto"}, "3 processes divide the 2 KV heads and 4 query heads"),
    ):
        with pytest.raises(KvfoldError, match=word):
            runtime.load_pretrained(tiny_artifact, **options)


def test_each_process_needs_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(KvfoldError, match="at most 1 processes a host"):
        parallel.own_device()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert parallel.own_device() == torch.device("cuda", 0)


@pytest.mark.parametrize("progressive", [False, True])
def test_the_kernels_of_a_part_are_found_without_a_device(progressive, tiny_artifact):
    """As many launches as of the whole model, with one KV head in the place of two."""
    find = partial(compilation.artifact_launches, tiny_artifact, None, progressive, 132)
    whole, part = find(), find(ranks=2)
    assert len(part) == len(whole) > 0
    for one, other in zip(whole, part, strict=True):
        assert one.kernel is other.kernel
        assert [getattr(x, "dtype", None) for x in one.args] == [
            getattr(x, "dtype", None) for x in other.args
        ]
