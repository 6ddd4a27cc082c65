"""What kvfold puts on a model, and that `detach` takes all of it off again."""

import copy

import pytest
import torch
from transformers import DynamicCache

from kvfold import runtime
from kvfold.exports.reader import read_artifact
from kvfold.runtime.attachment import attach
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.load import read_model

IDS = torch.arange(1, 40)[None] % 100


def surface(model):
    """What a model and its base model have besides their weights."""
    base = model.base_model
    hooks = len(base._forward_hooks), len(base._forward_pre_hooks)
    return set(vars(model)), set(vars(base)), hooks, model.config._attn_implementation


@pytest.fixture
def plain(tiny_artifact):
    return read_model(read_artifact(tiny_artifact), torch.float32).eval()


@torch.no_grad()
def test_a_model_is_transformers_own_again(plain, tiny_artifact):
    before, logits = surface(plain), plain(IDS).logits
    text = plain.generate(IDS, max_new_tokens=5, do_sample=False)
    model = attach(plain, read_artifact(tiny_artifact))
    assert model is plain and surface(model) != before
    assert isinstance(model(IDS).past_key_values, QuantizedKVCache)
    assert model.kv_attachment.detach() is plain and surface(plain) == before
    out = plain(IDS)
    assert torch.equal(out.logits, logits) and isinstance(out.past_key_values, DynamicCache)
    assert torch.equal(plain.generate(IDS, max_new_tokens=5, do_sample=False), text)
    with pytest.raises(Exception, match="this one is not"):
        runtime.load_cache(tiny_artifact / "none", plain)


@torch.no_grad()
def test_it_can_be_attached_again(plain, tiny_artifact):
    artifact = read_artifact(tiny_artifact)
    logits = attach(plain, artifact)(IDS).logits
    plain.kv_attachment.detach()
    assert torch.equal(attach(plain, artifact)(IDS).logits, logits)


@torch.no_grad()
def test_what_somebody_had_put_there_before_comes_back(plain, tiny_artifact):
    def mine(*args, **kwargs):
        raise AssertionError

    plain.save_pretrained = mine
    attach(plain, read_artifact(tiny_artifact))
    assert plain.save_pretrained is not mine
    plain.kv_attachment.detach()
    assert plain.save_pretrained is mine


@torch.no_grad()
def test_a_copy_is_detached_alone(plain, tiny_artifact):
    model = attach(plain, read_artifact(tiny_artifact))
    logits, twin = model(IDS).logits, copy.deepcopy(model)
    assert twin.kv_attachment is not model.kv_attachment
    twin.kv_attachment.detach()
    assert isinstance(twin(IDS).past_key_values, DynamicCache)
    assert torch.equal(model(IDS).logits, logits)
    assert isinstance(model(IDS).past_key_values, QuantizedKVCache)


@torch.no_grad()
def test_a_plain_cache_of_a_copy_leaves_the_other_packed(plain, tiny_artifact):
    model = attach(plain, read_artifact(tiny_artifact))
    twin = copy.deepcopy(model)
    with runtime.plain_cache(twin):
        assert isinstance(twin(IDS).past_key_values, DynamicCache)
        assert isinstance(model(IDS).past_key_values, QuantizedKVCache)
    assert isinstance(twin(IDS).past_key_values, QuantizedKVCache)
