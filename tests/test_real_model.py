"""The main job on SmolLM2-135M: `make test ARGS="-m real -n 0"`. Minutes, and its weights come from the package index."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from kvfold import runtime
from kvfold.compress.evaluate import evaluate

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "smollm2"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [
        sys.executable,
        "-m",
        "kvfold.compress.cli",
        "compress",
        "smollm2-135m",
        "--budget",
        "2.5",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20  # KiB: 4 GiB
    return out


@torch.no_grad()
def test_bytes_are_the_predicted_ones_and_a_sixth_of_16_bits(artifact):
    account = json.loads((artifact / "kv_cache.json").read_text())["account"]
    model = runtime.load_pretrained(artifact, device="cpu")
    ids = torch.randint(0, 49152, (1, 2048), generator=torch.Generator().manual_seed(0))
    assert model(ids, logits_to_keep=1).past_key_values.nbytes == account["bytes_at"]["2048"]
    assert account["at"] == 8192 and account["bytes"] == account["bytes_at"]["8192"]
    assert account["bytes"] < account["bytes_16bit"] / 6 and account["effective_bits"] <= 2.5


@torch.no_grad()
def test_it_writes_english(artifact):
    model, tokenizer = runtime.load_pretrained(artifact, device="cpu"), AutoTokenizer.from_pretrained(artifact)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert "Paris" in tokenizer.decode(out.sequences[0])
    assert isinstance(out.past_key_values, runtime.QuantizedKVCache)


def test_loss_on_text_that_was_not_calibrated_on(artifact):
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
    found = evaluate(str(artifact), windows=2, seq_len=2048, device="cpu")
    assert found.kl < 0.06 and found.top1_agreement > 0.85 and abs(found.dnll) < 0.08
    assert found.kl > 1e-3  # keys and values were read back quantised
