"""The main job on SmolLM2-135M: `make test ARGS="-m real --dist loadfile"`. Minutes, and its
weights come from the package index."""

import json
import os

import pytest
import torch
from real_artifact import BUDGET, GIVEN, MODEL
from transformers import AutoTokenizer

from kvfold import runtime
from kvfold.compress.evaluate import evaluate

pytest_plugins = ("real_artifact",)
pytestmark = pytest.mark.real


@torch.no_grad()
def test_bytes_are_the_predicted_ones(real_artifact):
    account = json.loads((real_artifact / "kv_cache.json").read_text())["account"]
    model = runtime.load_pretrained(real_artifact, device="cpu")
    ids = torch.randint(
        0, model.config.vocab_size, (1, 2048), generator=torch.Generator().manual_seed(0)
    )
    assert model(ids, logits_to_keep=1).past_key_values.nbytes == account["bytes_at"]["2048"]
    assert account["bytes"] == account["bytes_at"][str(account["at"])]
    if not GIVEN:
        assert account["bytes"] < account["bytes_16bit"] / 6 and account["effective_bits"] <= float(
            BUDGET
        )
    if MODEL == "smollm2-135m":
        assert account["at"] == 8192


@torch.no_grad()
def test_it_writes_english(real_artifact):
    model, tokenizer = (
        runtime.load_pretrained(real_artifact, device="cpu"),
        AutoTokenizer.from_pretrained(real_artifact),
    )
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert "Paris" in tokenizer.decode(out.sequences[0])
    assert isinstance(out.past_key_values, runtime.QuantizedKVCache)


def test_loss_on_text_that_was_not_calibrated_on(real_artifact):
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
    found = evaluate(str(real_artifact), windows=2, seq_len=2048, device="cpu")
    assert found.kl < 0.06 and found.top1_agreement > 0.85 and abs(found.dnll) < 0.08
    assert found.kl > 1e-3  # keys and values were read back quantised
