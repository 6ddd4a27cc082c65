"""The progressive policy: ladders, the order of lowering, a budget that is never passed at any instant, and plain lists."""

import weakref
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache import DIM, GEOMETRY, HEADS, SPECS, PlainLists, contents
from torch.utils._python_dispatch import TorchDispatchMode

from kvfold.errors import KVBudgetExceeded
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec, clip_rows
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.kernels.quantizer import round_trip
from kvfold.runtime import lower as lowering
from kvfold.runtime.cache import QuantizedKVCache
from kvfold.runtime.pages import lower, oldest, set_segments
from kvfold.runtime.policy import Progressive, Step, distortion, finer, ladder

LOSSES = {"mixed": (0.02, 0.01), "ternary": (0.5, 0.1), "raw": (0.0, 0.0)}
PAGE, ROWS = GEOMETRY.page_tokens, GEOMETRY.raw_rows


def policy_of(names, geometry=GEOMETRY):
    return Progressive([SPECS[n] for n in names], [LOSSES[n] for n in names], geometry)


def make(names, budget):
    return QuantizedKVCache([SPECS[n] for n in names], GEOMETRY, budget, policy=policy_of(names))


def feed(cache, tokens, batch=1, generator=None):
    """Appends random tokens to all layers; returns each layer's (keys, values)."""
    states = [torch.randn(2, batch, HEADS, tokens, DIM, generator=generator) * 2 for _ in cache.layers]
    cache.note_padding(None, batch)
    for i, (keys, values) in enumerate(states):
        cache.update(keys, values, i)
    return states


# -- ladders -----------------------------------------------------------------------------------------------------------


def test_a_ladder_adds_the_same_bits_to_every_class_of_the_floor():
    floor = Format(((8, 64), (24, 8), (16, 4), (8, 2), (8, 0)))
    assert floor.payload_bits == (8 * 6 + 24 * 3 + 16 * 2 + 8) / 64 + 8 / 64
    assert finer(floor, 4) == Format(((8, 256), (24, 32), (16, 16), (8, 8), (8, 4)))
    assert finer(floor, 8) == Format(((64, 256),))
    # of symmetric ternary codes, two bits each
    assert finer(Format(((16, 3),)), 4) == Format(((16, 16),))


def test_a_rung_keeps_groups_and_types_and_is_never_smaller_than_the_floor():
    floor = uniform(64, 4, "fp16", 32)
    assert finer(floor, 4) == uniform(64, 16, "fp16", 32)
    assert finer(uniform(64, 64), 4) == uniform(64, 64)
    assert finer(raw16(64), 8) == raw16(64)


def test_rungs_that_save_nothing_are_left_out():
    def formats(key, value):
        return [(str(x.key.format), str(x.value.format)) for x in ladder(LayerSpec(KeySpec(key), ValueSpec(value)))]

    assert len(formats(raw16(16), raw16(16))) == 1
    assert formats(uniform(16, 256), uniform(16, 256)) == [("16@8 asym e4m3",) * 2, ("16", "16")]
    assert formats(uniform(16, 16), uniform(16, 16))[0] == ("16@4 asym e4m3",) * 2
    assert len(formats(uniform(16, 16), uniform(16, 16))) == 3
    mixed = formats(uniform(16, 64), uniform(16, 4))
    assert mixed[:2] == [("16@6 asym e4m3", "16@2 asym e4m3"), ("16@6 asym e4m3", "16@4 asym e4m3")]


def test_a_clip_stays_with_the_formats_that_it_was_chosen_for():
    clip = torch.tensor([0.9, 0.8])
    rungs = ladder(LayerSpec(KeySpec(uniform(16, 64), clip=clip), ValueSpec(uniform(16, 4), clip=clip)))
    assert [x.key.clip is clip for x in rungs] == [True, True, False, False]
    assert [x.value.clip is clip for x in rungs] == [True, False, False, False]


def test_distortion_by_hand():
    floor = Format(((8, 4), (8, 0)))
    assert distortion(floor, floor) == 1 and distortion(raw16(16), floor) == 0
    assert distortion(Format(((8, 16), (8, 4))), floor) == pytest.approx((0.01154 / 0.1188 + 0.1188) / 2)


def test_the_least_harmful_steps_come_first_and_a_sensitive_layer_keeps_its_bits_longer():
    policy = policy_of(["mixed", "ternary", "mixed"])
    harms = [step.harm for step in policy.order]
    assert harms == sorted(harms)
    for layer in range(3):
        assert [step.rung for step in policy.order if step.layer == layer] == [3, 2, 1]
    place = {(step.layer, step.rung): i for i, step in enumerate(policy.order)}
    assert all(place[0, rung] < place[1, rung] for rung in (1, 2, 3))  # "ternary" loses more
    assert policy.order[0] == Step(0, 3, 464, policy.order[1].harm)  # alike: the lower layer first


def test_a_plan_by_hand():
    policy = policy_of(["mixed"])  # pages of 208, 304, 560 and 1024 bytes
    assert policy.sizes == [[208, 304, 560, 1024]] and policy.slack == 560
    counts = [[0, 0, 2, 3]]
    resident = 2 * 560 + 3 * 1024
    plan = policy.plan(counts, 1, resident, resident + 1024 + 560)
    assert plan.moves == [[0, 0, 0, 0]] and plan.fresh == [[0, 0, 0, 1]]
    plan = policy.plan(counts, 1, resident, resident + 560)  # 1024 bytes too many: three pages give 464 each
    assert plan.moves == [[0, 0, 0, 3]] and plan.fresh == [[0, 0, 0, 1]]
    plan = policy.plan(counts, 2, resident, resident + 560 + 100)  # 1948: all five give 464, and no more is needed
    assert plan.moves == [[0, 0, 0, 3]] and plan.fresh == [[0, 0, 0 + 2, 0]]
    floor = 208 * 7
    plan = policy.plan(counts, 2, resident, floor)
    assert plan.fresh == [[2, 0, 0, 0]] and plan.moves == [[0, 5, 5, 3]]
    assert policy.plan(counts, 2, resident, floor - 1) is None


# -- the cache ---------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Counts the bytes of the cache's tensors that are alive, at every moment that a new one appears.

    A cache's tensors are told from those of the computation by their shapes: pages, 16-bit rows, block tables. A new tensor's
    bytes count together with those of all that still live.
    """

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.caches = {}, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out._base is None and out.data_ptr() and self._cached(out):
            number = id(out)
            if number not in self.alive:
                self.alive[number] = out.nbytes
                weakref.finalize(out, self.alive.pop, number, None)
                self.note()
        return out

    def _cached(self, x):
        page = x.dtype == torch.uint8 and x.dim() == 1 and x.nbytes <= 1024  # what block tables count from is larger
        rows = x.dtype == torch.float16 and x.dim() == 4 and x.shape[2] == ROWS and x.shape[1] == HEADS
        return page or rows or (x.dtype == torch.int64 and x.dim() == 2 and x.shape[1] % 16 == 0)

    def note(self):
        small = sum(t.nbytes for c in self.caches for x in c.layers if x.is_initialized for t in (x.state, x.segments))
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
        lower(layer, oldest(layer, 3, 1))
        assert watch.peak == cache.nbytes + 1024


class ProgressiveLists(PlainLists):
    """Plain lists whose pages stand on rungs; a page is re-quantised when the cache lowers it."""

    def __init__(self, spec, batch):
        super().__init__(spec, batch)
        self.rungs = ladder(spec)

    def quantised(self, x, side):
        clip = None if side.clip is None else clip_rows(side.clip)
        return round_trip(x[:, None].float(), side.format, clip)[:, 0]

    def requantise(self, b, page, rung):
        row, start = self.rows[b], GEOMETRY.sinks + page * PAGE
        for t in range(start, start + PAGE):
            row[t] = tuple(self.quantised(x, side) for x, side in zip(row[t], (self.rungs[rung].key, self.rungs[rung].value), strict=True))  # fmt: skip

    def lowered(self, layer, ids):
        for b, own in enumerate(layer.pages):
            for page, number in enumerate(own):
                if number in ids:
                    self.requantise(b, page, layer.pool.rung(number) - 1)

    def _pack(self, b):
        """Done by `settle`, which knows the new pages' rungs."""

    def settle(self, layer):
        for b, row in enumerate(self.rows):
            while len(row) - GEOMETRY.sinks - self.packed[b] - PAGE >= GEOMETRY.window:
                page = self.packed[b] // PAGE
                self.requantise(b, page, layer.pool.rung(layer.pages[b][page]))
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
                torch.testing.assert_close(keys, torch.stack([k.float() for k, _ in row], 1), rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(values, torch.stack([v.float() for _, v in row], 1), rtol=1e-6, atol=1e-6)
            rungs = [layer.pool.rung(i) for i in layer.pages[b]]
            assert rungs == sorted(rungs)
            if len(layer.rungs) > 1:
                assert layer.segments[b].tolist() == [*(sum(r < k for r in rungs) for k in range(len(layer.rungs))), len(rungs)]  # fmt: skip
        assert sum(layer.pool.counts) == layer.num_pages() == len(layer.pool)
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


@settings(max_examples=200, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(SPECS)), min_size=1, max_size=2),
    batch=st.integers(1, 3),
    budget=st.integers(9_000, 120_000),
    steps=operations,
    seed=st.integers(0, 2**16),
)
def test_any_sequence_of_operations_equals_plain_lists_and_stays_in_the_budget(names, batch, budget, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    cache = make(names, budget)
    lists = [ProgressiveLists(SPECS[n], batch) for n in names]

    def follow(layer, ids):
        lists[layer.layer_idx].lowered(layer, ids)
        lower(layer, ids)

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

    with mock.patch.object(lowering, "lower", follow), Watch() as watch:
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
                indices = [i % rows for i in argument] if name != "repeat" else [i for i in range(rows) for _ in range(argument)]  # fmt: skip
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
                        if cache.nbytes + layer.pool.sizes[rung - 1] * argument <= budget and (
                            ids := oldest(layer, rung, argument)
                        ):
                            follow(layer, ids)
                    set_segments(layer)
            elif name == "reset":
                cache.reset()
                assert cache.nbytes == 0 and cache.get_seq_length() == 0
                lists = [ProgressiveLists(SPECS[n], rows) for n in names]
            check(cache, lists)
            watch.note()
    assert watch.peak <= budget
