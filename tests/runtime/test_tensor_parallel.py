"""An artifact on two processes, each with a part of the heads: the text and logits of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvfold import runtime
from kvfold.errors import KvfoldError

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


@pytest.mark.parametrize(("policy", "share"), [("floor", 0), ("progressive", 0.9)])
def test_two_processes_give_the_text_of_one(policy, share, tiny_artifact, tmp_path):
    ids = torch.randint(1, 128, (2, 90), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    ids[1, :7], mask[1, :7] = 0, 0
    whole = runtime.load_pretrained(tiny_artifact, device="cpu")
    budget = 0
    if share:  # pages go down on the way, but all fit
        probe = whole.new_kv_cache()
        with torch.no_grad():
            whole(torch.cat((ids, ids[:, :40]), 1), past_key_values=probe)
        budget = int(probe.nbytes * (1 + share) / 2) * 2
        whole = runtime.load_pretrained(
            tiny_artifact, device="cpu", policy=policy, kv_budget=budget
        )
    with torch.no_grad():
        one = whole.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=40,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    done = torchrun(str(SCRIPT), str(tiny_artifact), str(tmp_path), policy, str(budget // 2))
    assert done.returncode == 0, done.stderr[:6000]
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
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
    if (
        policy == "progressive"
    ):  # keeps no file; block tables stand in each, so pages go down sooner
        assert any(len([n for n in layer.values() if n]) > 1 for layer in ranks[0]["pages"])
        return
    assert ranks[0]["pages"] == json.loads(report)
    # a part's cache is not the whole model's, nor the other part's
    with pytest.raises(KvfoldError, match="another artifact"):
        runtime.load_cache(tmp_path / "cache0.safetensors", whole)


def test_what_takes_one_process_is_refused(tiny_artifact, monkeypatch):
    with pytest.raises(KvfoldError, match="torchrun --nproc-per-node 2"):
        runtime.load_pretrained(tiny_artifact, tp_plan="auto")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for options, word in (
        ({"tp_plan": "colwise"}, "'colwise'"),
        ({"tp_plan": "auto", "device": "cpu"}, "exclude each other"),
        ({"tp_plan": "auto", "cuda_graph": True}, "one process"),
        ({"tp_plan": "auto"}, "3 processes divide the 2 KV heads and 4 query heads"),
    ):
        with pytest.raises(KvfoldError, match=word):
            runtime.load_pretrained(tiny_artifact, **options)
