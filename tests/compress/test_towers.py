"""Models of images and text: the language model's cache is packed, the rest is as it was. (What
every family is asked is asked of them in test_more_families.py.)"""

from functools import partial

import pytest
import torch
from conftest import CONFIGS, save_tiny, tiny_model
from family_checks import RECIPE, kl
from family_configs import IMAGE, TOWERS

from kvfold import KvfoldError, runtime
from kvfold.autoclass import stock_from_pretrained
from kvfold.compress.evaluate import evaluate
from kvfold.compress.pipeline import compress
from kvfold.compress.targets.engines import export_compressed_tensors
from kvfold.compress.targets.onnx import export_onnx

pytestmark = pytest.mark.usefixtures("no_plots")


def packed(family, folder, text):
    source = save_tiny(folder / "model", family, torch.float32)
    (source / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor"}'
    )
    compress(str(source), "13", folder / "out", calib=str(text), recipe=RECIPE, context=400)
    return source, folder / "out"


def with_image(family):
    """Text around an image, as a processor would give both."""
    generator = torch.Generator().manual_seed(5)
    ids, pixels = (
        torch.randint(32, 127, (1, 90), generator=generator),
        torch.randn(1, 3, 28, 28, generator=generator),
    )
    ids[0, 20 : 20 + TOWERS[family][2]] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if family.startswith("qwen"):  # patches in rows, and how many there are of each axis
        inputs["pixel_values"] = torch.randn(16, 3 * 2 * 7 * 7, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if family == "gemma4":  # patches in rows, and where they stand
        inputs["pixel_values"] = torch.rand(1, 16, 3 * 7 * 7, generator=generator)
        places = torch.arange(16)
        inputs["image_position_ids"] = torch.stack((places % 4, places // 4), -1)[None]
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if family in ("mistral3", "llava_next"):
        inputs["image_sizes"] = torch.tensor([[28, 28]])
    if family in ("idefics3", "smolvlm", "llava_next"):
        inputs["pixel_values"] = pixels[None]
    return inputs


@torch.no_grad()
@pytest.mark.parametrize(
    "family",
    [
        "llava",
        "mistral3",
        "internvl",
        "smolvlm",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "gemma4",
    ],
)
def test_an_image_is_read_through_packed_pages(family, tmp_path, text_file):
    _, path = packed(family, tmp_path, text_file)
    inputs = with_image(family)
    expected = tiny_model(family, attention="eager")(**inputs, use_cache=False).logits
    model = runtime.load_pretrained(path, device="cpu", attention="reference")
    assert kl(expected, model(**inputs).logits) < 0.05
    blind = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert kl(expected, blind) > 0.1  # it is looked at
    padded = {
        name: torch.nn.functional.pad(x, (13, 0)) if x.shape == inputs["input_ids"].shape else x
        for name, x in inputs.items()
    }
    assert (
        kl(expected, model(**padded).logits[:, 13:]) < 0.05
    )  # padding on the left moves no position
    out = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )
    assert (
        isinstance(out.past_key_values, runtime.QuantizedKVCache)
        and out.past_key_values.get_seq_length() == 94
    )


@torch.no_grad()
def test_an_image_that_looks_both_ways_is_refused(tmp_path, text_file):
    _, path = packed("gemma3", tmp_path, text_file)
    inputs = with_image("gemma3")
    model = runtime.load_pretrained(path, device="cpu", attention="reference")
    for extra in ({}, {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}):
        with pytest.raises(KvfoldError, match="look at later ones in a 'gemma3' model"):
            model(**inputs, **extra)
    none = torch.zeros_like(inputs["input_ids"])  # as a processor says of text alone
    assert torch.equal(
        model(inputs["input_ids"][:, :20], token_type_ids=none[:, :20]).logits,
        model(inputs["input_ids"][:, :20]).logits,
    )
    with runtime.plain_cache(model):
        expected = tiny_model("gemma3", attention="eager")(**inputs).logits
        assert kl(expected, model(**inputs).logits) < 1e-6


@torch.no_grad()
def test_images_of_larger_gemma4_models_look_both_ways(tmp_path, text_file, monkeypatch):
    made = CONFIGS["gemma4"]()
    made.text_config.use_bidirectional_attention = "vision"
    monkeypatch.setitem(CONFIGS, "gemma4", lambda: made)
    _, path = packed("gemma4", tmp_path, text_file)
    inputs, plain = with_image("gemma4"), tiny_model("gemma4", attention="eager")
    model = runtime.load_pretrained(path, device="cpu", attention="reference")
    with pytest.raises(KvfoldError, match="look at later ones in a 'gemma4' model"):
        model(**inputs)
    ids = inputs["input_ids"][:, 25:]
    assert kl(plain(ids, use_cache=False).logits, model(ids).logits) < 0.05


def test_other_towers_and_processor_files_are_copied(tmp_path, text_file):
    source, path = packed("mistral3", tmp_path, text_file)
    assert (path / "preprocessor_config.json").read_bytes() == (
        source / "preprocessor_config.json"
    ).read_bytes()
    runtime.load_pretrained(
        path, device="cpu", attention="reference"
    )  # reads what is signed, and nothing else
    old, new = (
        stock_from_pretrained(folder, dtype=torch.float32).state_dict() for folder in (source, path)
    )
    changed = {name.split(".")[-2] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"v_proj", "o_proj"} and set(old) == set(new)
    for export in (
        partial(export_onnx, form="16bit", bits=None),
        partial(export_compressed_tensors, strategy="tensor"),
    ):
        with pytest.raises(KvfoldError, match=r"'mistral3'.* cannot be expressed"):
            export(path, tmp_path / "other", calib=None, device=torch.device("cpu"))
    figures = evaluate(
        str(path), against=str(source), text=str(text_file), windows=1, seq_len=160, device="cpu"
    )
    assert 0 < figures.kl < 0.1
