"""A whole model with `attention="triton"` against the plain-torch reference, under the interpreter
where there is no GPU."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGS, SHAPE, TINY_RECIPE, char_tokenizer, save_tiny, tiny_model
from transformers import Gemma2Config, GptOssConfig, LlamaConfig

from kvfold import KvfoldError, runtime
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import ARCHITECTURES
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, uniform
from kvfold.runtime.backends.choose import backend_of, choose_triton
from kvfold.runtime.backends.transformers import NAME
from kvfold.runtime.cache.cache import QuantizedKVCache

pytest.importorskip("triton")
from kvfold.runtime.backends import triton as runtime_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {
    **SHAPE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # the interpreter is slow
TEXTS = ["of it", "the cache of a long sequence holds keys and values for it"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("triton")
    (folder / "recipe.yaml").write_text(TINY_RECIPE.replace("page_tokens: 8", "page_tokens: 16"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "llama", lambda: LlamaConfig(**SMALL))
        source = save_tiny(folder / "model")
    recipe = load_recipe(folder / "recipe.yaml")
    path = compress(
        str(source), "9.0", folder / "artifact", calib=str(text_file), recipe=recipe
    ).path
    names = ("reference", "triton")
    return [
        runtime.load_pretrained(path, device=DEVICE, dtype=torch.float32, attention=name)
        for name in names
    ]


def batch_of(texts):
    tokenizer = char_tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer(texts, return_tensors="pt", padding=True).to(DEVICE)


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(params=[1, 256])
def least_rows(request, monkeypatch):
    """From how many rows of queries on pages are decoded: for any call, and for none of these."""
    monkeypatch.setattr(runtime_triton, "LEAST_ROWS", request.param)


@torch.no_grad()
@pytest.mark.usefixtures("least_rows")
def test_logits_are_the_references(models):
    """A prompt, steps, a chunk, a step: pages come due at 43, 59 and 75 tokens, in a step, the
    chunk and a step."""
    assert [model.kv_triton for model in models] == [False, True]
    ids = batch_of([TEXTS[1] * 2]).input_ids
    caches, start = [None, None], 0
    for end in (40, 41, 42, 43, 44, 73, 74, 75):
        outs = [
            model(ids[:, start:end], past_key_values=cache)
            for model, cache in zip(models, caches, strict=True)
        ]
        caches, start = [out.past_key_values for out in outs], end
        assert error(outs[1].logits, outs[0].logits) < 1e-2
        assert caches[0].nbytes == caches[1].nbytes
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert one.table.state.tolist() == other.table.state.tolist() == [[75, 3]]
        assert one.lengths() == other.lengths() == [75]


@torch.no_grad()
def test_more_sinks_than_a_block_of_rows_has(models):
    """A padded prompt and a step; an artifact has 64 sinks by default."""
    batch = batch_of([TEXTS[1], TEXTS[1] * 2])
    outs = []
    for model in models:
        geometry = replace(model.kv_artifact.geometry, sinks=40)
        cache = QuantizedKVCache(
            model.kv_artifact.specs, geometry, backend=backend_of(model.kv_triton)
        )
        cut = batch.input_ids.shape[1] - 1
        first = model(
            batch.input_ids[:, :cut],
            attention_mask=batch.attention_mask[:, :cut],
            past_key_values=cache,
        )
        last = model(
            batch.input_ids[:, cut:], attention_mask=batch.attention_mask, past_key_values=cache
        )
        outs.append((first.logits * batch.attention_mask[:, :cut, None], last.logits))
    for one, other in zip(*outs, strict=True):
        # a code between two levels is rounded either way by sums in another order, and where a scale
        # tips, a token's codes with it
        assert error(other, one) < 3e-2


@torch.no_grad()
def test_a_prompt_whose_pages_are_decoded(models, monkeypatch):
    """In chunks of queries, of a padded batch: the second ones read pages that the same call
    packed."""
    monkeypatch.setattr(runtime_triton, "QUERY_CHUNK", 48)
    monkeypatch.setattr(runtime_triton, "LEAST_ROWS", 1)
    seen = []
    real = runtime_triton.page_runs
    monkeypatch.setattr(
        runtime_triton, "page_runs", lambda *args: seen.append(real(*args)) or seen[-1]
    )
    batch = batch_of([TEXTS[1] + TEXTS[0], TEXTS[1] * 2])
    logits = [model(**batch).logits[batch.attention_mask.bool()] for model in models]
    assert error(logits[1], logits[0]) < 1e-2
    lengths = batch.attention_mask.sum(1).tolist()
    g = models[0].kv_artifact.geometry
    expected = [
        [g.num_pages(min(start + 48, n))] if g.num_pages(min(start + 48, n)) else []
        for n in lengths
        for start in range(0, n, 48)
    ]
    assert [[run.end for run in runs] for runs in seen] == expected * 2
    assert expected != [[]] * len(expected)


@torch.no_grad()
@pytest.mark.usefixtures("least_rows")
def test_pages_of_several_rungs_are_the_references(models, tmp_path):
    """A prompt, steps and a chunk under a budget that lowers pages on the way."""
    path = models[0].kv_artifact.path
    options = {
        "device": DEVICE,
        "dtype": torch.float32,
        "policy": "progressive",
        "kv_budget": 21_000,
    }
    pair = [
        runtime.load_pretrained(path, attention=name, **options) for name in ("reference", "triton")
    ]
    assert [model.kv_triton for model in pair] == [False, True]
    ids = batch_of([TEXTS[1] * 3]).input_ids
    caches, start, seen = [None, None], 0, set()
    for end in (74, 75, 76, 91, 92, 107, 108, 123, 124):
        outs = [
            model(ids[:, start:end], past_key_values=cache)
            for model, cache in zip(pair, caches, strict=True)
        ]
        caches, start = [out.past_key_values for out in outs], end
        assert error(outs[1].logits, outs[0].logits) < 1e-2
        assert caches[0].nbytes == caches[1].nbytes <= 21_000
        assert [x.table.pool.counts for x in caches[0].layers] == [
            x.table.pool.counts for x in caches[1].layers
        ]
        seen |= {tuple(layer.table.pool.counts) for layer in caches[1].layers}
    assert any(sum(count > 0 for count in counts) > 1 for counts in seen)


@torch.no_grad()
@pytest.mark.usefixtures("least_rows")
def test_greedy_text_is_the_references_row_by_row(models):
    """Left-padded rows of a batch, by kernels, against each row alone by the reference: the same
    logits, and so the same tokens, up to one that sums in another order tip."""
    options = {
        "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    together = models[1].generate(**batch_of(TEXTS), **options)
    for i, text in enumerate(TEXTS):
        alone = models[0].generate(**batch_of([text]), **options)
        for step, (got, expected) in enumerate(zip(together.logits, alone.logits, strict=True)):
            assert error(got[i], expected[0]) < 1e-2
            token, own = together.sequences[i, step - 4], alone.sequences[0, step - 4]
            if token != own:
                assert expected[0, own] - expected[0, token] < 1e-2 * expected[0].abs().max()
                break


@pytest.mark.parametrize("page", [24, 256])
def test_what_kernels_lack_is_left_to_the_reference(page, caplog):
    gpu, reason = torch.device("cuda"), f"page_tokens is {page}"
    artifact = SimpleNamespace(geometry=Geometry(2, 16, 3, 24, page))
    with caplog.at_level("WARNING", logger="kvfold"):
        assert not choose_triton("auto", gpu, artifact)
    assert reason in caplog.text
    with pytest.raises(KvfoldError, match=f"attention='triton' can't be used: {reason}"):
        choose_triton("triton", gpu, artifact)
    assert choose_triton("auto", gpu, SimpleNamespace(geometry=Geometry(2, 16, 3, 24, 128)))
    for dim in (8, 1024):
        assert not choose_triton("auto", gpu, SimpleNamespace(geometry=Geometry(2, dim, 3, 24, 32)))
    assert not choose_triton("reference", gpu, artifact)
    assert not choose_triton("auto", torch.device("cpu"), artifact)


FULL_AND_SLIDING = {"layer_types": ["full_attention", "sliding_attention"]}
BENT = {
    "gemma2": Gemma2Config(
        **SMALL, **FULL_AND_SLIDING, sliding_window=40, query_pre_attn_scalar=24, attn_logit_softcapping=4.0,
        final_logit_softcapping=5.0, pad_token_id=0, tie_word_embeddings=False,
    ),
    "gpt_oss": GptOssConfig(
        **SMALL, **FULL_AND_SLIDING, sliding_window=40, pad_token_id=0, num_local_experts=2, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}  # fmt: skip


def offset_specs(heads, dim):
    """Two layers whose keys are stored less an offset, one of them through a matrix."""
    generator = torch.Generator().manual_seed(2)
    offset = torch.randn(heads, dim, generator=generator)
    matrix = torch.eye(dim) + 0.2 * torch.randn(heads, dim, dim, generator=generator)
    keys = [
        KeySpec(Format(((dim, 256),), "scale", "fp16"), ("offset",), m, offset)
        for m in (None, matrix.contiguous())
    ]
    return [LayerSpec(key, ValueSpec(uniform(dim, 256, "fp16"))) for key in keys]


@torch.no_grad()
@pytest.mark.usefixtures("least_rows")
@pytest.mark.parametrize("family", BENT)
def test_models_that_bend_their_logits(family, monkeypatch):
    """A soft-cap and sink logits see what an offset takes off the keys: prompt, chunk and steps, a
    padded row, windows."""
    monkeypatch.setitem(CONFIGS, family, lambda: BENT[family])
    model = tiny_model(family).to(DEVICE)
    model.set_attn_implementation(NAME)
    for attention in ARCHITECTURES[family].attention_modules(model):
        if family == "gpt_oss":
            attention.sinks.uniform_(-1.0, 3.0)
    ids = torch.randint(0, 128, (2, 83), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    specs, geometry = offset_specs(1, 16), Geometry(1, 16, 3, 24, 16)
    outs = []
    for triton in (False, True):
        cache, parts = QuantizedKVCache(specs, geometry, backend=backend_of(triton)), []
        for part in (slice(0, 70), slice(70, 75), *(slice(t, t + 1) for t in range(75, 83))):
            seen = mask[:, : part.stop]
            cache.note_padding(seen, 2)
            inputs = {
                "attention_mask": seen,
                "position_ids": positions[:, part],
                "past_key_values": cache,
            }
            parts.append(model(ids[:, part], **inputs).logits)
        outs.append(torch.cat(parts, 1)[mask.bool()])
        assert cache.layers[0].lengths() == [83, 76]
    assert error(outs[1], outs[0]) < 5e-3
    without = [LayerSpec(KeySpec(s.key.format, (), s.key.matrix), s.value) for s in specs]
    plain = model(ids[:1], past_key_values=QuantizedKVCache(without, geometry)).logits[0]
    assert error(plain, outs[0][:83]) < 0.05  # the offset costs no more than rounding


@torch.no_grad()
def test_batch_invariance_reaches_the_kernels(models, monkeypatch):
    asked = []
    real = runtime_triton.attention

    def spy(*args, **kwargs):
        asked.append(kwargs.get("batch_invariant", False))
        return real(*args, **kwargs)

    path = models[1].kv_artifact.path
    model = runtime.load_pretrained(
        path, device=DEVICE, dtype=torch.float32, attention="triton", batch_invariant=True
    )
    monkeypatch.setattr(runtime_triton, "attention", spy)
    ids = batch_of(TEXTS[1:]).input_ids
    cache = model(ids[:, :50]).past_key_values  # prompts are run a sequence at a time
    got = model(ids[:, 50:51], past_key_values=cache).logits
    assert asked == [False, False, True, True]
    cache = models[0](ids[:, :50]).past_key_values
    assert error(got, models[0](ids[:, 50:51], past_key_values=cache).logits) < 1e-2
