"""A whole model with `attention="triton"` against the plain-torch reference, under the interpreter where there is no GPU."""

import pytest
import torch
from conftest import TINY_RECIPE, char_tokenizer, save_tiny

from kvfold import runtime
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXTS = ["of", "the cache of a long sequence holds keys and values for every token"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("triton")
    (folder / "recipe.yaml").write_text(TINY_RECIPE.replace("page_tokens: 8", "page_tokens: 16"))
    source, recipe = save_tiny(folder / "model"), load_recipe(folder / "recipe.yaml")
    return compress(str(source), "6.0", folder / "artifact", calib=str(text_file), recipe=recipe).path


@pytest.fixture(scope="module")
def models(artifact):
    names = ("reference", "triton")
    return [runtime.load_pretrained(artifact, device=DEVICE, dtype=torch.float32, attention=name) for name in names]


def batch_of(texts):
    tokenizer = char_tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer(texts, return_tensors="pt", padding=True).to(DEVICE)


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


@torch.no_grad()
def test_logits_are_the_references(models):
    ids = batch_of(TEXTS[1:]).input_ids
    logits = [model(ids).logits for model in models]
    assert error(logits[1], logits[0]) < 1e-2
    caches = [model(ids[:, :56]).past_key_values for model in models]  # the next page comes due at token 59
    for t in range(56, 62):
        logits = [
            model(ids[:, t : t + 1], past_key_values=cache).logits for model, cache in zip(models, caches, strict=True)
        ]
        assert error(logits[1], logits[0]) < 1e-2
    assert caches[0].nbytes == caches[1].nbytes
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert one.length == other.length == [62]
        assert one.num_pages() == other.num_pages() == 2


@torch.no_grad()
def test_greedy_text_is_the_references_row_by_row(models):
    batch, options = batch_of(TEXTS), {"max_new_tokens": 6, "do_sample": False}
    together = models[1].generate(**batch, **options)
    for text, row in zip(TEXTS, together, strict=True):
        alone = batch_of([text])
        expected = models[0].generate(**alone, **options)[0, -6:]
        assert torch.equal(row[-6:], expected)
        assert torch.equal(models[1].generate(**alone, **options)[0, -6:], expected)
