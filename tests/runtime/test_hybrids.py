"""Hybrid models: layers that attend are packed, the states of the others stay as transformers keeps
them, through every way of generating."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGS, tiny_model
from safetensors.torch import save_file
from test_modes import (
    GREEDY,
    MODES,
    PACKED,
    PROMPT,
    RAW,
    left_padded,
    text,
    text_16bit,
    turns_in_one_cache,
)
from transformers.cache_utils import Cache

from kvfold import KvfoldError, runtime
from kvfold.compress.models.states import states_of
from kvfold.errors import KVBudgetExceeded
from kvfold.exports.account import Geometry, batch_nbytes
from kvfold.exports.architectures import (
    ARCHITECTURES,
    architecture_of,
    attention_layers_of,
    sliding_windows_of,
)
from kvfold.exports.hybrids import check_transformers
from kvfold.exports.reader import Artifact
from kvfold.runtime.budget.ladder import Ladders
from kvfold.runtime.cache import storage
from kvfold.runtime.cache.onnx_inputs import onnx_inputs
from kvfold.runtime.calls.hybrid import check_states
from kvfold.runtime.load import attach
from kvfold.runtime.parallel import check_heads

HEADS, DIM = 2, 16
ALL = sorted(name for name, row in ARCHITECTURES.items() if row.hybrid and name in CONFIGS)
# one with each kind of state, one whose layers attend and keep a state, one with layers that do neither
FAMILIES = ["qwen3_next", "granitemoehybrid", "falcon_h1", "lfm2", "lfm3", "nemotron_h", "jamba"]
FEW = ["qwen3_next", "falcon_h1", "lfm2"]
IN_PARTS = {"chunks"}  # modes in which a call of several tokens goes on
MORE = torch.randint(1, 128, (5, 20), generator=torch.Generator().manual_seed(7))


def hybrid_model(
    family, spec=RAW, budget=None, dtype=torch.float32, ladders=False, stated=1, **options
):
    """A tiny model on a packed cache, as load_pretrained makes it, without a file; `stated`: the
    artifact says so many times its states' numbers."""
    model = tiny_model(family, dtype)
    config, arch = model.config, architecture_of(model.config)
    config.dtype = dtype
    states = states_of(config, arch)
    states = states.model_copy(update={"elements": int(states.elements * stated)})
    geometry = Geometry(HEADS, DIM, 3, 10, 8, sliding_windows_of(config), 0, states.nbytes())
    specs = [spec] * len(attention_layers_of(config))
    known = SimpleNamespace(
        calibration=SimpleNamespace(covered_positions=10**9), digest=family, geometry=geometry,
        formats=[(s.key.format, s.value.format) for s in specs], cache=SimpleNamespace(states=states),
    )  # fmt: skip
    policy = Ladders(specs, [(1.0, 1.0)] * len(specs), geometry) if ladders else None
    return attach(model, Artifact(Path("tiny"), known, specs), budget, policy=policy, **options)


def account(model, lengths):
    """Bytes that a cache of sequences of these lengths should take."""
    calls = model.kv_attachment.calls
    return batch_nbytes(calls.geometry, model.kv_artifact.formats, lengths)


@torch.no_grad()
@pytest.mark.parametrize("family", ALL)
def test_pages_of_16_bits_generate_what_transformers_generates(family):
    model, wanted = hybrid_model(family), {}
    for name, options in MODES.items():
        if name == "lookup" or (family not in FEW and name not in ("greedy", "chunks", "beams")):
            continue
        if name in IN_PARTS and not ARCHITECTURES[family].continues:
            with pytest.raises(KvfoldError, match="would start its states anew"):
                text(model, **options)
            continue
        plain = {k: v for k, v in options.items() if k != "prefill_chunk_size"}
        key = str(plain)
        if key not in wanted:
            wanted[key] = text_16bit(family, PROMPT, **plain)
        assert torch.equal(text(model, **options), wanted[key]), name


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_left_padded_batch_are_each_row_alone(family):
    model = hybrid_model(family, PACKED)
    ids, mask = left_padded([75, 31, 2])
    parts = [{**GREEDY, "prefill_chunk_size": 20}] if ARCHITECTURES[family].continues else []
    for options in (GREEDY, *parts):
        together = text(model, ids, mask, **options)
        for b, n in enumerate([75, 31, 2]):
            alone = text(model, ids[b : b + 1, -n:], **options)
            assert together[b, 75:].tolist() == alone[0, n:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_of_packed_pages_are_those_of_a_pass_over_the_whole_text(family):
    model = hybrid_model(family, PACKED)
    beams = {"num_beams": 3, **GREEDY}
    assert torch.equal(text(model, **beams), text(model, use_cache=False, **beams))


@torch.no_grad()
@pytest.mark.parametrize("family", FEW)
def test_turns_of_a_conversation_go_on_in_one_cache(family):
    model = hybrid_model(family, PACKED)
    cache = turns_in_one_cache(model)
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0 and not cache.states.tensors()
    again = model.generate(PROMPT, past_key_values=cache, max_new_tokens=9, **GREEDY)
    assert torch.equal(again, model.generate(PROMPT, max_new_tokens=9, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("family", FEW)
def test_rows_chosen_and_repeated_go_on_as_themselves(family):
    model, lengths = hybrid_model(family, PACKED), [60, 33, 47]
    ids, mask = left_padded(lengths)
    cache = model(ids, attention_mask=mask).past_key_values
    cache.batch_repeat_interleave(2)
    chosen = torch.tensor([4, 0, 3, 3, 5])  # of 0 0 1 1 2 2
    cache.batch_select_indices(chosen)
    cache.reorder_cache(torch.tensor([4, 1, 2, 3, 0]))
    rows = [2, 0, 1, 1, 2]
    seen = torch.cat((mask[rows], torch.ones_like(MORE)), 1)
    together = model(MORE, attention_mask=seen, past_key_values=cache).logits
    for b, row in enumerate(rows):
        whole = torch.cat((ids[row : row + 1, -lengths[row] :], MORE[b : b + 1]), 1)
        alone = model(whole).logits[:, -20:]
        torch.testing.assert_close(
            together[b : b + 1], alone, rtol=0, atol=0.02 * float(alone.std())
        )


@torch.no_grad()
@pytest.mark.parametrize("family", FEW)
def test_forks_and_copies_go_on_by_themselves(family):
    model = hybrid_model(family, PACKED)
    cache = model(PROMPT).past_key_values
    others = [*cache.fork(2), copy.deepcopy(cache)]
    states = cache.states.nbytes
    assert all(other.nbytes == cache.nbytes for other in others) and states
    own = sum(t.nbytes for layer in cache.layers for t in layer.own_tensors())
    pages = cache.nbytes - states - own
    shared = runtime.resident_nbytes([cache, *others])
    assert shared == 4 * (states + own) + 2 * pages  # the deep copy has its own
    for other, end in zip((*others, cache), MORE[:4], strict=True):
        end = end[None]
        out = [model(end[:, i : i + 1], past_key_values=other).logits for i in range(5)]
        fresh = model(PROMPT).past_key_values
        alone = [model(end[:, i : i + 1], past_key_values=fresh).logits for i in range(5)]
        assert torch.equal(torch.cat(out, 1), torch.cat(alone, 1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_counted_and_do_not_grow(family, dtype):
    model = hybrid_model(family, PACKED, dtype=dtype)
    ids, mask = left_padded([75, 31])
    cache = model(ids, attention_mask=mask).past_key_values
    states = model.kv_attachment.calls.geometry.state_nbytes
    assert cache.states.nbytes == 2 * states > 0
    assert cache.nbytes == account(model, [75, 31]) == runtime.resident_nbytes([cache])
    mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    model(MORE[:2, :1], attention_mask=mask, past_key_values=cache)
    assert cache.states.nbytes == 2 * states
    assert cache.nbytes == account(model, [76, 32])
    assert cache.report()[0]["bytes"] < cache.nbytes


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"ladders": True}, {"offload": True}], ids=str)
def test_a_budget_counts_states_and_is_never_passed(options):
    model = hybrid_model("qwen3_next", PACKED)
    plain = model(PROMPT).past_key_values
    states = plain.states.nbytes
    enough = plain.nbytes + (64 if options.get("ladders") else 0)  # where pages change their rung
    model = hybrid_model("qwen3_next", PACKED, budget=enough, **options)
    cache = model(PROMPT).past_key_values
    assert plain.nbytes - states < cache.nbytes <= enough
    less = plain.layers[0].geometry.table_nbytes(0) * 2 + states // 2
    model = hybrid_model("qwen3_next", PACKED, budget=less, **options)
    cache = model.new_kv_cache()
    with pytest.raises(KVBudgetExceeded):
        model(PROMPT, past_key_values=cache)
    assert cache.nbytes == 0 and not cache.states.tensors()


@torch.no_grad()
@pytest.mark.parametrize("family", FEW)
def test_states_larger_than_stated_are_refused_where_there_is_a_budget(family):
    room = 1 << 20
    for stated in (1, 2):
        hybrid_model(family, PACKED, budget=room, stated=stated)(PROMPT)
    hybrid_model(family, PACKED, stated=0)(PROMPT)
    model = hybrid_model(family, PACKED, budget=room, stated=0.5)
    cache = model.new_kv_cache()
    with pytest.raises(KvfoldError, match="states a sequence, but kv_budget is kept by the"):
        model(PROMPT, past_key_values=cache)
    with pytest.raises(KvfoldError, match="had already changed the states"):
        model(MORE[:1], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("family", FEW)
def test_policies_make_room_as_without_states(family):
    """Progressive within a large budget is 16 bits, and in a small one still within it; pages in
    host memory change nothing."""
    large = hybrid_model(family, PACKED, budget=1 << 30, ladders=True)
    assert torch.equal(text(large, **GREEDY), text_16bit(family, PROMPT, **GREEDY))
    floor = hybrid_model(family, PACKED)
    whole = floor.generate(PROMPT, max_new_tokens=40, return_dict_in_generate=True, **GREEDY)
    nbytes = whole.past_key_values.nbytes
    small = hybrid_model(family, PACKED, budget=nbytes + 2000, ladders=True)
    out = small.generate(PROMPT, max_new_tokens=40, return_dict_in_generate=True, **GREEDY)
    assert out.past_key_values.nbytes <= nbytes + 2000
    beams = {"max_new_tokens": 30, "num_beams": 3, **GREEDY}
    away = hybrid_model(family, PACKED, budget=4 * nbytes, offload=True)
    assert torch.equal(away.generate(PROMPT, **beams), floor.generate(PROMPT, **beams))


@torch.no_grad()
@pytest.mark.parametrize("family", FEW)
def test_what_takes_tokens_back_is_refused_and_changes_nothing(family):
    model = hybrid_model(family, PACKED)
    cache = model(PROMPT).past_key_values
    before = [t.clone() for t in cache.states.tensors()]
    assert not cache.is_croppable
    for refused, words in (
        (lambda: cache.crop(-3), "crop(-3) takes tokens back"),
        (lambda: cache.crop(20), "crop(20) takes tokens back"),
        (lambda: cache.extend_rollback(5), "extend_rollback(5)"),
        (lambda: onnx_inputs(cache), "keep states"),
    ):
        with pytest.raises(KvfoldError) as caught:
            refused()
        assert words in str(caught.value)
    cache.crop(0)
    cache.crop(75)
    assert cache.get_seq_length() == 75
    assert all(torch.equal(a, b) for a, b in zip(before, cache.states.tensors(), strict=True))
    with pytest.raises((KvfoldError, ValueError), match=r"takes tokens back|stateful models"):
        text(model, prompt_lookup_num_tokens=5, **GREEDY)
    with pytest.raises(KvfoldError, match="Drafting for another model takes tokens back"):
        text(tiny_model("llama"), assistant_model=model, **GREEDY)


def test_options_that_states_cannot_follow_are_refused(monkeypatch):
    cache = hybrid_model("lfm2").kv_artifact.metadata.cache
    with pytest.raises(KvfoldError, match="rollback=5 is for tokens that are taken back"):
        check_states(cache, 5, "auto")
    with pytest.raises(KvfoldError, match="cuda_graph=True captures a step by running it"):
        check_states(cache, None, True)
    check_states(cache, 0, "auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KvfoldError, match="tp_plan='auto' divides heads of keys and values"):
        check_heads(cache, tiny_model("lfm2").config)


@torch.no_grad()
def test_a_mask_that_says_nothing_of_padding_is_refused():
    model = hybrid_model("granitemoehybrid")
    square = torch.ones(1, 1, 75, 75, dtype=torch.bool).tril()
    for mask, shape in ((square, r"\[1, 1, 75, 75\]"), ({"full_attention": square}, "dict")):
        with pytest.raises(KvfoldError, match=f"attention_mask is {shape}, which says nothing"):
            model(PROMPT, attention_mask=mask)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FEW)
def test_a_cache_goes_on_from_a_file(family, dtype, tmp_path):
    """To the bit, states and all; a file of other states is refused."""
    model, path = hybrid_model(family, PACKED, dtype=dtype), tmp_path / "cache"
    ids, mask = left_padded([75, 31])
    cache = model(ids, attention_mask=mask).past_key_values
    cache.save(path, entropy_coded=dtype == torch.bfloat16)
    restored = runtime.load_cache(path, model)
    assert restored.nbytes == cache.nbytes == account(model, [75, 31])
    mask = torch.cat((mask, torch.ones(2, 20, dtype=torch.long)), 1)
    for part in (slice(0, 1), slice(1, 2), slice(2, 20)):
        found, wanted = (
            model(
                MORE[:2, part], attention_mask=mask[:, : 75 + part.stop], past_key_values=x
            ).logits
            for x in (restored, cache)
        )
        assert torch.equal(found, wanted)
    body, tensors = storage.read_file(path)
    names = [name for name in tensors if name.startswith("states.")]
    assert len(names) == len(cache.states.tensors()) > 0
    state = tensors[names[0]]
    for fault, words in (
        ({names[0]: state[:1]}, "another type or shape"),
        ({names[0]: state.double()}, "another type or shape"),
        ({names[0]: state * float("nan")}, "is not finite"),
        ({"states.9.conv_states.0": state.clone()}, "its tensors are not three a layer and its"),
        ({"rollback": 8}, "states go back by no rollback"),
    ):
        other = {**body, **{k: v for k, v in fault.items() if k in body}}
        held = {**tensors, **{k: v.contiguous() for k, v in fault.items() if k not in body}}
        header = json.dumps({**other, "sha256": storage._sha256(other, held)})
        save_file(held, path, metadata={storage.FIELD: header})
        with pytest.raises(KvfoldError, match=words):
            runtime.load_cache(path, model)


@torch.no_grad()
def test_padding_that_comes_alone_is_refused():
    """transformers itself has a single token read by layers with states, whatever the mask says."""
    model = hybrid_model("qwen3_next")
    mask = torch.tensor([[1], [0]])
    with pytest.raises(KvfoldError, match="column 0 of sequence 1, which attention_mask says is"):
        model(MORE[:2, :1], attention_mask=mask)
    cache = model(MORE[:2, :4], attention_mask=mask.repeat(1, 4)).past_key_values
    with pytest.raises(KvfoldError, match="column 4 of sequence 1"):
        model(MORE[:2, 4:5], attention_mask=mask.repeat(1, 5), past_key_values=cache)
    mask = torch.cat((mask.repeat(1, 4), torch.ones(2, 1, dtype=torch.long)), 1)
    out = model(MORE[:2, 4:5], attention_mask=mask, past_key_values=cache).logits[1]
    torch.testing.assert_close(out, model(MORE[1:2, 4:5]).logits[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("triton", [False, True])
def test_kernels_read_and_write_beside_states(triton):
    """In a padded batch, a prompt and single tokens; as a pass over the whole text."""
    model = hybrid_model("falcon_h1", PACKED, triton=triton)
    whole = hybrid_model("falcon_h1", PACKED)
    ids, mask = left_padded([60, 31])
    ids = torch.cat((ids, MORE[:2, :3]), 1)
    mask = torch.cat((mask, torch.ones(2, 3, dtype=torch.long)), 1)
    cache = model(ids[:, :60], attention_mask=mask[:, :60]).past_key_values
    for end in (61, 62, 63):
        out = model(
            ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache
        ).logits
        wanted = whole(ids[:, :end], attention_mask=mask[:, :end]).logits[:, -1:]
        assert float((out - wanted).norm() / wanted.norm()) < 0.03
    assert cache.nbytes == account(model, [63, 34])


@torch.no_grad()
@pytest.mark.parametrize("family", FEW)
def test_a_call_that_fails_half_way_leaves_a_cache_that_is_refused(family, tmp_path):
    model = hybrid_model(family, PACKED)
    cache = model(PROMPT).past_key_values
    last = model.model.layers[-1]
    hook = last.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(MORE[:1], past_key_values=cache)
    hook.remove()
    for use in (lambda c: c, lambda c: c.fork(1)[0]):
        with pytest.raises(KvfoldError, match=r"reset\(\) (the cache|it) or take a new one"):
            model(MORE[:1], past_key_values=use(cache))
    with pytest.raises(KvfoldError, match="had already changed the states"):
        cache.save(tmp_path / "cache")
    cache.reset()
    out = model(PROMPT, past_key_values=cache)
    assert torch.equal(out.logits, model(PROMPT).logits)
    with pytest.raises(IndexError):  # before anything has changed
        model(torch.full((1, 1), 1 << 40), past_key_values=cache)
    again = model(MORE[:1], past_key_values=cache).logits
    fresh = model(PROMPT).past_key_values
    assert torch.equal(again, model(MORE[:1], past_key_values=fresh).logits)


@torch.no_grad()
def test_a_key_that_is_no_number_leaves_a_cache_that_is_refused():
    model = hybrid_model("qwen3_next", PACKED)
    cache = model(PROMPT).past_key_values
    weight = model.model.layers[3].self_attn.k_proj.weight
    kept = weight.clone()
    weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="Layer 3 computed a key"):
        model(MORE[:1], past_key_values=cache)
    weight.copy_(kept)
    with pytest.raises(KvfoldError, match=r"had already changed the states that 2 layers"):
        model(MORE[:1], past_key_values=cache)


@pytest.mark.parametrize("family", FEW)
def test_states_outlive_the_mode_that_they_were_made_in(family):
    model = hybrid_model(family, PACKED)
    with torch.no_grad():
        cache = model(PROMPT).past_key_values
        wanted = [model(MORE[:1, i : i + 1], past_key_values=cache).logits for i in range(3)]
    with torch.inference_mode():
        cache = model(PROMPT).past_key_values
    found = [model(MORE[:1, i : i + 1], past_key_values=cache).logits for i in range(3)]
    assert all(torch.equal(a, b.detach()) for a, b in zip(wanted, found, strict=True))
    assert not any(t.requires_grad or t.is_inference() for t in cache.states.tensors())
    with pytest.raises(KvfoldError, match="Gradients don't pass"):
        found[2].sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("changed", ["q_proj", "k_proj"])
def test_an_adapter_of_a_gate_whose_rows_were_ordered_is_refused(changed):
    value = replace(PACKED.value, transforms=("whiten", "scale"))
    model = hybrid_model("qwen3_next", replace(PACKED, value=value))
    attention, wrapped = model.model.layers[1].self_attn, torch.nn.Module()
    wrapped.base_layer = getattr(attention, changed)
    wrapped.lora_A = torch.nn.ModuleDict({"default": torch.nn.Identity()})
    wrapped.adapter_layer_names, wrapped.forward = ("lora_A",), wrapped.base_layer.forward
    setattr(attention, changed, wrapped)
    config = SimpleNamespace(base_model_name_or_path="owner/original")
    vars(model)["peft_config"] = {"default": config}
    if changed == "q_proj":
        with pytest.raises(KvfoldError, match="Adapter 'default' changes q_proj, but was trained"):
            model(PROMPT)
    else:
        assert model(PROMPT).logits.isfinite().all()


def test_a_transformers_that_hands_out_states_otherwise_is_refused(monkeypatch):
    monkeypatch.delattr(Cache, "get_conv_state")
    with pytest.raises(KvfoldError, match=r"'lfm2' model keep states, .* from 5\.21 on, but 5\."):
        states_of(CONFIGS["lfm2"](), ARCHITECTURES["lfm2"])
    with pytest.raises(KvfoldError, match="install a newer one"):
        check_transformers("lfm2")


@torch.no_grad()
def test_a_plain_cache_is_transformers_own():
    model = hybrid_model("qwen3_next", PACKED)
    with runtime.plain_cache(model):
        out = model(PROMPT)
    stock = tiny_model("qwen3_next", attention="sdpa")(PROMPT)
    torch.testing.assert_close(out.logits, stock.logits)
    assert type(out.past_key_values).__name__ == "DynamicCache"


def test_geometry_of_a_model_without_states_has_none():
    geometry = Geometry(HEADS, DIM, 3, 10, 8)
    assert geometry.state_nbytes == 0
    formats = [(RAW.key.format, RAW.value.format)] * 2
    more = batch_nbytes(replace(geometry, state_nbytes=100), formats, [40, 7, 0])
    assert more == batch_nbytes(geometry, formats, [40, 7, 0]) + 300
    assert batch_nbytes(replace(geometry, state_nbytes=100), formats, [0]) == 0
