"""Decoding by a captured step, with the kernels run as they are in place of a replay: when a step
is captured, what the host does before one, and that nothing of it changes what comes out."""

import copy
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from conftest import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM

from kvfold.errors import KVBudgetExceeded, KvfoldError
from kvfold.exports import account
from kvfold.exports.account import Geometry, batch_nbytes
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.runtime import load
from kvfold.runtime.budget.ladder import Ladders
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.cache.nan_check import NanMarks
from kvfold.runtime.cache.upload import Upload
from kvfold.runtime.generate import graph

pytest.importorskip("triton")
from plain_steps import PlainSteps

from kvfold.runtime.backends.triton import TritonKernels

if torch.cuda.is_available():
    pytest.skip("test_cuda.py captures graphs", allow_module_level=True)

DIM, LAYERS = 16, 2
SMALL = {
    **SHAPE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 32,
}
GEOMETRY = Geometry(1, DIM, sinks=2, window=6, page_tokens=8)
SPECS = [
    LayerSpec(KeySpec(Format(((8, 8), (8, 4)))), ValueSpec(uniform(DIM, 4))),
    LayerSpec(KeySpec(Format(((DIM, 4),))), ValueSpec(uniform(DIM, 4))),
]
LOSSES = [(0.02, 0.01), (0.5, 0.1)]


def host_state(cache):
    """What the host knows of a cache, but not when it was last asked."""
    layers = [
        (
            x.columns,
            list(x.lengths()),
            copy.deepcopy(x.table.pages()),
            [s.passed for s in x.table.sequences],
            dict(x.table.pool._rungs),
        )
        for x in cache.layers
    ]
    return layers, cache.shared.clock.steps


class Replayed:
    """A captured step: the kernels on the tensors that it was captured with, and nothing of the
    host's state."""

    devices = ("cpu",)
    made: ClassVar[list] = []
    fail = False

    def __init__(self, forward, cache, batch_size, compiled=None):
        if self.fail:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.forward, self.cache, self.reads = forward, cache, graph.reads(cache)
        self.ids = torch.zeros(batch_size, 1, dtype=torch.long)
        self.positions = torch.zeros(batch_size, 1, dtype=torch.long)
        self.compiled, self.calls = compiled, 0
        self.made.append(self)

    def __call__(self, ids, positions):
        assert graph.reads(self.cache) == self.reads
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        before = host_state(self.cache)
        logits = graph.run(self.forward, self.cache, self.ids, self.positions)
        assert host_state(self.cache) == before
        self.calls += 1
        return logits


@pytest.fixture
def quick(monkeypatch):
    """Steps by `plain_decode` instead of interpreted kernels, prompts and lowering by the
    reference."""

    for name in ("append_and_attend", "attend", "write_pages", "lower_pages"):
        monkeypatch.setattr(TritonKernels, name, getattr(PlainSteps, name))
    monkeypatch.setattr(graph, "FUSE_AFTER", 10**6)
    monkeypatch.setattr(
        account, "LEAST_ENTRIES", 2
    )  # so that a short text is captured several times


@pytest.fixture
def captured(monkeypatch):
    """Captured steps, as they are made."""
    monkeypatch.setattr(Replayed, "made", [])
    monkeypatch.setattr(Replayed, "fail", False)
    return Replayed.made


def make(on, *, budget=None, progressive=False, geometry=GEOMETRY, rollback=0, specs=SPECS, **more):
    """A small model on packed pages, by kernels; with `on`, decoding by captured steps."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    policy = Ladders(specs, LOSSES, geometry) if progressive else None
    model = load.attach(
        model, plain_artifact(geometry, specs), budget, True, False, rollback, False, policy
    )
    if on:
        model.kv_attachment.decode_by(graph.Decoding(model, capture=Replayed, **more))
    return model


def plain_artifact(geometry, specs=SPECS):
    metadata = SimpleNamespace(
        calibration=SimpleNamespace(covered_positions=10**6), digest="", geometry=geometry
    )
    return load.Artifact(Path(), metadata, specs)


def ids_of(batch, tokens, seed=1):
    return torch.randint(1, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def contents(cache):
    """Everything that a cache holds, sequence by sequence."""
    found = []
    for layer in cache.layers:
        assert layer.lengths() == layer.table.state[:, 0].tolist()
        assert [len(ids) for ids in layer.table.pages()] == layer.table.state[:, 1].tolist()
        for b, length in enumerate(layer.lengths()):
            g, ids = layer.geometry, layer.table.pages()[b]
            assert layer.table.block_table[b, : len(ids)].tolist() == layer.table.pool.addresses(
                ids
            )
            first = max(min(g.sinks, length), g.sinks + len(ids) * g.page_tokens)
            rows = torch.cat(
                (layer.window.slots(0, min(g.sinks, length)), layer.window.slots(first, length))
            )
            found += [layer.window.keys[b][:, rows], layer.window.values[b][:, rows]]
            found += [layer.table.pool.page(i) for i in ids if i >= 0]
            found.append(torch.tensor([layer.table.pool.rung(i) for i in ids if i >= 0]))
    return found


def same(one, other):
    pairs = zip(contents(one), contents(other), strict=True)
    return one.nbytes == other.nbytes and all(torch.equal(a, b) for a, b in pairs)


def decode(model, cache, ids, watch=None):
    """Greedy steps' logits of given tokens; `watch` is called after each."""
    found = []
    for t in range(ids.shape[1]):
        found.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits)
        if watch:
            watch(cache)
    return found


@pytest.mark.parametrize("progressive", [False, True])
@torch.no_grad()
def test_replayed_steps_are_eager_steps_and_memory_grows(progressive, quick, captured):
    """Tokens, bytes, states and every page, over several captures, a crop, a chunk and a turn more;
    the budget holds after every step."""
    ids, budget = ids_of(2, 170), 14_000 if progressive else None
    runs = []
    for on in (False, True):
        model = make(on, budget=budget, progressive=progressive)
        cache, sizes = model.new_kv_cache(), []
        sizes_of = lambda c, sizes=sizes: sizes.append(c.nbytes)  # noqa: E731
        model(ids[:, :11], past_key_values=cache)
        logits = decode(model, cache, ids[:, 11:90], sizes_of)
        cache.crop(-13)
        logits += decode(model, cache, ids[:, 90:110], sizes_of)
        logits.append(model(input_ids=ids[:, 110:121], past_key_values=cache).logits)
        logits += decode(model, cache, ids[:, 121:], sizes_of)
        runs.append((logits, sizes, cache))
    (logits, sizes, cache), (others, other_sizes, other) = runs
    assert all(torch.equal(a, b) for a, b in zip(logits, others, strict=True))
    assert sizes == other_sizes and same(cache, other)
    if progressive:
        assert max(sizes) <= budget and all(layer.table.pool.counts[0] for layer in other.layers)
        assert [x.table.segments.tolist() for x in cache.layers] == [
            x.table.segments.tolist() for x in other.layers
        ]
    else:
        assert other.nbytes == batch_nbytes(GEOMETRY, other.formats, other.layers[0].lengths())
    assert len(captured) >= 4 and sum(x.calls for x in captured) > 110


GREEDY = {"max_new_tokens": 60, "do_sample": False}


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    ("options", "replays"),
    [
        (GREEDY, True),
        ({"max_new_tokens": 60, "do_sample": True}, True),
        ({**GREEDY, "prefill_chunk_size": 5}, True),
        ({**GREEDY, "num_beams": 2}, False),
        (
            {
                **GREEDY,
                "max_new_tokens": 6,
                "output_hidden_states": True,
                "return_dict_in_generate": True,
            },
            False,
        ),
        ({**GREEDY, "prompt_lookup_num_tokens": 3}, None),
    ],
)
@torch.no_grad()
def test_every_mode_generates_what_it_does_without(options, replays, progressive, quick, captured):
    """A batch padded on the left where the mode takes one."""
    if progressive and "num_beams" in options:
        pytest.skip("beams copy rows, which takes the budget that pages are to have")
    batch = 1 if "prompt_lookup_num_tokens" in options else 2
    ids, found = ids_of(batch, 20), []
    mask = torch.ones_like(ids)
    mask[batch - 1, : 7 * (batch - 1)] = 0
    for on in (False, True):
        model = make(on, budget=30_000 if progressive else None, progressive=progressive)
        torch.manual_seed(5)
        out = model.generate(
            ids, attention_mask=mask, pad_token_id=0, **{"return_dict_in_generate": True, **options}
        )
        found.append((out.sequences, out.past_key_values))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1].nbytes == found[1][1].nbytes
    if replays is not None:
        assert bool(captured) == replays
    if replays:
        assert same(found[0][1], found[1][1]) and sum(x.calls for x in captured) >= 45


@torch.no_grad()
def test_most_steps_are_quiet_and_a_turn_goes_on_with_the_same_graph(quick, captured, monkeypatch):
    """A page every eight steps: of those between the host only counts. A prompt in between replaces
    no tensor."""
    monkeypatch.setattr(account, "LEAST_ENTRIES", 64)
    model, copies, events = make(True), [], []
    cache, ids = model.new_kv_cache(), ids_of(1, 100)
    real_send, real_begin = Upload.send, QuantizedKVCache.begin_step
    monkeypatch.setattr(
        Upload,
        "send",
        lambda self: (copies.append(len(self._news[torch.int64][0])), real_send(self)),
    )
    monkeypatch.setattr(
        QuantizedKVCache,
        "begin_step",
        lambda c: (events.append(not c.steps.quiet), real_begin(c))[1],
    )
    model(ids[:, :30], past_key_values=cache)
    decode(model, cache, ids[:, 30:64])
    assert len(captured) == 1 and captured[0].calls == 33 and sum(events) == 1 + 34 // 8 + 1
    assert copies == [LAYERS] * 5  # each: one entry of each layer, in one copy
    step = cache.steps.captured
    model(input_ids=ids[:, 64:80], past_key_values=cache)
    decode(model, cache, ids[:, 80:])
    assert cache.steps.captured is step and len(captured) == 1 and captured[0].calls == 33 + 20
    cache.reset()
    assert cache.steps.captured is None


@torch.no_grad()
def test_a_page_is_written_on_the_rung_that_the_budget_has_room_for(quick, captured):
    """In a budget where the floor is all that fits: replayed steps put pages on lower rungs at
    once, and end where eager ones do."""
    ids, runs = ids_of(2, 150), []
    for on in (False, True):
        model = make(on, budget=9_000, progressive=True)
        cache, rungs = model.new_kv_cache(), set()
        model(ids[:, :11], past_key_values=cache)

        def watch(c, rungs=rungs):
            assert c.nbytes <= c.budget
            rungs |= {tuple(layer.table.next_rungs()[1]) for layer in c.layers}
            for layer in c.layers:
                there, here = layer.table.next_rungs()
                assert there.tolist() == here

        with pytest.raises(KVBudgetExceeded):
            decode(model, cache, ids[:, 11:], watch)
        runs.append((cache, rungs))
    (one, rungs), (other, other_rungs) = runs
    assert rungs == other_rungs and len(rungs) > 2 and same(one, other)
    assert (
        one.get_seq_length() == other.get_seq_length() > 60 and sum(x.calls for x in captured) > 40
    )


@torch.no_grad()
def test_what_was_lowered_is_told_where_the_first_layer_has_one_rung(quick, captured):
    """As where sliding layers stay in 16 bits: the device must know of pages of a later layer that
    went down in a step without a new page."""
    ids, runs = ids_of(2, 130), []
    specs = [LayerSpec(KeySpec(raw16(DIM)), ValueSpec(raw16(DIM))), SPECS[0]]
    for on in (False, True):
        model = make(on, budget=24_000, progressive=True, specs=specs)
        cache, moved = model.new_kv_cache(), []
        model(ids[:, :11], past_key_values=cache)

        def watch(c, moved=moved):
            layer = c.layers[1]
            rungs = [[layer.table.pool.rung(i) for i in row] for row in layer.table.pages()]
            moved.append(
                [
                    sum(r < cut + 1 for r in row)
                    for row in rungs
                    for cut in range(len(layer.rungs) - 1)
                ]
            )
            assert moved[-1] == [n for row in layer.table.segments[:, 1:-1].tolist() for n in row]

        runs.append((decode(model, cache, ids[:, 11:], watch), cache))
    (logits, cache), (others, other) = runs
    assert all(torch.equal(a, b) for a, b in zip(logits, others, strict=True)) and same(
        cache, other
    )
    assert sum(cache.layers[1].table.pool.counts[:-1]) > 0 and len(cache.layers[0].rungs) == 1


@torch.no_grad()
def test_where_capturing_fails_the_model_goes_on_and_nobody_tries_again(
    quick, captured, caplog, monkeypatch
):
    monkeypatch.setattr(Replayed, "fail", True)
    ids, found = ids_of(1, 40), []
    for on in (False, True):
        model = make(on)
        cache = model.new_kv_cache()
        model(ids[:, :11], past_key_values=cache)
        with caplog.at_level(logging.WARNING, "kvfold"):
            found.append((decode(model, cache, ids[:, 11:]), cache))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True)) and same(
        found[0][1], found[1][1]
    )
    (record,) = caplog.records
    assert (
        "can't be captured in a CUDA graph (operation not permitted when stream is capturing)"
        in record.getMessage()
    )
    model = make(True, insist=True)
    cache = model.new_kv_cache()
    model(ids[:, :11], past_key_values=cache)
    decode(model, cache, ids[:, 11:13])
    with pytest.raises(KvfoldError, match="load with cuda_graph='auto' or False"):
        decode(model, cache, ids[:, 13:14])


def test_only_a_model_that_waits_in_two_steps_in_a_row_is_refused(monkeypatch, caplog):
    """The first may wait for memory that the allocator gives back, as where a card is nearly full;
    and no step is captured before one that didn't wait."""
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    layer = SimpleNamespace(device=torch.device("cuda"))
    for waits, refused in (([1, 0, 0], False), ([1, 1, 0], True), ([0, 1, 1], False)):
        model = torch.nn.Linear(1, 1)
        decoding = graph.Decoding(model)
        kept: list = []
        caplog.clear()
        cache = SimpleNamespace(layers=[layer], steps=SimpleNamespace(keep=kept.append))
        for wait in waits:
            with decoding.watched(cache):
                if wait:
                    warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        assert bool(decoding.refused) is refused and decoding.probed
        assert len(kept) == (waits[0] + waits[1] if waits[0] else 0)
        if refused:
            here = f"{__file__}:"
            assert f"waits for the device, at {here}" in caplog.records[0].getMessage()


@torch.no_grad()
def test_what_a_replay_would_not_do_is_done_eagerly(quick, captured):
    model = make(True)
    cache, ids = model.new_kv_cache(), ids_of(2, 60)
    model(ids[:, :20], past_key_values=cache)
    decode(model, cache, ids[:, 20:24])
    calls = [captured[0].calls]
    hidden = model(
        input_ids=ids[:, 24:25], past_key_values=cache, output_hidden_states=True
    ).hidden_states
    assert len(hidden) == LAYERS + 1 and captured[0].calls == calls[0]
    seen = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *args: seen.append(1))
    decode(model, cache, ids[:, 25:35])
    assert len(seen) == 10 and captured[0].calls == calls[0] and cache.steps.captured is None
    hook.remove()
    decode(model, cache, ids[:, 35:40])
    assert len(seen) == 10 and len(captured) == 2 and captured[1].calls == 4
    model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.clone()
    decode(model, cache, ids[:, 40:50])
    assert len(captured) == 3
    cache.batch_select_indices(torch.tensor([1]))
    decode(model, cache, ids[1:, 50:])
    assert len(captured) == 4 and captured[3].ids.shape == (1, 1)


@torch.no_grad()
def test_forks_have_steps_of_their_own_and_copies_of_a_model_too(quick, captured):
    model, ids = make(True), ids_of(1, 80)
    cache = model.new_kv_cache()
    model(ids[:, :20], past_key_values=cache)
    decode(model, cache, ids[:, 20:40])
    (fork,) = cache.fork(1)
    logits = decode(model, fork, ids[:, 40:60]), decode(model, cache, ids[:, 40:60])
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True)) and same(cache, fork)
    assert fork.steps.captured is not cache.steps.captured and {id(x.cache) for x in captured} == {
        id(cache),
        id(fork),
    }
    twin = copy.deepcopy(model)
    assert twin.kv_decoding is not model.kv_decoding and twin.kv_decoding.model is twin
    twin.lm_head.weight.data.mul_(2)
    other = twin.new_kv_cache()
    twin(ids[:, :60], past_key_values=other)
    got = decode(twin, other, ids[:, 60:70])
    assert all(
        torch.allclose(a, 2 * b, rtol=0.1)
        for a, b in zip(got[:1], decode(model, cache, ids[:, 60:61]), strict=True)
    )


@torch.no_grad()
def test_a_step_that_fails_half_way_leaves_a_cache_that_says_so(quick, captured):
    model, ids = make(True), ids_of(1, 60)
    cache = model.new_kv_cache()
    model(ids[:, :20], past_key_values=cache)
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decode(model, cache, ids[:, 20:21])
    hook.remove()
    with pytest.raises(KvfoldError, match=r"layers of 20 and of 21 tokens; reset\(\) it"):
        decode(model, cache, ids[:, 20:21])
    cache.reset()
    model(ids[:, :20], past_key_values=cache)
    decode(model, cache, ids[:, 20:40])
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("bad", [40, 47, 48, 49])
@torch.no_grad()
def test_marks_are_asked_for_ahead_and_nothing_marked_is_packed(
    ahead, bad, quick, captured, monkeypatch
):
    """Pages come due with tokens 48 and 56: a bad one is reported with one of them, long before a
    window has passed over it."""
    monkeypatch.setattr(NanMarks, "lead", lambda marks, geometry: ahead)
    waits, real = [], NanMarks.look
    monkeypatch.setattr(NanMarks, "look", lambda marks: (waits.append(1), real(marks))[1])
    model, ids = make(True), ids_of(2, 80)
    cache = model.new_kv_cache()
    model(ids[:, :26], past_key_values=cache)
    decode(model, cache, ids[:, 26:bad])
    assert not ahead or not waits
    weight = model.model.layers[1].self_attn.v_proj.weight
    whole = weight.clone()
    weight[0] = float("inf")
    decode(model, cache, ids[:, bad : bad + 1])
    weight.copy_(whole)
    with pytest.raises(
        FloatingPointError, match=rf"Layer 1 computed a value .* at position {bad} of sequence 0"
    ):
        decode(model, cache, ids[:, bad + 1 : bad + 12])
    assert cache.get_seq_length() == bad
    assert all(
        x.isfinite().all()
        for layer in cache.layers
        for b in range(2)
        for x in layer.held.read_pages(layer.table.pages()[b])
    )
    decode(model, cache, ids[:, bad:])
    assert cache.get_seq_length() == 80


@pytest.mark.parametrize("budget", [None, 9_000])
@torch.no_grad()
def test_pages_behind_a_sliding_window_go_as_they_do_without(budget, quick, captured):
    geometry = Geometry(1, DIM, 2, 6, 8, sliding=(0, 20), rollback=3)
    ids, runs = ids_of(2, 120), []
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for on in (False, True):
        model = make(on, geometry=geometry, budget=budget, rollback=3)
        cache, sizes = model.new_kv_cache(), []
        model(ids[:, :21], attention_mask=mask[:, :21], past_key_values=cache)
        end = 120
        try:
            decode(model, cache, ids[:, 21:], lambda c, sizes=sizes: sizes.append(c.nbytes))
        except KVBudgetExceeded:
            end = cache.get_seq_length()
        runs.append((sizes, cache, end))
        assert (end < 120) == (budget is not None)
        lengths = [n for n in (end, end - 5)]
        assert cache.nbytes == batch_nbytes(geometry, cache.formats, lengths)
    assert (
        runs[0][0] == runs[1][0]
        and runs[0][2] == runs[1][2]
        and sum(x.calls for x in captured) > 25
    )
    for one, other in zip(runs[0][1].layers, runs[1][1].layers, strict=True):
        assert [s.passed for s in one.table.sequences] == [
            s.passed for s in other.table.sequences
        ] and one.table.state.tolist() == other.table.state.tolist()


@torch.no_grad()
def test_small_operations_are_compiled_once_a_text_is_long(quick, captured, monkeypatch):
    used = []
    monkeypatch.setattr(graph, "FUSE_AFTER", 10)
    monkeypatch.setattr(graph, "fused", lambda model: (used.append(model), graph.nullcontext())[1])
    model, ids = make(True), ids_of(1, 60)
    cache = model.new_kv_cache()
    model(ids[:, :12], past_key_values=cache)
    decode(model, cache, ids[:, 12:22])
    assert used == [] and captured[-1].compiled is None
    decode(model, cache, ids[:, 22:40])
    assert captured[-1].compiled is not None and captured[-1].calls > 5
    count = len(used)
    decode(model, cache, ids[:, 40:42])
    assert len(used) == count
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    other = model.new_kv_cache()
    model(ids[:, :12], past_key_values=other)
    decode(model, other, ids[:, 12:30])
    assert len(used) == count and captured[-1].compiled is None


@torch.no_grad()
def test_the_kernels_themselves_take_the_pages_that_the_host_gives(captured, monkeypatch):
    """Interpreted, and so slow: a few steps over two captures and pages of two rungs, against steps
    that Python runs."""
    monkeypatch.setattr(account, "LEAST_ENTRIES", 2)
    ids, runs = ids_of(1, 29), []
    for on in (False, True):
        model = make(on, budget=7_600, progressive=True)
        cache = model.new_kv_cache()
        model(ids[:, :21], past_key_values=cache)
        runs.append((decode(model, cache, ids[:, 21:]), cache))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True)) and same(
        runs[0][1], runs[1][1]
    )
    assert sum(x.calls for x in captured) >= 3


@pytest.mark.parametrize("progressive", [False, True])
@torch.no_grad()
def test_replayed_steps_that_are_cropped_leave_no_trace(progressive, quick, captured):
    """Up to a rollback of a page, over a page's boundary, again and again."""
    geometry = replace(GEOMETRY, rollback=GEOMETRY.page_tokens)
    ids, budget = ids_of(2, 90), 10**6 if progressive else None
    model = make(True, budget=budget, progressive=progressive, geometry=geometry, rollback=None)
    fresh, used = model.new_kv_cache(), model.new_kv_cache()
    for cache in (fresh, used):
        model(ids[:, :25], past_key_values=cache)
    replayed = sum(x.calls for x in captured)
    for more, less in ((7, 7), (3, 3), (8, 5), (1, 4), (8, 8)):
        decode(model, used, ids_of(2, more, seed=more))
        used.crop(-less)
    assert sum(x.calls for x in captured) > replayed + 10
    logits = [decode(model, cache, ids[:, 25:60]) for cache in (fresh, used)]
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True)) and same(fresh, used)
