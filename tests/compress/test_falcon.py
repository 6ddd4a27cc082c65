"""Falcon's three layouts of query_key_value, each through the whole product."""

import pytest
import torch
from conftest import CONFIGS, tiny_model
from family_checks import BOUNDS, IDS, measure
from family_configs import config_of

from kvfold.compress.models.attention_hook import NAME as TAP
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
