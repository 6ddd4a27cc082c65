"""PyTorch's ambient modes around a packed cache: gradients, inference mode, autocast, default types
and devices."""

import pytest
import torch
from differential import DIM, SPEC, packed_model, stock_model
from test_gate import IDS, PATHS, model_on

from kvfold import KvfoldError, runtime
from kvfold.kernels.key_mean import turn_tables
from kvfold.kernels.quantizer import encode


@pytest.mark.parametrize("path", PATHS)
def test_a_backward_pass_says_how(path):
    model = model_on(path, window=6)
    with pytest.raises(KvfoldError, match=r"runtime\.plain_cache\(model\)"):
        model(IDS, labels=IDS).loss.backward()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    values = model.model.layers[0].self_attn.v_proj.weight.requires_grad_(
        True
    )  # queries have no gradient here
    with pytest.raises(KvfoldError, match="Gradients don't pass"):
        model(IDS, labels=IDS).loss.backward()
    with runtime.plain_cache(model):
        model(IDS, labels=IDS).loss.backward()
    stock = stock_model("llama")
    stock(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(values.grad, stock.model.layers[0].self_attn.v_proj.weight.grad)


def test_gradients_of_a_plain_cache_with_a_soft_cap():
    model, stock = packed_model("gemma2"), stock_model("gemma2")
    with runtime.plain_cache(model):
        model(IDS, labels=IDS).loss.backward()
    stock(IDS, labels=IDS).loss.backward()
    for own, other in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_a_prompt_in_inference_mode_and_steps_outside(path):
    model = model_on(path, window=6)
    with torch.no_grad():
        want = model(IDS[:, :1], past_key_values=model(IDS).past_key_values).logits
    with torch.inference_mode():
        cache = model(IDS).past_key_values
        cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1]))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[:, :1], past_key_values=cache).logits, want)
        assert model.generate(
            torch.cat((IDS, IDS[:, :3]), 1), past_key_values=cache, max_new_tokens=2, pad_token_id=0
        ).shape == (1, 31)


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_types_change_no_number(path, dtype):
    """With pages and not only a window, and with all that is made at first use made under the other
    default."""

    def logits():
        model = model_on(path, window=6)
        turn_tables.cache_clear()
        prompt = model(IDS)
        return prompt.logits, model(IDS[:, :1], past_key_values=prompt.past_key_values).logits

    want = logits()
    torch.set_default_dtype(dtype)
    try:
        got = logits()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_default_device_takes_no_tensor_of_the_cache():
    cache = model_on("reference", window=6).new_kv_cache()
    states = torch.randn(2, 1, 1, 40, DIM, generator=torch.Generator().manual_seed(1))
    torch.set_default_device("meta")
    try:
        cache.note_padding(None, 1)
        cache.update(*states, 0)
        cache.crop(-20)
        cache.batch_repeat_interleave(2)
    finally:
        torch.set_default_device(None)
    assert cache.nbytes and all(x.device.type == "cpu" for x in cache.layers[0].tensors())


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
def test_autocast(path):
    model = model_on(path, window=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model(IDS).past_key_values
        got = model(IDS[:, :1], past_key_values=cache).logits
    want = model(IDS[:, :1], past_key_values=model(IDS).past_key_values).logits
    assert float((got.float() - want).abs().max()) < 0.2 * float(want.std())


def test_the_quantiser_has_no_default_type():
    x, fmt = torch.randn(4, 256, DIM, generator=torch.Generator().manual_seed(1)), SPEC.key.format
    want = encode(x, fmt)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = encode(x, fmt)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)
