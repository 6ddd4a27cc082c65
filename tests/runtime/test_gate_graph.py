"""A captured step against calls that it must not be replayed for."""

import copy

import pytest
import torch

pytest.importorskip("triton")
from test_graph import captured, ids_of, make, quick, same  # noqa: F401 - fixtures

from kvfold import KvfoldError


def started(model, ids, **options):
    """A cache whose steps are replayed."""
    cache = model.new_kv_cache()
    model(ids[:, :6], past_key_values=cache, **options)
    for t in range(6, 9):
        model(input_ids=ids[:, t : t + 1], past_key_values=cache)
    return cache


@torch.no_grad()
def test_a_step_with_another_mask_is_the_references_and_the_next_is_replayed(quick, captured):
    ids, found = ids_of(2, 16), []
    for on in (True, False):
        model = make(on)
        cache = started(model, ids)
        mask = torch.ones(2, 10, dtype=torch.long)
        mask[1, 3:5] = 0
        logits = [model(input_ids=ids[:, 9:10], past_key_values=cache, attention_mask=mask).logits]
        mask = torch.ones(2, 11, dtype=torch.long)
        logits.append(
            model(input_ids=ids[:, 10:11], past_key_values=cache, attention_mask=mask).logits
        )
        found.append(logits)
        if on:
            calls = sum(x.calls for x in captured)
            assert calls >= 2 and model.kv_decoding.steps[2] == calls
            model(
                input_ids=ids[:, 11:12],
                past_key_values=cache,
                attention_mask=torch.zeros(2, 12, dtype=torch.long),
            )
            assert sum(x.calls for x in captured) == calls
            with torch.autocast("cpu", dtype=torch.bfloat16):
                model(input_ids=ids[:, 12:13], past_key_values=cache)
            assert sum(x.calls for x in captured) == calls
            model(input_ids=ids[:, 13:14], past_key_values=cache)
            assert sum(x.calls for x in captured) == calls + 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    without = make(False)
    cache = started(without, ids)
    plain = without(input_ids=ids[:, 9:10], past_key_values=cache).logits
    assert float((plain[1] - found[0][0][1]).abs().max()) > 0.01  # the mask matters


def test_what_a_replay_would_not_see(quick, captured):
    model, ids = make(True), ids_of(2, 16)
    with torch.no_grad():
        cache = started(model, ids)
    logits = model(input_ids=ids[:, 9:10], past_key_values=cache).logits
    assert sum(x.calls for x in captured)
    with pytest.raises(KvfoldError, match="Gradients don't pass"):
        logits.sum().backward()
    with pytest.raises(KvfoldError, match="holds 2"):
        model(input_ids=ids[:1, 10:11], past_key_values=cache)
    cache.artifact = "another"
    with pytest.raises(KvfoldError, match="another artifact"):
        model(input_ids=ids[:, 10:11], past_key_values=cache)
    cache.artifact = None
    model.set_attn_implementation("sdpa")
    with pytest.raises(KvfoldError, match="attn_implementation='sdpa'"):
        model(input_ids=ids[:, 10:11], past_key_values=cache)
    assert cache.get_seq_length() == 10


@torch.no_grad()
def test_steps_of_generate_read_no_mask(quick, captured, monkeypatch):
    model, ids, read = make(True), ids_of(2, 12), []
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    real = torch.Tensor.cumsum
    monkeypatch.setattr(
        torch.Tensor,
        "cumsum",
        lambda self, *a, **k: (read.append(self.dtype), real(self, *a, **k))[1],
    )
    model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert read.count(torch.bool) == 1 and sum(x.calls for x in captured) >= 6


@torch.no_grad()
def test_a_copy_of_a_progressive_cache_goes_on_by_itself(quick, captured):
    model, ids = make(True, budget=14_000, progressive=True), ids_of(2, 120)
    cache = model.new_kv_cache()
    model(ids[:, :70], past_key_values=cache)
    for t in range(70, 74):
        model(input_ids=ids[:, t : t + 1], past_key_values=cache)
    twin = copy.deepcopy(cache)
    assert same(cache, twin) and twin.steps.captured is None
    for t in range(74, 110):
        steps = [
            model(input_ids=ids[:, t : t + 1], past_key_values=x).logits for x in (cache, twin)
        ]
        assert torch.equal(*steps) and same(cache, twin) and twin.nbytes <= 14_000
    assert all(
        layer.table.pool.rung(i) < len(layer.rungs) - 1
        for layer in twin.layers
        for i in layer.table.pages()[0][:1]
    )  # lowered
