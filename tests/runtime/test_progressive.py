"""The progressive policy: ladders, the order of lowering, a budget that is never passed at any
instant, and plain lists."""

import json
import weakref
from unittest import mock

import pytest
import torch
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache import DIM, GEOMETRY, HEADS, SPECS, PlainLists, contents
from torch.utils._python_dispatch import TorchDispatchMode

from kvfold import runtime
from kvfold.compress.cli import main
from kvfold.errors import KVBudgetExceeded, KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec, clip_rows
from kvfold.kernels.catalogue import HEAD_DIMS, key_formats, value_formats
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.kernels.quantizer import round_trip
from kvfold.runtime.backends.choose import backend_of
from kvfold.runtime.budget.ladder import Ladders, Step, distortion, finer, ladder
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.cache.layer import PackedLayer
from kvfold.runtime.cache.shared import SharedState
from kvfold.runtime.cache.store import LayerStore, Lowering
from kvfold.runtime.load import plain_cache

LOSSES = {"mixed": (0.02, 0.01), "ternary": (0.5, 0.1), "raw": (0.0, 0.0)}
PAGE, ROWS = GEOMETRY.page_tokens, GEOMETRY.raw_rows


def policy_of(names, geometry=GEOMETRY):
    return Ladders([SPECS[n] for n in names], [LOSSES[n] for n in names], geometry)


def make(names, budget):
    return QuantizedKVCache([SPECS[n] for n in names], GEOMETRY, budget, ladders=policy_of(names))


def lower(held, ids):
    """Pages of one layer go down at once."""
    with Lowering() as lowering:
        lowering.add(held, ids)


def feed(cache, tokens, batch=1, generator=None):
    """Appends random tokens to all layers; returns each layer's (keys, values)."""
    states = [
        torch.randn(2, batch, HEADS, tokens, DIM, generator=generator) * 2 for _ in cache.layers
    ]
    cache.note_padding(None, batch)
    for i, (keys, values) in enumerate(states):
        cache.update(keys, values, i)
    return states


# -- ladders ---------------------------------------------------------------------------------------


def test_a_ladder_adds_the_same_bits_to_every_class_of_the_floor():
    floor = Format(((8, 64), (24, 8), (16, 4), (8, 2), (8, 0)))
    assert floor.payload_bits == (8 * 6 + 24 * 3 + 16 * 2 + 8) / 64 + 8 / 64
    assert finer(floor, 4) == Format(((8, 256), (24, 32), (16, 16), (8, 8), (8, 4)))
    assert finer(floor, 8) == uniform(64, 256, "fp16")
    # of symmetric ternary codes, two bits each
    assert finer(Format(((16, 3),)), 4) == Format(((16, 16),))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_floors_of_the_catalogue_share_their_rungs(head_dim):
    floors = {*key_formats(head_dim), *value_formats(head_dim)}
    rungs = {floor: finer(floor, 4) for floor in floors}
    mixed = {rungs[floor] for floor in floors if floor.params == "scale" and floor.payload_bits < 4}
    assert (
        mixed
        == {uniform(head_dim, 16)}
        <= set(key_formats(head_dim)) & set(value_formats(head_dim))
    )
    assert all(
        rung == floor or rung.payload_bits > floor.payload_bits for floor, rung in rungs.items()
    )
    assert {finer(floor, 8) for floor in floors} == {
        uniform(head_dim, 256, "fp16"),
        raw16(head_dim),
    }
    assert all(0 <= distortion(rung, floor) <= 1 for floor, rung in rungs.items())


def test_a_rung_keeps_groups_and_types_and_is_never_smaller_than_the_floor():
    floor = uniform(64, 4, "fp16", 32)
    assert finer(floor, 4) == uniform(64, 16, "fp16", 32)
    assert finer(uniform(64, 64), 4) == uniform(64, 64)
    assert finer(raw16(64), 8) == raw16(64)


def test_rungs_that_save_nothing_are_left_out():
    def formats(key, value):
        return [
            (str(x.key.format), str(x.value.format))
            for x in ladder(LayerSpec(KeySpec(key), ValueSpec(value)))
        ]

    assert len(formats(raw16(16), raw16(16))) == 1
    assert formats(uniform(16, 256), uniform(16, 256)) == [("16@8 asym e4m3",) * 2, ("16", "16")]
    assert formats(uniform(16, 16), uniform(16, 16))[0] == ("16@4 asym e4m3",) * 2
    assert len(formats(uniform(16, 16), uniform(16, 16))) == 3
    mixed = formats(uniform(16, 64), uniform(16, 4))
    assert mixed[:2] == [("16@6 asym e4m3", "16@2 asym e4m3"), ("16@6 asym e4m3", "16@4 asym e4m3")]


def test_a_clip_stays_with_the_formats_that_it_was_chosen_for():
    clip = torch.tensor([0.9, 0.8])
    rungs = ladder(
        LayerSpec(KeySpec(uniform(16, 64), clip=clip), ValueSpec(uniform(16, 4), clip=clip))
    )
    assert [x.key.clip is clip for x in rungs] == [True, True, False, False]
    assert [x.value.clip is clip for x in rungs] == [True, False, False, False]


def test_distortion_by_hand():
    floor = Format(((8, 4), (8, 0)))
    assert distortion(floor, floor) == 1 and distortion(raw16(16), floor) == 0
    assert distortion(Format(((8, 16), (8, 4))), floor) == pytest.approx(
        (0.01154 / 0.1188 + 0.1188) / 2
    )


def test_the_least_harmful_steps_come_first_and_a_sensitive_layer_keeps_its_bits_longer():
    policy = policy_of(["mixed", "ternary", "mixed"])
    harms = [step.harm for step in policy.order]
    assert harms == sorted(harms)
    for layer in range(3):
        assert [step.rung for step in policy.order if step.layer == layer] == [3, 2, 1]
    place = {(step.layer, step.rung): i for i, step in enumerate(policy.order)}
    assert all(place[0, rung] < place[1, rung] for rung in (1, 2, 3))  # "ternary" loses more
    assert policy.order[0] == Step(0, 3, 384, policy.order[1].harm)  # alike: the lower layer first


def test_a_plan_by_hand():
    policy = policy_of(["mixed"])  # pages of 208, 304, 640 and 1024 bytes
    assert policy.sizes == [[208, 304, 640, 1024]] and policy.slack == 640
    counts = [[0, 0, 2, 3]]
    resident = 2 * 640 + 3 * 1024
    plan = policy.plan(counts, 1, resident, resident + 1024 + 640)
    assert plan.moves == [[0, 0, 0, 0]] and plan.fresh == [[0, 0, 0, 1]]
    plan = policy.plan(
        counts, 1, resident, resident + 640
    )  # 1024 bytes too many: three pages give 384 each
    assert plan.moves == [[0, 0, 0, 3]] and plan.fresh == [[0, 0, 0, 1]]
    plan = policy.plan(
        counts, 2, resident, resident + 640 + 100
    )  # 1948: all five give 1920, another step down gives 336
    assert plan.moves == [[0, 0, 1, 3]] and plan.fresh == [[0, 0, 2, 0]]
    floor = 208 * 7
    plan = policy.plan(counts, 2, resident, floor)
    assert plan.fresh == [[2, 0, 0, 0]] and plan.moves == [[0, 5, 5, 3]]
    assert policy.plan(counts, 2, resident, floor - 1) is None


# -- the cache -------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Counts the bytes of the cache's tensors that are alive, at every moment that a new one
    appears.

    A cache's tensors are told from those of the computation by their shapes: pages, 16-bit rows,
    block tables. A new tensor's bytes count together with those of all that still live.
    """

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.caches = {}, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, torch.Tensor)
            and out._base is None
            and out.data_ptr()
            and self._cached(out)
        ):
            number = id(out)
            if number not in self.alive:
                self.alive[number] = out.nbytes
                weakref.finalize(out, self.alive.pop, number, None)
                self.note()
        return out

    def _cached(self, x):
        page = (
            x.dtype == torch.uint8 and x.dim() == 1 and x.nbytes <= 1024
        )  # what block tables count from is larger
        rows = (
            x.dtype == torch.float16 and x.dim() == 4 and x.shape[2] == ROWS and x.shape[1] == HEADS
        )
        return page or rows or (x.dtype == torch.int64 and x.dim() == 2 and x.shape[1] % 16 == 0)

    def note(self):
        small = sum(
            t.nbytes
            for c in self.caches
            for x in c.layers
            if x.is_initialized
            for t in (x.table.state, x.table.segments)
        )
        self.peak = max(self.peak, small + sum(self.alive.values()))


def test_the_watch_sees_pages_and_copies():
    cache = make(["mixed"], 1 << 20)
    with Watch() as watch:
        watch.caches.append(cache)
        feed(cache, 60)
        watch.note()
        assert watch.peak == cache.nbytes
        before = cache.nbytes
        cache.batch_repeat_interleave(2)
        layer = cache.layers[0]
        assert watch.peak > cache.nbytes > before  # old and new rows for a moment
        watch.peak = 0
        lower(layer.held, layer.table.oldest(3, 1))
        assert watch.peak == cache.nbytes + 1024


class ProgressiveLists(PlainLists):
    """Plain lists whose pages stand on rungs; a page is re-quantised when the cache lowers it."""

    def __init__(self, spec, batch):
        super().__init__(spec, batch)
        self.rungs = ladder(spec)

    def requantise(self, b, page, rung):
        row, start = self.rows[b], GEOMETRY.sinks + page * PAGE
        sides = []
        for i, side in enumerate((self.rungs[rung].key, self.rungs[rung].value)):
            clip = None if side.clip is None else clip_rows(side.clip)
            tokens = torch.stack([row[t][i] for t in range(start, start + PAGE)], 1).float()
            sides.append(round_trip(tokens, side.format, clip).unbind(1))
        row[start : start + PAGE] = list(zip(*sides, strict=True))

    def lowered(self, layer, ids, to):
        for b, own in enumerate(layer.table.pages()):
            for page, number in enumerate(own):
                if number in ids:
                    self.requantise(b, page, to)

    def _pack(self, b):
        """Done by `settle`, which knows the new pages' rungs."""

    def settle(self, layer):
        for b, row in enumerate(self.rows):
            while len(row) - GEOMETRY.sinks - self.packed[b] - PAGE >= GEOMETRY.window:
                page = self.packed[b] // PAGE
                self.requantise(b, page, layer.table.pool.rung(layer.table.pages()[b][page]))
                self.packed[b] += PAGE


def check(cache, lists):
    for layer, own in zip(cache.layers, lists, strict=True):
        if not layer.is_initialized:
            assert not any(own.rows)
            continue
        assert layer.lengths() == [len(row) for row in own.rows]
        for b, row in enumerate(own.rows):
            if row:
                keys, values = contents(layer, b)
                torch.testing.assert_close(
                    keys, torch.stack([k.float() for k, _ in row], 1), rtol=1e-6, atol=1e-6
                )
                torch.testing.assert_close(
                    values, torch.stack([v.float() for _, v in row], 1), rtol=1e-6, atol=1e-6
                )
            rungs = [layer.table.pool.rung(i) for i in layer.table.pages()[b]]
            assert rungs == sorted(rungs)
            if len(layer.rungs) > 1:
                assert layer.table.segments[b].tolist() == [
                    *(sum(r < k for r in rungs) for k in range(len(layer.rungs))),
                    len(rungs),
                ]
        assert sum(layer.table.pool.counts) == layer.num_pages() == len(layer.table.pool)
    assert cache.nbytes == sum(t.nbytes for layer in cache.layers for t in layer.tensors())
    assert cache.budget is None or cache.nbytes <= cache.budget


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 300).filter(lambda n: n != ROWS)),
        st.tuples(st.just("append"), st.integers(1, 12)),
        st.tuples(st.just("steps"), st.integers(1, 20)),
        st.tuples(st.just("crop"), st.integers(0, 60)),
        st.tuples(st.just("keep"), st.integers(1, 90)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=4)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 5), min_size=4, max_size=4)),
        st.tuples(st.just("repeat"), st.integers(1, 3)),
        st.tuples(st.just("lower"), st.integers(1, 5)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    min_size=1,
    max_size=10,
)


@pytest.mark.parametrize(
    "names", [["mixed"], ["ternary"], ["raw", "mixed"], ["mixed", "ternary"]], ids="+".join
)
@settings(max_examples=examples(150), deadline=None)
@given(
    batch=st.integers(1, 3),
    budget=st.integers(9_000, 120_000),
    steps=operations,
    seed=st.integers(0, 2**16),
)
def test_any_sequence_of_operations_equals_plain_lists_and_stays_in_the_budget(
    names, batch, budget, steps, seed
):
    generator = torch.Generator().manual_seed(seed)
    cache = make(names, budget)
    lists, real_take = [ProgressiveLists(SPECS[n], batch) for n in names], LayerStore.take_down

    def follow(held, ids, to):
        down = held.table.pool.rung(ids[0]) - 1 if to is None else to
        lists[held.layer_idx].lowered(held, ids, down)
        return real_take(held, ids, to)

    def append(tokens):
        rows = len(lists[0].rows)
        before = [layer.lengths() for layer in cache.layers], cache.nbytes
        try:
            states = feed(cache, tokens, rows, generator)
        except KVBudgetExceeded as error:
            assert f"kv_budget is {budget}" in str(error)
            assert before == ([layer.lengths() for layer in cache.layers], cache.nbytes)
            return
        for layer, own, (keys, values) in zip(cache.layers, lists, states, strict=True):
            own.append(keys, values)
            own.settle(layer)

    with mock.patch.object(LayerStore, "take_down", follow), Watch() as watch:
        watch.caches.append(cache)
        for name, argument in [("append", 5), *steps]:
            rows = len(lists[0].rows)
            ready = cache.layers[0].is_initialized
            if name == "append":
                append(argument)
            elif name == "steps":
                for _ in range(argument):
                    append(1)
            elif name == "crop":
                cache.crop(-argument)
                for own in lists:
                    own.crop(argument)
            elif name == "keep":
                for own in lists:
                    own.crop(max(0, len(own.rows[0]) - argument))
                cache.crop(argument)
            elif name in ("select", "reorder", "repeat") and ready:
                indices = (
                    [i % rows for i in argument]
                    if name != "repeat"
                    else [i for i in range(rows) for _ in range(argument)]
                )
                if name == "reorder":
                    indices = indices[:rows]
                if len(indices) > 6 or (name == "reorder" and len(indices) != rows):
                    continue
                try:
                    if name == "select":
                        cache.batch_select_indices(torch.tensor(indices))
                    elif name == "reorder":
                        cache.reorder_cache(torch.tensor(indices))
                    else:
                        cache.batch_repeat_interleave(argument)
                except KVBudgetExceeded:
                    check(cache, lists)
                    continue
                for own in lists:
                    own.select(indices)
            elif name == "lower" and ready:
                for layer in cache.layers:
                    for rung in range(1, len(layer.rungs)):
                        if cache.nbytes + layer.table.pool.sizes[
                            rung - 1
                        ] * argument <= budget and (ids := layer.table.oldest(rung, argument)):
                            lower(layer.held, ids)
                    layer.table.publish()
            elif name == "reset":
                cache.reset()
                assert cache.nbytes == 0 and cache.get_seq_length() == 0
                lists = [ProgressiveLists(SPECS[n], rows) for n in names]
            check(cache, lists)
            watch.note()
    assert watch.peak <= budget


def test_shared_pages_are_lowered_once_for_all_owners():
    cache = make(["mixed"], 1 << 20)
    feed(cache, 60)
    cache.batch_repeat_interleave(3)
    layer = cache.layers[0]
    ids = layer.table.oldest(3, 2)
    assert ids == layer.table.pages()[0][:2]
    lower(layer.held, ids)
    layer.table.publish()
    assert layer.table.pool.counts == [0, 0, 2, 3] and layer.num_pages() == 5
    assert layer.table.segments.tolist() == [[0, 0, 0, 2, 5]] * 3
    for b in range(3):
        assert layer.table.block_table[b, :5].tolist() == layer.table.pool.addresses(
            layer.table.pages()[b]
        )


@pytest.mark.parametrize("batch, most", [(1, 2), (3, 5)])
def test_a_step_of_decoding_lowers_a_page_a_layer_and_none_when_a_page_comes(
    monkeypatch, batch, most
):
    """A batch of three, whose pages come due together every eight steps, needs more than that near
    the end."""
    cache = make(["mixed", "ternary"], 8_000 + 11_000 * batch)
    calls, lowered, real_take = [], [], LayerStore.take_down
    monkeypatch.setattr(
        LayerStore,
        "take_down",
        lambda held, ids, to: (calls.append(len(ids)), real_take(held, ids, to))[1],
    )
    feed(cache, 20, batch)
    pages = cache.layers[0].num_pages()
    with pytest.raises(KVBudgetExceeded):
        for _ in range(500):
            calls.clear()
            feed(cache, 1, batch)
            assert not calls or cache.layers[0].num_pages() == pages
            pages = cache.layers[0].num_pages()
            lowered.append(sum(calls))
    assert 2 <= max(lowered) <= most and sum(lowered) > 20 * batch
    assert sum(layer.table.pool.counts[0] for layer in cache.layers) > 10 * batch


def test_a_long_prompt_is_written_on_the_rung_that_fits(monkeypatch):
    cache = make(["mixed", "ternary"], 24_000)
    monkeypatch.setattr(LayerStore, "take_down", None)
    feed(cache, 200)
    assert cache.nbytes <= 24_000
    for layer in cache.layers:
        rungs = [layer.table.pool.rung(i) for i in layer.table.pages()[0]]
        assert len(rungs) == 23 and rungs == sorted(rungs) and rungs[0] < 3


def test_all_the_budget_is_used_and_the_floor_is_reached_before_it_is_refused():
    for names in (["mixed"], ["ternary", "mixed"]):
        policy = policy_of(names)
        tokens = GEOMETRY.sinks + GEOMETRY.window + 20 * PAGE
        cache = make(names, policy.least_nbytes(GEOMETRY, tokens))
        feed(cache, 30)
        for _ in range(tokens - 30):
            feed(cache, 1)
        assert cache.nbytes == cache.budget and all(
            sum(x.table.pool.counts[1:]) == 0 for x in cache.layers
        )
        feed(cache, PAGE - 1)
        with pytest.raises(
            KVBudgetExceeded,
            match=rf"with all pages at the lowest bits, but kv_budget is {cache.budget}",
        ):
            feed(cache, 1)
        assert cache.get_seq_length() == tokens + PAGE - 1
        cache.crop(-PAGE)
        feed(cache, PAGE)
        assert cache.nbytes == cache.budget


def test_a_ragged_batch_stays_in_the_budget():
    cache, lengths = make(["mixed", "ternary"], 44_000), [80, 3, 47]
    mask = torch.tensor([[0] * (80 - n) + [1] * (n + 60) for n in lengths])
    seen = 0
    for tokens in [50, 30, *[1] * 60]:
        seen += tokens
        cache.note_padding(mask[:, :seen], 3)
        for i in range(2):
            cache.update(*torch.randn(2, 3, HEADS, tokens, DIM), i)
        assert (
            cache.nbytes
            == sum(t.nbytes for layer in cache.layers for t in layer.tensors())
            <= cache.budget
        )
        for layer in cache.layers:
            for b, own in enumerate(layer.table.pages()):
                rungs = [layer.table.pool.rung(number) for number in own]
                assert rungs == sorted(rungs) and layer.table.segments[b, -1] == len(
                    own
                ) == GEOMETRY.num_pages(layer.lengths()[b])
    assert [layer.lengths() for layer in cache.layers] == [[n + 60 for n in lengths]] * 2
    assert all(
        min(layer.table.pool.rung(i) for i in layer.table.pages()[0]) < 3 for layer in cache.layers
    )


def test_the_report_adds_up():
    cache = make(["mixed", "raw"], 30_000)
    assert [row["pages"] for row in cache.report()] == [
        dict.fromkeys(names_of(layer), 0) for layer in cache.layers
    ]
    feed(cache, 120)
    report = cache.report()
    assert sum(row["bytes"] for row in report) == cache.nbytes
    assert [list(row["pages"]) for row in report] == [names_of(layer) for layer in cache.layers]
    assert [sum(row["pages"].values()) for row in report] == [13, 13]
    assert list(report[1]["pages"].values()) == [13] and report[0]["pages"]["K 16 | V 16"] < 13


def names_of(layer):
    return [f"K {rung.key.format} | V {rung.value.format}" for rung in reversed(layer.rungs)]


def test_what_is_not_finite_is_reported_and_not_stored():
    cache = make(["mixed"], 30_000)
    feed(cache, 60)
    keys, values = torch.randn(2, 1, HEADS, 9, DIM)
    keys[0, 1, 4, 2] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"Layer 0 computed a key .* at position 64 of sequence 0"
    ):
        cache.update(keys, values, 0)
    assert cache.layers[0].lengths() == [60]
    feed(cache, 9)


# -- a model ---------------------------------------------------------------------------------------


def ids(tokens, batch=1, seed=0):
    return torch.randint(32, 127, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"policy": "progressive"}, "policy='progressive' lowers pages as kv_budget fills, but there is none"),
        ({"policy": "ceiling"}, "policy 'ceiling' is not one this version knows; use 'floor' or 'progressive'"),
        ({"policy": "progressive", "kv_budget": "1MiB", "cuda_graph": True}, "cuda_graph=True needs a CUDA device"),
        ({"cuda_graph": "always"}, "cuda_graph='always' is not one this version knows; use 'auto', True or False"),
        ({"policy": "progressive", "kv_budget": "much"}, "'much' is not a number of bytes"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(tiny_artifact, options, message):
    with pytest.raises(KvfoldError, match=message):
        runtime.load_pretrained(tiny_artifact, device="cpu", **options)


def test_the_least_budget_is_named_and_works(tiny_artifact):
    with pytest.raises(
        KvfoldError, match=r"kv_budget=9KiB is too small: sinks, window and one page take \d+ bytes"
    ) as error:
        runtime.load_pretrained(tiny_artifact, device="cpu", policy="progressive", kv_budget="9KiB")
    least = int(str(error.value).split("take ")[1].split()[0])
    with pytest.raises(KvfoldError, match=f"take {least} bytes"):
        runtime.load_pretrained(
            tiny_artifact, device="cpu", policy="progressive", kv_budget=least - 1
        )
    model = runtime.load_pretrained(
        tiny_artifact, device="cpu", policy="progressive", kv_budget=least
    )
    g = model.kv_artifact.geometry
    with torch.no_grad():
        cache = model(ids(g.sinks + g.window + g.page_tokens)).past_key_values
        assert cache.nbytes == least and cache.layers[0].num_pages() == 1
        with pytest.raises(KVBudgetExceeded):
            model(ids(g.page_tokens), past_key_values=cache)


@torch.no_grad()
def test_generation_under_a_budget(tiny_artifact):
    plenty = runtime.load_pretrained(
        tiny_artifact, device="cpu", policy="progressive", kv_budget="4MiB"
    )
    tight = runtime.load_pretrained(
        tiny_artifact, device="cpu", policy="progressive", kv_budget="60KiB"
    )
    wide = runtime.load_pretrained(
        tiny_artifact, device="cpu", policy="progressive", kv_budget="90KiB"
    )
    floor = runtime.load_pretrained(tiny_artifact, device="cpu")
    tokens = ids(60)
    with plain_cache(floor):
        plain = floor(tokens).logits
    errors = [
        (model(tokens).logits - plain).square().mean().sqrt() / plain.std()
        for model in (plenty, floor)
    ]
    assert (
        errors[0] < 0.01 < errors[1]
    )  # nothing is lowered yet, and 16 bits of a key are all that it loses
    out = tight.generate(tokens, max_new_tokens=300, do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    assert out.sequences.shape == (1, 360) and 50_000 < cache.nbytes <= 60 * 1024
    assert [len(row["pages"]) for row in cache.report()] == [
        len(layer.rungs) for layer in cache.layers
    ]
    beams = wide.generate(
        tokens, max_new_tokens=40, do_sample=False, num_beams=3, return_dict_in_generate=True
    )
    assert 60 * 1024 < beams.past_key_values.nbytes <= 90 * 1024
    ran = []
    tight.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(True))
    with pytest.raises(KVBudgetExceeded, match=r"360 tokens in 12 sequence\(s\)"):
        tight(ids(360, 12))
    assert not ran  # before anything is computed


def test_inspect_live_shows_a_cache_that_fills(tiny_artifact, capsys):
    with pytest.raises(SystemExit) as done:
        main(["inspect", str(tiny_artifact), "--live", "--policy", "progressive", "--kv-budget", "40KiB",
              "--max-new-tokens", "150", "--device", "cpu"])  # fmt: skip
    shown = capsys.readouterr().out
    assert (
        not done.value.code and shown.count("pages by format") == 11
    )  # 150 / 16 rounded up, and the end
    assert "168 tokens" in shown and " of 40.00 KiB" in shown and "K 16 | V 16" in shown
    with pytest.raises(SystemExit) as done:
        main(
            [
                "inspect",
                str(tiny_artifact),
                "--live",
                "--prompt",
                "ab",
                "--max-new-tokens",
                "90",
                "--json",
            ]
        )
    rows = json.loads(capsys.readouterr().out)
    assert (
        not done.value.code and [row["tokens"] for row in rows] == [[91]] * 3
    )  # the last token is not yet cached
    with pytest.raises(SystemExit) as done:
        main(["inspect", str(tiny_artifact), "--live", "--policy", "progressive"])
    assert done.value.code == 2 and "give kv_budget='1GiB'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mixed", "ternary"])
def test_kernels_write_and_lower_pages_to_the_bytes_of_the_reference(name):
    geometry = Geometry(HEADS, DIM, sinks=3, window=10, page_tokens=16)
    rungs = ladder(SPECS[name])
    layers = [
        PackedLayer(rungs, SharedState(geometry, [0, 0]), 0, backend_of(triton))
        for triton in (False, True)
    ]
    keys, values = torch.randn(2, 2, HEADS, 80, DIM)
    for layer in layers:
        layer.plan([[0, 1, 2, 3], [1, 1, 3, 3]])
        layer.update(keys, values)
        for rung, count in ((3, 3), (2, 2), (1, 1)):
            lower(layer.held, layer.table.oldest(rung, count))
        layer.table.publish()
        for b in range(2):
            assert [layer.table.pool.rung(i) for i in layer.table.pages()[b]] == [0, 1, 1, 2]
            assert layer.table.block_table[b, :4].tolist() == layer.table.pool.addresses(
                layer.table.pages()[b]
            )
    for b in range(2):
        for ours, theirs in zip(*(layer.table.pages()[b] for layer in layers), strict=True):
            assert torch.equal(layers[0].table.pool.page(ours), layers[1].table.pool.page(theirs))


def test_a_floor_cache_does_not_grow_past_its_budget_by_repeating_sequences():
    spec = SPECS["mixed"]
    cache = QuantizedKVCache([spec], GEOMETRY, 12_000)
    feed(cache, 60, 2)
    before = cache.nbytes
    with pytest.raises(
        KVBudgetExceeded,
        match=r"60 tokens in 6 sequence\(s\) need a cache of \d+ bytes, but kv_budget is 12000",
    ):
        cache.batch_repeat_interleave(3)
    assert cache.nbytes == before and cache.layers[0].lengths() == [60, 60]
    cache.reorder_cache(torch.tensor([1, 0]))


def test_a_policy_needs_a_budget():
    with pytest.raises(KvfoldError, match="as kv_budget fills, but there is none; give kv_budget"):
        QuantizedKVCache([SPECS["mixed"]], GEOMETRY, ladders=policy_of(["mixed"]))
