"""What families have of their own: soft-caps, sink logits, sliding windows, RoPE bases; each
against transformers' eager attention."""

import math
import sys

import pytest
import torch
from conftest import CONFIGS, FAMILIES, save_tiny, tiny_model
from transformers import LlamaConfig, MllamaConfig

from kvfold.compress.models import check_checkpoint, load_model
from kvfold.compress.models.attention_hook import NAME as TAP
from kvfold.compress.models.attention_hook import tapped
from kvfold.compress.models.rope import rotate_on, turns
from kvfold.compress.plan import make_plan
from kvfold.compress.recipe import Recipe
from kvfold.compress.search.packed_attention import packed_attention
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import architecture_of, logits_of
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.attention import Tile, attend, attend_plain
from kvfold.kernels.formats import raw16
from kvfold.runtime.backends.transformers import NAME
from kvfold.runtime.cache.cache import QuantizedKVCache

HEADS, DIM = 2, 16
GEOMETRY = Geometry(HEADS, DIM, sinks=3, window=10, page_tokens=16)
IDS = torch.randint(1, 128, (2, 117), generator=torch.Generator().manual_seed(4))


def error(a, b):
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def eager_logits(family, ids, **inputs):
    with torch.no_grad():
        return tiny_model(family, attention="eager")(ids, use_cache=False, **inputs).logits


def raw_specs(offset: str):
    """Formats that keep every number, float16 rounding aside, and a mean of keys, constant or
    turning, that the logits must not show."""
    generator = torch.Generator().manual_seed(8)
    mu = torch.randn(HEADS, DIM, generator=generator) if offset else None
    matrix = (
        torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=generator))[0] if offset else None
    )
    omega = (1.0, 0.5, 0.1, 0.03, 0.01, 1e-3) if offset == "turning" else None
    return LayerSpec(KeySpec(raw16(DIM), (), matrix, mu, frequencies=omega), ValueSpec(raw16(DIM)))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_tensors_through_our_functions_are_eager(family):
    expected = eager_logits(family, IDS)
    for name in (NAME, TAP):
        model = tiny_model(family)
        model.set_attn_implementation(name)
        assert error(model(IDS, use_cache=False).logits, expected) < 1e-5
        hidden = model.base_model(IDS, use_cache=False).last_hidden_state
        torch.testing.assert_close(logits_of(model, hidden), model(IDS, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("offset", ["", "constant", "turning"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_layers_packed_attention_is_eager(family, offset):
    """Queries, keys and values that float16 holds exactly, through the cache's pages, prompt and
    single tokens."""
    model = tiny_model(family)
    model.set_attn_implementation(TAP)
    eager = tiny_model(family, attention="eager")
    arch = architecture_of(CONFIGS[family]())
    spec = raw_specs(offset)
    tolerance = 2e-3 if offset else 1e-5  # k − μ is rounded to float16
    for i, attention in enumerate(arch.attention_modules(model)):
        seen = {}

        def tap(module, query, key, value, mask, scaling, seen=seen, **extras):
            query, key, value = query, key.half().float(), value.half().float()
            seen.update(
                query=query, key=key, value=value, mask=mask, scaling=scaling, extras=extras
            )

        with tapped(attention, tap):
            model(IDS, use_cache=False)
        query, key, value = seen["query"], seen["key"], seen["value"]
        module = arch.attention_modules(eager)[i]
        causal = torch.ones(117, 117, dtype=torch.bool).tril()
        mask = causal if seen["mask"] is None else seen["mask"][0, 0]
        additive = torch.zeros(1, 1, 117, 117).masked_fill(~mask, torch.finfo(torch.float32).min)
        family_code = sys.modules[type(module).__module__]
        expected = family_code.eager_attention_forward(
            module, query, key, value, additive, scaling=seen["scaling"],
            softcap=seen["extras"].get("softcap"), s_aux=seen["extras"].get("sinks_logit"),
        )[0]  # fmt: skip
        cache = QuantizedKVCache([spec] * 3, GEOMETRY)
        for part in (slice(0, 100), *(slice(t, t + 1) for t in range(100, 117))):
            handle, _ = cache.update(key[:, :, part], value[:, :, part], i)
            got = handle.attend(
                query[:, :, part], seen["scaling"], mask[None, None, part, : part.stop],
                seen["extras"].get("softcap"), seen["extras"].get("sinks_logit"),
            )  # fmt: skip
            assert error(got.transpose(1, 2), expected[:, part]) < tolerance
        assert cache.layers[i].num_pages() == 12
        probed = packed_attention(
            query[0],
            key[0],
            value[0],
            GEOMETRY,
            seen["scaling"],
            spec.key,
            spec.value,
            mask=mask,
            **seen["extras"],
        )
        assert error(probed.transpose(0, 1), expected[0]) < tolerance


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_is_eager_but_for_float16(family):
    """Every keyword that a family's attention gets reaches the pages: a prompt, then single tokens,
    padded on the left."""
    mask = torch.ones_like(IDS)
    mask[1, :13] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    model = tiny_model(family)
    model.set_attn_implementation(NAME)
    cache = QuantizedKVCache([raw_specs("turning")] * 3, GEOMETRY)
    parts = []
    for part in (slice(0, 90), slice(90, 110), *(slice(t, t + 1) for t in range(110, 117))):
        seen = mask[:, : part.stop]
        cache.note_padding(seen, 2)
        inputs = {
            "attention_mask": seen,
            "position_ids": positions[:, part],
            "past_key_values": cache,
        }
        parts.append(model(IDS[:, part], **inputs).logits)
    got = torch.cat(parts, 1)
    assert cache.layers[0].lengths() == [117, 104]
    assert error(got[0], eager_logits(family, IDS[:1])[0]) < 0.01
    assert error(got[1, 13:], eager_logits(family, IDS[1:, 13:])[0]) < 0.01


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_reads_what_eager_reads(family):
    """Through plain tensors with a mask: a batch padded on the left, row by row."""
    mask = torch.ones_like(IDS)
    mask[1, :50] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    model = tiny_model(family)
    model.set_attn_implementation(NAME)
    got = model(IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits
    alone = eager_logits(family, IDS[1:, 50:])
    assert error(got[1, 50:], alone[0]) < 1e-5
    assert error(got[0], eager_logits(family, IDS[:1])[0]) < 1e-5


def naive(query, key, value, scaling, mask, softcap, sinks_logit, shift):
    """One query at a time in float64, as the papers state it."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(query.shape[0]):
        n = head * key.shape[0] // query.shape[0]
        for t in range(query.shape[1]):
            logits = key[n].double() @ query[head, t].double()
            logits = (logits + (0 if shift is None else float(shift[head, t]))) * scaling
            if softcap:
                logits = softcap * (logits / softcap).tanh()
            powers = logits.exp() * mask[t]
            total = powers.sum() + (
                0 if sinks_logit is None else math.exp(float(sinks_logit[head]))
            )
            out[head, t] = powers @ value[n].double() / total
    return out


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("shifted", [False, True], ids=["", "shift"])
def test_soft_cap_sink_logits_and_shift_are_their_formulas(softcap, sinks, shifted):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    query, key, value = normal(4, 23, 8), normal(2, 41, 8), normal(2, 41, 8)
    sinks_logit = 3 * normal(4) if sinks else None
    shift = 2 * normal(4, 23) if shifted else None
    positions = torch.arange(18, 41)
    mask = torch.arange(41) <= positions[:, None]
    mask &= torch.arange(41) > positions[:, None] - 15
    expected = naive(query, key, value, 0.6, mask, softcap, sinks_logit, shift)
    tiles = [
        Tile(key[:, a:b], value[:, a:b], torch.arange(a, b), False)
        for a, b in ((0, 7), (7, 30), (30, 41))
    ]
    got = attend(
        query, positions, torch.zeros_like(positions), tiles,
        sinks=0, scaling=0.6, mask=mask, softcap=softcap, sinks_logit=sinks_logit, shift=shift,
    )  # fmt: skip
    assert error(got, expected) < 1e-6
    if not shifted:
        plain = attend_plain(
            query[None], key[None], value[None], 0.6, mask[None, None], softcap, sinks_logit
        )
        assert error(plain[0], expected) < 1e-6
        causal = attend_plain(query[None], key[None], value[None], 0.6, None, softcap, sinks_logit)
        everything = naive(
            query,
            key,
            value,
            0.6,
            torch.arange(41) <= positions[:, None],
            softcap,
            sinks_logit,
            None,
        )
        assert error(causal[0], everything) < 1e-6


def test_a_query_that_sees_only_the_sink_gives_zeros():
    out = attend(
        torch.ones(2, 1, 8), torch.tensor([0]), torch.tensor([0]),
        [Tile(torch.ones(1, 1, 8), torch.ones(1, 1, 8), torch.tensor([0]), False)],
        sinks=0, scaling=1.0, mask=torch.zeros(1, 1, dtype=torch.bool), sinks_logit=torch.tensor([-90.0, 90.0]),
    )  # fmt: skip
    assert torch.equal(out, torch.zeros(2, 1, 8))


def angles(model, family, layer, positions):
    turn = turns(model, architecture_of(CONFIGS[family]()), layer, positions[None])
    return None if turn is None else turn[0]


def test_each_layer_has_its_own_rope_base():
    model = tiny_model("gemma3_text")
    positions = torch.tensor([0, 1, 37, 1000])
    for layer, base in enumerate((1e3, 1e6, 1e3)):
        angle = positions[:, None].double() * base ** (-torch.arange(0, DIM, 2).double() / DIM)
        torch.testing.assert_close(
            angles(model, "gemma3_text", layer, positions).to(torch.complex128),
            torch.polar(torch.ones_like(angle), angle),
            rtol=0,
            atol=1e-4,
        )


def test_a_layer_without_rope_is_not_turned():
    model = tiny_model("smollm3")
    x, places = torch.randn(1, 2, 5, DIM), torch.arange(5)
    near, far = (angles(model, "smollm3", 1, places * step) for step in (1, 9))
    assert near is None and torch.equal(rotate_on(x, near, far), x)
    assert angles(model, "smollm3", 2, places).shape == (5, DIM // 2)


@torch.no_grad()
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_long_rope_turns_as_at_the_far_positions(partial):
    """Past the original context every angle and the tables' factor are others; a part of a head may
    not turn at all."""
    pairs = int(DIM * partial) // 2
    config = long_rope_config(partial, pairs)
    model = type(tiny_model("phi3"))(config).eval()
    model.set_attn_implementation(TAP)
    arch = architecture_of(config)
    seen = []

    def tap(module, query, key, value, mask, scaling, **extras):
        seen.append((query, key))

    with tapped(arch.attention_modules(model)[0], tap):
        for step in (1, 7):
            model(IDS[:1, :50], position_ids=torch.arange(50)[None] * step, use_cache=False)
    near, far = (turns(model, arch, 0, torch.arange(50)[None] * step) for step in (1, 7))
    assert near.shape[-1] == pairs
    for plain, moved in zip(*seen, strict=True):
        torch.testing.assert_close(rotate_on(plain, near, far), moved, rtol=1e-3, atol=1e-4)
        assert float((plain - moved).abs().max()) > 0.01


def long_rope_config(partial, pairs):
    """A tiny Phi-3 with another set of RoPE factors past 64 tokens."""
    config = CONFIGS["phi3"]()
    config.original_max_position_embeddings = 64
    config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, "factor": 32.0,
        "short_factor": [1.0] * pairs, "long_factor": [3.0 + i for i in range(pairs)], "partial_rotary_factor": partial,
    }  # fmt: skip
    return config


def refusal(config, *words):
    with pytest.raises(KvfoldError) as caught:
        architecture_of(config)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_is_not_supported_is_refused_by_name():
    refusal(MllamaConfig(), "'mllama'", "multi-modal", "gemma3_text")
    other = LlamaConfig()
    other.vision_config = {"depth": 2}
    refusal(other, "'llama'", "multi-modal")
    both_ways = CONFIGS["gemma3_text"]()
    both_ways.use_bidirectional_attention = True
    refusal(both_ways, "'gemma3_text'", "later tokens")
    for family in ("gemma3n_text", "deepseek_v3", "bloom"):
        refusal(type("Config", (), {"model_type": family})(), f"'{family}' is not supported")


def test_quantised_weights_are_refused(tmp_path):
    folder = save_tiny(tmp_path / "model", "gpt_oss")
    config = CONFIGS["gpt_oss"]()
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(folder)
    with pytest.raises(KvfoldError, match=r"quantised \(mxfp4\)"):
        check_checkpoint(folder)


def test_smoothing_needs_every_channel_rotated(tmp_path, text_file):
    folder = save_tiny(tmp_path / "model", "phi3")
    config = CONFIGS["phi3"]()
    config.rope_parameters = {**config.rope_parameters, "partial_rotary_factor": 0.5}
    config.save_pretrained(folder)
    recipe = Recipe.model_validate({"key": {"transform": "smooth"}})
    with pytest.raises(KvfoldError, match="rotates 8 of 16 channels"):
        make_plan(str(folder), "8.0", str(text_file), recipe, None)


@torch.no_grad()
def test_a_models_own_weights_load_with_an_attention_that_computes_them(tmp_path):
    """Gemma 2 and gpt-oss have no SDPA of transformers' own."""
    for family in ("gemma2", "gpt_oss"):
        folder = save_tiny(tmp_path / family, family, torch.float32)
        model = load_model(folder, torch.float32, torch.device("cpu"))
        assert error(model(IDS, use_cache=False).logits, eager_logits(family, IDS)) < 1e-5
