"""A whole model with `attention="triton"` against the plain-torch reference, under the interpreter where there is no GPU."""

from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGS, SHAPE, TINY_RECIPE, char_tokenizer, save_tiny
from transformers import LlamaConfig

from kvfold import KvfoldError, runtime
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.exports.account import Geometry
from kvfold.runtime.load import choose_triton

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {**SHAPE, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}  # the interpreter is slow
TEXTS = ["of it", "the cache of a long sequence holds keys and values for it"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("triton")
    (folder / "recipe.yaml").write_text(TINY_RECIPE.replace("page_tokens: 8", "page_tokens: 16"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "llama", lambda: LlamaConfig(**SMALL))
        source = save_tiny(folder / "model")
    recipe = load_recipe(folder / "recipe.yaml")
    path = compress(str(source), "9.0", folder / "artifact", calib=str(text_file), recipe=recipe).path
    names = ("reference", "triton")
    return [runtime.load_pretrained(path, device=DEVICE, dtype=torch.float32, attention=name) for name in names]


def batch_of(texts):
    tokenizer = char_tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer(texts, return_tensors="pt", padding=True).to(DEVICE)


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


@torch.no_grad()
def test_logits_are_the_references(models):
    """A prompt, steps, a chunk, a step: pages come due at 43, 59 and 75 tokens, in a step, the chunk and a step."""
    assert [model.kv_triton for model in models] == [False, True]
    ids = batch_of([TEXTS[1] * 2]).input_ids
    caches, start = [None, None], 0
    for end in (40, 41, 42, 43, 44, 73, 74, 75):
        outs = [model(ids[:, start:end], past_key_values=cache) for model, cache in zip(models, caches, strict=True)]
        caches, start = [out.past_key_values for out in outs], end
        assert error(outs[1].logits, outs[0].logits) < 1e-2
        assert caches[0].nbytes == caches[1].nbytes
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert one.state.tolist() == other.state.tolist() == [[75, 3]]
        assert one.length == other.length == [75]


@torch.no_grad()
def test_greedy_text_is_the_references_row_by_row(models):
    """Left-padded rows of a batch, by kernels, against each row alone by the reference."""
    options = {"max_new_tokens": 4, "do_sample": False}
    together = models[1].generate(**batch_of(TEXTS), **options)
    for text, row in zip(TEXTS, together, strict=True):
        assert torch.equal(row[-4:], models[0].generate(**batch_of([text]), **options)[0, -4:])


@pytest.mark.parametrize(
    ("family", "page", "reason"),
    [
        ("gemma2", 16, "'gemma2' bends its logits"),
        ("gpt_oss", 16, "'gpt_oss' bends its logits"),
        ("llama", 24, "page_tokens is 24"),
        ("llama", 256, "page_tokens is 256"),
    ],
)
def test_what_kernels_lack_is_left_to_the_reference(family, page, reason, caplog):
    config, gpu = CONFIGS[family](), torch.device("cuda")
    artifact = SimpleNamespace(geometry=Geometry(2, 16, 3, 24, page))
    with caplog.at_level("WARNING", logger="kvfold"):
        assert not choose_triton("auto", gpu, artifact, config)
    assert reason in caplog.text
    with pytest.raises(KvfoldError, match=f"attention='triton' can't be used: {reason}"):
        choose_triton("triton", gpu, artifact, config)
    assert choose_triton("auto", gpu, SimpleNamespace(geometry=Geometry(2, 16, 3, 24, 128)), CONFIGS["llama"]())
    assert not choose_triton("reference", gpu, artifact, config)
    assert not choose_triton("auto", torch.device("cpu"), artifact, config)
