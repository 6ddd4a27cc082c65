"""Pages of several layers that go down together, against a layer and a page at a time; and what
steps keep up with instead of finding it anew."""

import copy
from bisect import bisect_left

import pytest
import torch
from test_cache import DIM, GEOMETRY, HEADS, SPECS
from test_progressive import feed, make, policy_of

from kvfold.exports.account import Geometry
from kvfold.exports.spec import clip_rows
from kvfold.kernels.quantizer import round_trip
from kvfold.runtime.backends.choose import backend_of
from kvfold.runtime.backends.reference import Reference
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.cache.store import LayerStore, Lowering

NAMES = ["mixed", "ternary", "raw", "mixed"]


class Counted(Reference):
    """The reference, which counts what goes down together."""

    def __init__(self):
        self.work = []

    def lower_pages(self, geometry, work):
        self.work.append([len(pages.old) for pages in work])
        super().lower_pages(geometry, work)


def filled(names, lengths, backend=None, budget=1 << 24, geometry=GEOMETRY, seed=3):
    """A cache of sequences of these lengths, all pages in 16 bits."""
    generator, longest = torch.Generator().manual_seed(seed), max(lengths)
    cache = QuantizedKVCache(
        [SPECS[n] for n in names], geometry, budget, *([] if backend is None else [backend]),
        ladders=policy_of(names, geometry),
    )  # fmt: skip
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    cache.note_padding(mask, len(lengths))
    for i in range(len(names)):
        cache.update(*torch.randn(2, len(lengths), HEADS, longest, DIM, generator=generator), i)
    return cache


def publish(cache):
    for layer in cache.layers:
        layer.table.publish()


def same(one, other):
    """Pages, rungs and what the device was told of them."""
    for a, b in zip(one.layers, other.layers, strict=True):
        for row, theirs in zip(a.table.pages(), b.table.pages(), strict=True):
            assert [a.table.pool.rung(i) for i in row] == [b.table.pool.rung(i) for i in theirs]
            for i, j in zip(row, theirs, strict=True):
                assert torch.equal(a.table.pool.page(i), b.table.pool.page(j))
        assert torch.equal(a.table.segments, b.table.segments)


def told(cache):
    """The device knows of every page where it lies and on which rung it stands."""
    for layer in cache.layers:
        table = layer.table
        for b, row in enumerate(table.pages()):
            assert table.block_table[b, : len(row)].tolist() == table.pool.addresses(row)
            cuts = [bisect_left(row, r, key=table.pool.rung) for r in range(table.rungs)]
            if table.rungs > 1:
                assert table.cuts()[b] == [*cuts, len(row)] == table.segments[b].tolist()
        assert table.pool.nbytes == sum(t.nbytes for t in table.pool.tensors())


def twins(lengths, triton):
    """Two caches alike, on one of the backends."""
    geometry = Geometry(HEADS, DIM, sinks=3, window=10, page_tokens=8)
    if triton:
        pytest.importorskip("triton")
    return [filled(NAMES, lengths, backend_of(triton), geometry=geometry) for _ in range(2)]


MOVES = [(0, 3, 3), (3, 3, 5), (1, 3, 2), (0, 2, 2), (3, 2, 1), (0, 1, 1), (1, 2, 1), (0, 3, 1)]


@pytest.mark.parametrize("lengths", [[80], [80, 33, 61]], ids=str)
@pytest.mark.parametrize("triton", [False, True])
def test_layers_and_rungs_together_are_a_page_at_a_time(lengths, triton):
    caches = twins(lengths, triton)
    with Lowering() as lowering:
        for i, rung, count in MOVES:
            held = caches[0].layers[i].held
            lowering.add(held, held.table.oldest(rung, count))
    for i, rung, count in MOVES:
        for _ in range(count):
            held = caches[1].layers[i].held
            with Lowering() as lowering:
                lowering.add(held, held.table.oldest(rung, 1))
    for cache in caches:
        publish(cache)
        told(cache)
    same(*caches)
    assert caches[0].layers[0].table.pool.counts[:2] == [1, 1]


@pytest.mark.parametrize("lengths", [[80], [80, 33, 61]], ids=str)
@pytest.mark.parametrize("triton", [False, True])
def test_pages_that_go_down_several_rungs_are_requantised_once(lengths, triton):
    """They end where they would from rung to rung, with what their first bytes give there."""
    caches = twins(lengths, triton)
    moves = [0, 2, 4, 6]
    far = 0
    for layer, twin in zip(*(cache.layers for cache in caches), strict=True):
        held, own = layer.held, moves[: len(layer.held.rungs)]
        found = held.table.descents(own)
        assert sum((rung - to) * len(ids) for rung, to, ids in found) == sum(own)
        before = {i: held.read_pages([i]) for _, _, ids in found for i in ids}
        with Lowering() as lowering:
            for _, to, ids in found:
                lowering.add(held, ids, to)
        for rung in range(len(own) - 1, 0, -1):
            with Lowering() as lowering:
                lowering.add(twin.held, twin.held.table.oldest(rung, own[rung]))
        for row, theirs in zip(layer.table.pages(), twin.table.pages(), strict=True):
            rungs = [twin.table.pool.rung(i) for i in theirs]
            assert [layer.table.pool.rung(i) for i in row] == rungs
        for rung, to, ids in found:
            far += rung - to > 1
            for i in ids:
                for side, was, now in zip("kv", before[i], held.read_pages([i]), strict=True):
                    spec = held.rungs[to].key if side == "k" else held.rungs[to].value
                    clip = None if spec.clip is None else clip_rows(spec.clip)
                    assert torch.equal(now, round_trip(was, spec.format, clip))
    publish(caches[0])
    told(caches[0])
    assert far >= 3


def test_a_chunk_that_needs_much_room_lowers_each_page_once(monkeypatch):
    cache = make(["mixed", "ternary"], 24_000)
    feed(cache, 60)
    moved, real = [], LayerStore.take_down

    def follow(held, ids, to):
        moved.extend((held.layer_idx, i, held.table.pool.rung(i) - to) for i in ids)
        return real(held, ids, to)

    monkeypatch.setattr(LayerStore, "take_down", follow)
    feed(cache, 200)
    assert cache.nbytes <= 24_000
    assert max(rungs for *_, rungs in moved) > 1
    assert len({(layer, i) for layer, i, _ in moved}) == len(moved)
    publish(cache)
    told(cache)


def test_pages_that_have_just_come_down_wait_for_their_bytes():
    backend = Counted()
    cache = filled(["mixed", "mixed"], [80], backend)
    one, other = (layer.held for layer in cache.layers)
    old = sum(one.table.pool.sizes[3:]) * 3
    with Lowering() as lowering:
        assert lowering.add(one, one.table.oldest(3, 2)) == 0
        assert lowering.add(other, other.table.oldest(3, 1)) == 0 and not backend.work
        assert lowering.add(one, one.table.oldest(2, 1)) == old
        assert backend.work == [[2, 1]]
    assert backend.work == [[2, 1], [1]]


def test_shared_pages_of_beams_go_down_once_and_rows_go_on_apart():
    cache = make(["mixed", "ternary"], 1 << 20)
    feed(cache, 60)
    cache.batch_repeat_interleave(3)
    feed(cache, 13, 3)  # pages of their own
    with Lowering() as lowering:
        for layer, count in zip(cache.layers, (4, 7), strict=True):
            ids = layer.table.oldest(3, count)
            assert len(ids) == count
            lowering.add(layer.held, ids)
    cache.reorder_cache(torch.tensor([2, 0, 0]))  # before the device was told
    publish(cache)
    told(cache)
    cuts = [[row[3] for row in layer.table.cuts()] for layer in cache.layers]
    assert cuts == [[4, 4, 4], [5, 6, 6]]


def test_steps_keep_up_with_what_they_change():
    """Steps with pages and without, crops, a chunk and rows that come and go."""
    cache = make(NAMES, 110_000)
    feed(cache, 60, 2)
    for call in range(150):
        feed(cache, 1, 2)
        if call == 60:
            cache.crop(-11)
        elif call == 90:
            feed(cache, 21, 2)
        elif call == 110:
            cache.batch_select_indices(torch.tensor([1, 1]))
        told(cache)
    assert all(
        layer.table.pool.counts[-1] < layer.num_pages()
        for layer in cache.layers
        if len(layer.rungs) > 1
    )
    twin = copy.deepcopy(cache)
    told(twin)
    same(cache, twin)


def test_what_goes_down_before_a_step_goes_in_few_launches():
    """As many as the room takes: at first one page stands on two rungs, and each that has gone down
    makes room for more."""
    backend, names, calls = Counted(), ["mixed", "ternary"] * 8, []
    cache = filled(names, [200], backend, budget=330_000)
    for _ in range(200):
        backend.work.clear()
        feed(cache, 1)
        assert cache.nbytes <= cache.budget
        calls.append((len(backend.work), sum(map(sum, backend.work))))
    assert max(pages for _, pages in calls) == len(names)
    assert max(launches for launches, _ in calls) <= 6


def test_a_failure_leaves_no_page_without_bytes(monkeypatch):
    """What waits goes down also where something fails meanwhile."""
    backend = Counted()
    cache, other = (filled(["mixed", "mixed"], [80], x) for x in (backend, None))
    held = [layer.held for layer in cache.layers]
    real = LayerStore.take_down

    def fail(store, ids, to):
        if store is held[1]:
            raise MemoryError
        return real(store, ids, to)

    monkeypatch.setattr(LayerStore, "take_down", fail)
    with pytest.raises(MemoryError), Lowering() as lowering:
        for store in held:
            lowering.add(store, store.table.oldest(3, 2))
    monkeypatch.undo()
    with Lowering() as lowering:
        first = other.layers[0].held
        lowering.add(first, first.table.oldest(3, 2))
    for x in (cache, other):
        publish(x)
        told(x)
    same(cache, other)
    assert backend.work == [[2]]
