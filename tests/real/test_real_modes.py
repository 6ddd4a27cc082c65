"""Ways to generate, on a real model: batches, beams, crop, prompt lookup."""

import pytest
import torch
from real_artifact import greedy, in_16_bit_pages, padded, prose, rms

from kvfold import runtime
from kvfold.runtime.load import plain_cache

pytest_plugins = ("real_artifact",)
pytestmark = pytest.mark.real

LENGTHS = [420, 333, 190, 37]  # tokens: the first two reach far into pages, the last one has none


@pytest.fixture(scope="module")
def prompts(real_artifact):
    return padded(prose(real_artifact), LENGTHS)


@torch.no_grad()
def test_a_left_padded_batch_writes_what_each_row_writes_alone(real_artifact, prompts):
    model = in_16_bit_pages(real_artifact)
    ids, mask = prompts
    together = greedy(model, ids, mask)[:, ids.shape[1] :]
    for b, n in enumerate(LENGTHS):
        assert together[b].tolist() == greedy(model, ids[b : b + 1, -n:])[0, n:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_batch_moves_logits_by_far_less_than_quantisation(real_artifact, prompts, dtype):
    """In float64 any row, with nothing added to the bound. In float32 a row that has no page
    differs from 16 bits by how its own 16 bits are rounded, and from itself in a batch likewise:
    there rows with pages are judged."""
    model = runtime.load_pretrained(real_artifact, device="cpu", dtype=dtype)
    ids, mask = prompts
    pages = [model.kv_artifact.geometry.num_pages(n) for n in LENGTHS]
    assert pages[0] > pages[1] > 1 and not pages[3]
    together = model(ids, attention_mask=mask).logits
    for b, n in enumerate(LENGTHS):
        row = ids[b : b + 1, -n:]
        alone = model(row).logits[0]
        with plain_cache(model):
            unquantised = model(row).logits[0]
        moved, quantised = rms(together[b, -n:] - alone), rms(unquantised - alone)
        if dtype == torch.float64:
            assert moved < 0.3 * quantised
        elif pages[b]:
            assert moved < 0.3 * quantised + 1e-3


@torch.no_grad()
def test_beams_do_not_depend_on_the_size_of_pages(real_artifact, prompts):
    ids = prompts[0][1:2, -LENGTHS[1] :]
    found = [greedy(in_16_bit_pages(real_artifact, page), ids, num_beams=3) for page in (32, 48)]
    assert torch.equal(*found)


@torch.no_grad()
def test_crop_and_continue_is_never_having_generated(real_artifact, prompts):
    model = runtime.load_pretrained(real_artifact, device="cpu", rollback=64)
    ids, more = prompts[0][:1], prompts[0][1:2, -50:]
    fresh, used = model(ids).past_key_values, model(ids).past_key_values
    greedy(model, torch.cat((ids, more[:, :10]), 1), past_key_values=used)
    pages = used.layers[0].table.state[0, 1].item()
    used.crop(ids.shape[1])
    assert used.layers[0].table.state[0, 1].item() < pages and used.nbytes == fresh.nbytes
    for part in (more[:, :1], more[:, 1:]):
        assert torch.equal(
            model(part, past_key_values=used).logits, model(part, past_key_values=fresh).logits
        )


@torch.no_grad()
def test_prompt_lookup_writes_greedy_text(real_artifact, prompts):
    model, ids = in_16_bit_pages(real_artifact), prompts[0][:1]
    assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=10), greedy(model, ids))
