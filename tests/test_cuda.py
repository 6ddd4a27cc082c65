"""The same artifact on a GPU: compress, load and generate there, and agree with the CPU."""

import pytest
import torch
from conftest import char_tokenizer, save_tiny

from kvfold import runtime
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TEXT = "the cache of a long sequence holds keys and values for every token that was read before and after it all"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_gpu_agrees_with_cpu(family, dtype, tmp_path, text_file, recipe_file):
    source = save_tiny(tmp_path / "model", family)
    artifact = compress(
        str(source), "6.0", tmp_path / "out", calib=str(text_file), recipe=load_recipe(recipe_file), device="cuda"
    )
    ids = char_tokenizer()(TEXT, return_tensors="pt").input_ids
    on_cpu = runtime.load_pretrained(artifact.path, device="cpu")(ids)
    model = runtime.load_pretrained(artifact.path, device="cuda", dtype=dtype)
    out = model(ids.cuda())
    error = (out.logits.float().cpu() - on_cpu.logits).square().mean().sqrt() / on_cpu.logits.square().mean().sqrt()
    assert float(error) < (0.02 if dtype == torch.float32 else 0.3)
    assert out.past_key_values.nbytes == on_cpu.past_key_values.nbytes
    assert model.generate(ids.cuda(), max_new_tokens=40, do_sample=False).shape == (1, len(TEXT) + 40)
    peak = torch.cuda.memory_allocated()
    del out
    assert torch.cuda.memory_allocated() < peak  # a cache that goes out of use frees its memory
