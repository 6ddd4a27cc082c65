"""Falcon's three layouts of query_key_value, each through the whole product."""

import copy

import pytest
import torch
from conftest import CONFIGS, save_tiny, tiny_model
from family_checks import BOUNDS, IDS, RECIPE, kl, measure
from family_configs import config_of

from kvfold import runtime
from kvfold.autoclass import stock_from_pretrained
from kvfold.compress.models.attention_hook import NAME as TAP
from kvfold.compress.pipeline import compress
from kvfold.errors import KvfoldError
from kvfold.exports.falcon import set_attention

LAYOUTS = {
    "multi-query": {"new_decoder_architecture": False},  # Falcon 7B
    "each head its own": {
        "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "num_kv_heads": 4,
    },
    "grouped": {"num_ln_in_parallel_attn": 1},  # Falcon 40B and 11B
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_what_the_row_says(layout, tmp_path, no_plots, monkeypatch):
    monkeypatch.setitem(CONFIGS, "falcon", lambda: config_of("falcon", **LAYOUTS[layout]))
    found = measure("falcon", tmp_path)
    assert not {
        name: value for name, value in found.items() if not value <= BOUNDS.get(name, value)
    }


@torch.no_grad()
def test_a_loaded_model_gives_its_own_attention_back(tmp_path, text_file, no_plots):
    source = save_tiny(tmp_path / "model", "falcon", torch.float32)
    path = compress(
        str(source), "13", tmp_path / "out", calib=str(text_file), recipe=RECIPE, context=400
    ).path
    expected = stock_from_pretrained(path, dtype=torch.float32)(IDS, use_cache=False).logits
    model = runtime.load_pretrained(path, device="cpu", attention="reference")
    twin = copy.deepcopy(model)
    with runtime.plain_cache(model):
        torch.testing.assert_close(model(IDS).logits, expected)
    packed = model(IDS).logits
    assert 0 < kl(expected, packed) < 0.01 and torch.equal(twin(IDS).logits, packed)
    model.save_pretrained(tmp_path / "again")
    again = runtime.load_pretrained(tmp_path / "again", device="cpu", attention="reference")
    assert torch.equal(again(IDS).logits, packed)
    model.set_attn_implementation("eager")
    with runtime.plain_cache(model):
        weights = model(IDS, output_attentions=True).attentions
    assert len(weights) == model.config.num_hidden_layers and weights[0].shape[-1] == IDS.shape[1]
    with pytest.raises(KvfoldError, match="attn_implementation='eager' reads no packed cache"):
        model(IDS)
    model.set_attn_implementation("kvfold")
    assert torch.equal(model(IDS).logits, packed)
    plain = model.kv_attachment.detach()
    assert type(plain.transformer.h[0].self_attention).__module__.startswith("transformers.")
    torch.testing.assert_close(plain(IDS).logits, expected)


@torch.no_grad()
def test_attention_goes_by_the_interface_and_back():
    model = tiny_model("falcon", torch.float64)
    expected = model(IDS, use_cache=False).logits
    stock = type(model.transformer.h[0].self_attention)
    set_attention(model, TAP)
    assert type(model.transformer.h[0].self_attention) is not stock
    kept = model(IDS[:, :99], use_cache=True).past_key_values
    assert kept.layers[0].keys.shape[1] == 2  # not repeated for each query head
    torch.testing.assert_close(model(IDS, use_cache=False).logits, expected)
    set_attention(model, "eager")
    assert type(model.transformer.h[0].self_attention) is stock
    torch.testing.assert_close(model(IDS, use_cache=False).logits, expected)
