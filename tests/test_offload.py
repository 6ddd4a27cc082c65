"""Pages in host memory: whatever is done, the cache equals one that keeps all pages on the device, to the bit, within its budget."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvfold import KvfoldError
from kvfold.errors import KVBudgetExceeded
from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.runtime.branches import resident_nbytes
from kvfold.runtime.cache import QuantizedKVCache
from kvfold.runtime.pager import Pager

HEADS, DIM, LAYERS = 1, 8, 5
SPECS = [
    LayerSpec(KeySpec(uniform(DIM, 16)), ValueSpec(uniform(DIM, 4))),
    LayerSpec(KeySpec(uniform(DIM, 4, "fp16", 8)), ValueSpec(uniform(DIM, 8, "e4m3", 8))),
    LayerSpec(KeySpec(raw16(DIM)), ValueSpec(raw16(DIM))),
    LayerSpec(KeySpec(Format(((8, 64),)), offset=torch.ones(HEADS, DIM)), ValueSpec(uniform(DIM, 2))),
    LayerSpec(KeySpec(uniform(DIM, 16)), ValueSpec(uniform(DIM, 16))),
]


def pager_of(geometry, specs, chunk_pages=2, buffers=1):
    return Pager([geometry.pair_nbytes(s.key.format, s.value.format) for s in specs], chunk_pages, buffers)


def pair_of(geometry, budget, chunk_pages=2, buffers=1, specs=SPECS):
    pager = pager_of(geometry, specs, chunk_pages, buffers)
    return QuantizedKVCache(specs, geometry), QuantizedKVCache(specs, geometry, budget, offload=pager)


def append(caches, tokens, rows, generator, pads):
    """The same tokens for both, attended to in each layer; asserts that both see the same."""
    plain, away = caches
    mask = torch.arange(plain.get_seq_length() + tokens) >= torch.tensor(pads)[:, None]
    for cache in caches:
        cache.note_padding(mask.long(), rows)
    for i in range(len(plain.layers)):
        keys, values = torch.randn(2, rows, HEADS, tokens, DIM, generator=generator) * 2
        query = torch.randn(rows, 2 * HEADS, tokens, DIM, generator=generator)
        views = [cache.update(keys, values, i)[0] for cache in caches]
        assert away.nbytes <= away.budget and away.nbytes == walked(away)
        plain_out, out = (view.attend(query, 0.3, None) for view in views)
        assert torch.equal(plain_out, out)


def walked(cache):
    """Bytes on the device by a walk over tensors."""
    return sum(t.nbytes for layer in cache.layers for t in layer.tensors()) + sum(
        t.nbytes for t in cache.pager.tensors()
    )


def check(plain, away):
    assert away.nbytes <= away.budget and away.nbytes == walked(away) == resident_nbytes([away])
    chunks = {i: len(pool.chunks) for i, pool in away.pager.pools.items()}
    assert away.pager.nbytes == away.pager.staging(chunks)
    assert [t.numel() for stage in away.pager.stages for t in stage].count(0) == 0
    assert sum(row["host_bytes"] for row in away.report()) == away.host_nbytes
    for one, other in zip(plain.layers, away.layers, strict=True):
        assert one.lengths() == other.lengths() and one.columns == other.columns
        if not one.is_initialized:
            assert not other.is_initialized
            continue
        assert one.state.tolist() == other.state.tolist() and one.oldest == other.oldest
        pool = other.pool
        assert one.num_pages() == other.num_pages()
        if not other.shares_pool:
            assert set(pool.resident) | set(pool.slots) == {i for ids in other.pages for i in ids if i >= 0}
        assert not set(pool.resident) & set(pool.slots) and len(set(pool.slots.values())) == len(pool.slots)
        assert sorted([*pool.slots.values(), *pool.free]) == list(range(len(pool.chunks) * away.pager.chunk_pages))
        other.bring()
        for b, length in enumerate(one.length):
            passed = one.passed[b]
            ids = [layer.pages[b][passed:] for layer in (one, other)]
            assert len(ids[0]) == len(ids[1]) and other.passed[b] == passed
            for x, y in zip(*ids, strict=True):
                assert torch.equal(one.pool.page(x), pool.page(y))
            if ids[0]:
                for x, y in zip(one.read_pages(ids[0]), other.read_pages(ids[1]), strict=True):
                    assert torch.equal(x, y)
            held = [
                *range(min(one.geometry.sinks, length)),
                *range(max(one.oldest[b], length - one.geometry.ring), length),
            ]
            slots = one.slots(0, length)[held]
            assert torch.equal(one.raw_keys[b][:, slots], other.raw_keys[b][:, slots])
            assert torch.equal(one.raw_values[b][:, slots], other.raw_values[b][:, slots])
            entries = other.block_table[b, passed : len(other.pages[b])].tolist()
            assert entries == pool.addresses(ids[1])


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 130)),
        st.tuples(st.just("append"), st.integers(1, 20)),
        st.tuples(st.just("append"), st.just(1)),
        st.tuples(st.just("crop"), st.integers(0, 90)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
        st.tuples(st.just("repeat"), st.integers(1, 3)),
        st.tuples(st.just("fork"), st.integers(1, 2)),
        st.tuples(st.just("ring"), st.integers(0, 30)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    min_size=2,
    max_size=9,
)
geometries = st.builds(
    lambda sinks, window, page, sliding, rollback: Geometry(HEADS, DIM, sinks, window, page, (0, sliding, 0, 0, 0), rollback),
    st.sampled_from([0, 3]), st.sampled_from([0, 5, 10]), st.sampled_from([8, 16]), st.sampled_from([0, 19]), st.sampled_from([0, 7]),
)  # fmt: skip


@settings(max_examples=350, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    geometry=geometries, steps=operations, seed=st.integers(0, 2**16), room=st.integers(0, 6000),
    chunk_pages=st.sampled_from([1, 2, 3]), buffers=st.sampled_from([1, 2]), pads=st.sampled_from([[0], [0, 5]]),
)  # fmt: skip
def test_any_sequence_of_operations_equals_a_cache_without(geometry, steps, seed, room, chunk_pages, buffers, pads):
    generator = torch.Generator().manual_seed(seed)
    fixed = len(SPECS) * len(pads) * geometry.table_nbytes(16)
    plain, away = pair_of(geometry, fixed + 2000 + room, chunk_pages, buffers)
    rows, forks = list(pads), []
    for name, argument in [("append", 30), *steps]:
        before = plain.get_seq_length()
        if name == "append":
            state = generator.get_state()
            try:
                append((plain, away), argument, len(rows), generator, rows)
            except KVBudgetExceeded:  # refused in the first layer, before anything was stored of it
                assert away.get_seq_length() == before
                plain.crop(before - plain.get_seq_length())
                generator.set_state(state)
                if plain.geometry.rollback < argument:
                    return  # the plain cache's crop went too far back to be exact
        elif name == "crop":
            refused = []
            for cache in (plain, away):
                try:
                    cache.crop(-argument)
                except KvfoldError:
                    refused.append(cache)
            assert len(refused) in (0, 2)
        elif name in ("select", "repeat"):
            chosen = (
                [i % len(rows) for i in argument]
                if name == "select"
                else [i for i in range(len(rows)) for _ in range(argument)]
            )
            if len(chosen) > 4:
                continue
            try:
                away.batch_select_indices(torch.tensor(chosen)) if name == "select" else away.batch_repeat_interleave(
                    argument
                )
            except KVBudgetExceeded:
                check(plain, away)
                continue
            plain.batch_select_indices(torch.tensor(chosen))
            rows = [rows[i] for i in chosen]
        elif name == "fork":
            pairs = list(zip(plain.fork(argument), away.fork(argument), strict=True))
            forks = [(plain, away, list(rows)), *((*pair, list(rows)) for pair in pairs[1:])][-2:]
            plain, away = pairs[0]
        elif name == "ring":
            try:
                away.extend_rollback(argument)
                plain.extend_rollback(argument)
            except KVBudgetExceeded:
                pass
        else:
            plain.reset(), away.reset()
            assert away.nbytes == away.host_nbytes == 0
        check(plain, away)
    for one, other, fork_rows in forks:
        check(one, other)
        try:
            append((one, other), 1, len(fork_rows), generator, fork_rows)
        except KVBudgetExceeded:
            continue
        check(one, other)
    check(plain, away)
