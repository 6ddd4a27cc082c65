"""The main job on SmolLM2-135M: `make test ARGS="-m real -n 0"`. Minutes, and its weights come from the package index."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

import kvfold.compress
from kvfold import runtime
from kvfold.compress.evaluate import evaluate
from kvfold.exports.reader import read_artifact
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import raw16
from kvfold.runtime.load import attach, plain_cache, stock_from_pretrained

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


LENGTHS = [420, 333, 190, 37]  # tokens: the first two reach far into pages, the last one has none
NEW = 24


def prompts(artifact):
    """Prose of these lengths, padded on the left."""
    text = (Path(kvfold.compress.__file__).parent / "data" / "heldout.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    found = tokenizer(text, return_tensors="pt").input_ids[0]
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, n in enumerate(LENGTHS):
        ids[b, -n:], mask[b, -n:] = found[1000 * b : 1000 * b + n], 1
    return ids, mask


def greedy(model, ids, mask=None, **options):
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)


def in_16_bit_pages(artifact, page_tokens=32):
    """The artifact's model on a cache whose pages hold 16 bits. In pages of few bits, a sum that is rounded otherwise, as in a
    batch of another size, turns codes now and then, and a near tie in the logits can go the other way."""
    stored = read_artifact(artifact)
    dim = stored.geometry.head_dim
    specs = [LayerSpec(KeySpec(raw16(dim)), ValueSpec(raw16(dim)))] * len(stored.specs)
    model = stock_from_pretrained(stored.path, dtype=torch.float32)
    geometry = replace(stored.geometry, page_tokens=page_tokens)
    return attach(model, SimpleNamespace(specs=specs, geometry=geometry, metadata=stored.metadata))


def rms(x):
    return float(x.square().mean().sqrt())


@torch.no_grad()
def test_a_left_padded_batch_writes_what_each_row_writes_alone(artifact):
    model = in_16_bit_pages(artifact)
    ids, mask = prompts(artifact)
    together = greedy(model, ids, mask)
    for b, n in enumerate(LENGTHS):
        assert together[b, -NEW:].tolist() == greedy(model, ids[b : b + 1, -n:])[0, -NEW:].tolist()


@torch.no_grad()
def test_a_batch_moves_logits_by_far_less_than_quantisation(artifact):
    model = runtime.load_pretrained(artifact, device="cpu")
    ids, mask = prompts(artifact)
    together = model(ids, attention_mask=mask).logits
    for b, n in enumerate(LENGTHS):
        row = ids[b : b + 1, -n:]
        alone = model(row).logits[0]
        with plain_cache(model):
            unquantised = model(row).logits[0]
        assert rms(together[b, -n:] - alone) < 0.3 * rms(unquantised - alone) + 1e-3


@torch.no_grad()
def test_beams_do_not_depend_on_the_size_of_pages(artifact):
    ids, _ = prompts(artifact)
    found = [greedy(in_16_bit_pages(artifact, page), ids[1:2, -LENGTHS[1] :], num_beams=3) for page in (32, 48)]
    assert torch.equal(*found)


@torch.no_grad()
def test_crop_and_continue_is_never_having_generated(artifact):
    model = runtime.load_pretrained(artifact, device="cpu", rollback=64)
    ids, _ = prompts(artifact)
    ids, more = ids[:1], ids[1:2, -50:]
    fresh, used = model(ids).past_key_values, model(ids).past_key_values
    greedy(model, torch.cat((ids, more[:, :10]), 1), past_key_values=used)
    pages = used.layers[0].state[0, 1].item()
    used.crop(ids.shape[1])
    assert used.layers[0].state[0, 1].item() < pages and used.nbytes == fresh.nbytes
    for part in (more[:, :1], more[:, 1:]):
        assert torch.equal(model(part, past_key_values=used).logits, model(part, past_key_values=fresh).logits)


@torch.no_grad()
def test_prompt_lookup_writes_greedy_text(artifact):
    model = in_16_bit_pages(artifact)
    ids, _ = prompts(artifact)
    assert torch.equal(greedy(model, ids[:1], prompt_lookup_num_tokens=10), greedy(model, ids[:1]))
