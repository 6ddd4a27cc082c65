"""Every way of generating, against transformers' own 16-bit cache where pages keep 16 bits, and else against plain decoding."""

from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, tiny_model
from transformers import DynamicCache

from kvfold.exports.account import Geometry
from kvfold.exports.architectures import sliding_windows_of
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.runtime.load import attach

HEADS, DIM, LAYERS = 2, 16, 3
GENERATOR = torch.Generator().manual_seed(5)
RAW = LayerSpec(KeySpec(raw16(DIM)), ValueSpec(raw16(DIM)))
BASIS = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=GENERATOR))[0].contiguous()
PACKED = LayerSpec(
    KeySpec(Format(((8, 64), (8, 16))), matrix=BASIS, offset=torch.randn(HEADS, DIM, generator=GENERATOR)),
    ValueSpec(uniform(DIM, 16)),
)
PROMPT = torch.randint(1, 128, (1, 75), generator=GENERATOR)
PROMPT[:, 40:60] = PROMPT[:, 10:30]  # something to look up
NEW = 24


def packed_model(family="llama", spec=RAW, page=8, window=10, budget=None, **options):
    """A tiny model on a packed cache, as load_pretrained makes it, without a file."""
    model = tiny_model(family)
    geometry = Geometry(HEADS, DIM, 3, window, page, sliding_windows_of(model.config))
    known = SimpleNamespace(calibration=SimpleNamespace(covered_positions=10**9), digest=f"{family}-{page}")
    artifact = SimpleNamespace(specs=[spec] * LAYERS, geometry=geometry, metadata=known, formats=[])
    return attach(model, artifact, budget, **options)


class HalfCache(DynamicCache):
    """transformers' cache, of numbers rounded to float16 as ours rounds them."""

    def update(self, keys, values, layer_idx, *args, **kwargs):
        return super().update(keys.half().float(), values.half().float(), layer_idx, *args, **kwargs)


def text_16bit(family, ids, mask=None, **options):
    """What transformers itself generates."""
    model = tiny_model(family, attention="eager")
    cache = HalfCache(config=model.config)
    torch.manual_seed(1)
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, pad_token_id=0, **options
    )


def text(model, ids=PROMPT, mask=None, **options):
    torch.manual_seed(1)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0, **options)


GREEDY = {"do_sample": False}
MODES = {
    "greedy": GREEDY,
    "chunks": {**GREEDY, "prefill_chunk_size": 16},
    "beams": {**GREEDY, "num_beams": 3},
    "beams returned": {**GREEDY, "num_beams": 4, "num_return_sequences": 3},
    "samples": {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8},
    "sampled beams": {"do_sample": True, "num_beams": 2, "temperature": 0.8},
    "lookup": {**GREEDY, "prompt_lookup_num_tokens": 12},
    "penalty": {**GREEDY, "repetition_penalty": 1.3},
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_pages_of_16_bits_generate_what_transformers_generates(family):
    model = packed_model(family)
    for name, options in MODES.items():
        found = text(model, **options)
        plain = {k: v for k, v in options.items() if k not in ("prefill_chunk_size", "prompt_lookup_num_tokens")}
        assert torch.equal(found, text_16bit(family, PROMPT, **plain)), name


@torch.no_grad()
@pytest.mark.parametrize("spec", [RAW, PACKED], ids=["raw", "packed"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_assisted_text_is_greedy_text(family, spec):
    """Drafts from a smaller 16-bit model, from a packed one, and from the prompt; hardly any is right, so crops are many."""
    model = packed_model(family, spec)
    greedy = text(model, **GREEDY)
    assert torch.equal(text(model, prompt_lookup_num_tokens=20, max_matching_ngram_size=1, **GREEDY), greedy)
    for assistant in (tiny_model("llama", seed=3), packed_model("gemma3_text", PACKED), packed_model(family, spec)):
        for schedule in ("constant", "heuristic"):
            assistant.generation_config.num_assistant_tokens = 7
            assistant.generation_config.num_assistant_tokens_schedule = schedule
            assistant.generation_config.assistant_confidence_threshold = 0.0
            out = text(model, assistant_model=assistant, return_dict_in_generate=True, **GREEDY)
            assert torch.equal(out.sequences, greedy)
            assert out.past_key_values.get_seq_length() == PROMPT.shape[1] + NEW - 1
    assert out.past_key_values.geometry.rollback >= 7
