"""Random operations on a layer of the packed cache against the tokens that were put in: sliding
windows, exact crops, padding."""

import pytest
import torch
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry, batch_nbytes
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.attention import packed_tokens
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.kernels.quantizer import round_trip, to_float16
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.cache.resident import resident_nbytes
from kvfold.runtime.cache.sequence import PASSED

HEADS, DIM = 1, 8
SPECS = {
    "scale": LayerSpec(KeySpec(uniform(DIM, 16)), ValueSpec(uniform(DIM, 4))),
    "scale_min": LayerSpec(
        KeySpec(uniform(DIM, 4, "fp16", 8)), ValueSpec(uniform(DIM, 8, "e4m3", 8))
    ),
    "mixed": LayerSpec(
        KeySpec(Format(((8, 64),)), offset=torch.ones(HEADS, DIM)),
        ValueSpec(uniform(DIM, 2), clip=None),
    ),
    "raw": LayerSpec(KeySpec(raw16(DIM)), ValueSpec(raw16(DIM))),
    "turning": LayerSpec(
        KeySpec(uniform(DIM, 4), offset=2 * torch.ones(HEADS, DIM), frequencies=(1.0, 0.3, 0.02)),
        ValueSpec(uniform(DIM, 4)),
    ),
}


def quantised(x, spec):
    """float16 [Hkv, n, D] as pages hold it, float32."""
    return round_trip(x.float(), spec.format, None)


class Tokens:
    """One sequence: its stored keys and values in 16 bits, and how many of them stand in pages or
    are gone."""

    def __init__(self, pad=0):
        self.pad, self.rows = pad, torch.zeros(2, HEADS, 0, DIM, dtype=torch.float16)
        self.packed = self.passed = self.longest = 0

    def copy(self):
        other = Tokens(self.pad)
        other.rows, other.packed, other.passed, other.longest = (
            self.rows,
            self.packed,
            self.passed,
            self.longest,
        )
        return other

    def __len__(self):
        return self.rows.shape[2]


class Lists:
    """What a cache of one layer must hold."""

    def __init__(self, spec, geometry, pads):
        self.spec, self.g, self.columns = spec, geometry, 0
        self.rows = [Tokens(pad) for pad in pads]

    def append(self, keys, values):
        columns = torch.arange(keys.shape[2]) + self.columns
        places = torch.stack([(columns - row.pad).clamp_min(0) for row in self.rows])
        stored = torch.stack(
            (
                to_float16(self.spec.key.apply(keys, places, self.g.sinks)),
                to_float16(values.float()),
            )
        )
        for b, row in enumerate(self.rows):
            skip = min(max(row.pad - self.columns, 0), keys.shape[2])
            row.rows = torch.cat((row.rows, stored[:, b, :, skip:]), 2)
            row.longest = max(row.longest, len(row))
            row.packed = max(
                row.packed, packed_tokens(len(row), self.g.sinks, self.g.window, self.g.page_tokens)
            )
            row.passed = max(row.passed, self.g.passed_pages(len(row), self.g.sliding_of(0)))
        self.columns += keys.shape[2]

    def crop(self, remove):
        remove = min(remove, self.columns)
        g = self.g
        for row in self.rows:
            kept = max(0, len(row) - remove)
            exact = packed_tokens(kept, g.sinks, g.window, g.page_tokens)
            if g.rollback and kept >= row.longest - g.rollback:
                row.packed = min(row.packed, exact)
            elif (
                row.packed > exact and kept < g.sinks + row.packed
            ):  # the page cut through keeps its quantised values
                whole = max(0, kept - g.sinks) // g.page_tokens * g.page_tokens
                cut = slice(g.sinks + whole, g.sinks + row.packed)
                row.rows = row.rows.clone()
                for side, spec in enumerate((self.spec.key, self.spec.value)):
                    row.rows[side, :, cut] = to_float16(quantised(row.rows[side, :, cut], spec))
                row.packed = whole
            row.rows = row.rows[:, :, :kept]
            row.passed = min(row.passed, row.packed // g.page_tokens)
        self.columns -= remove

    def refused(self, remove):
        """Whether a crop would need tokens that a sliding window has left behind."""
        remove = min(remove, self.columns)
        for row in self.rows:
            kept, gone = max(0, len(row) - remove), self.g.sinks + row.passed * self.g.page_tokens
            if (
                remove
                and row.passed
                and kept > self.g.sinks
                and kept - self.g.sliding_of(0) + 1 < gone
            ):
                return True
        return False

    def select(self, indices):
        self.rows = [self.rows[i].copy() for i in indices]

    def check(self, cache):
        layer, g = cache.layers[0], self.g
        assert cache.get_seq_length() == self.columns
        if not layer.is_initialized:
            assert cache.nbytes == 0 and self.columns == 0
            return
        assert layer.lengths() == [len(row) for row in self.rows]
        for b, row in enumerate(self.rows):
            count = row.packed // g.page_tokens
            assert layer.table.state[b].tolist() == [len(row), count]
            ids = layer.table.pages()[b]
            held = ids[row.passed :]
            assert (
                ids == [PASSED] * row.passed + held
                and PASSED not in held
                and layer.table.sequences[b].passed == row.passed
            )
            assert layer.table.block_table[b, :count].tolist() == [
                0
            ] * row.passed + layer.table.pool.addresses(held)
            slots = torch.cat(
                (
                    layer.window.slots(0, min(g.sinks, len(row))),
                    layer.window.slots(g.sinks + row.packed, len(row)),
                )
            )
            places = [*range(min(g.sinks, len(row))), *range(g.sinks + row.packed, len(row))]
            assert torch.equal(layer.window.keys[b][:, slots], row.rows[0][:, places])
            assert torch.equal(layer.window.values[b][:, slots], row.rows[1][:, places])
            if held:
                seen = slice(g.sinks + row.passed * g.page_tokens, g.sinks + row.packed)
                for side, (found, spec) in enumerate(
                    zip(layer.held.read_pages(held), (self.spec.key, self.spec.value), strict=True)
                ):
                    torch.testing.assert_close(
                        found, quantised(row.rows[side, :, seen], spec), rtol=1e-6, atol=1e-6
                    )
        own = {i for ids in layer.table.pages() for i in ids} - {PASSED}
        assert layer.num_pages() == len(own) and cache.nbytes == sum(
            t.nbytes for t in layer.tensors()
        )
        assert len(layer.table.pool) == len(own) or layer.table.shares_pool
        # each sequence holds at the most what the account says of a sequence as long as it ever was
        assert all(
            len(ids) - row.passed >= 0
            for ids, row in zip(layer.table.pages(), self.rows, strict=True)
        )


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 300)),
        st.tuples(st.just("append"), st.integers(1, 30)),
        st.tuples(st.just("append"), st.just(1)),
        st.tuples(st.just("crop"), st.integers(0, 40)),
        st.tuples(st.just("keep"), st.integers(1, 250)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=4)),
        st.tuples(st.just("repeat"), st.integers(1, 3)),
        st.tuples(st.just("fork"), st.integers(1, 2)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    min_size=1,
    max_size=8,
)
geometries = st.builds(
    lambda sinks, window, page, sliding, rollback: Geometry(HEADS, DIM, sinks, window, page, (sliding,), rollback),
    st.sampled_from([0, 1, 3]), st.sampled_from([0, 5, 10, 24]), st.sampled_from([8, 16, 24]),
    st.sampled_from([0, 0, 4, 19, 50]), st.sampled_from([0, 1, 7, 16, 40]),
)  # fmt: skip


@settings(
    max_examples=examples(1700),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    spec=st.sampled_from(sorted(SPECS)), geometry=geometries, steps=operations, seed=st.integers(0, 2**16),
    pads=st.sampled_from([[0], [0, 0], [0, 5, 2], [31, 0]]),
)  # fmt: skip
def test_any_sequence_of_operations_equals_the_tokens_put_in(spec, geometry, steps, seed, pads):
    generator = torch.Generator().manual_seed(seed)
    spec = SPECS[spec]
    cache, lists = QuantizedKVCache([spec], geometry), Lists(spec, geometry, pads)
    others = []
    for name, argument in [("append", 40), *steps]:
        rows = len(lists.rows)
        if name == "append":
            keys, values = torch.randn(2, rows, HEADS, argument, DIM, generator=generator) * 2
            mask = torch.arange(lists.columns + argument) >= torch.tensor(
                [[row.pad] for row in lists.rows]
            )
            cache.note_padding(mask.long(), rows)
            cache.update(keys, values, 0)
            cache.layers[0].release_passed()  # as after attending
            lists.append(keys, values)
        elif name in ("crop", "keep"):
            remove = argument if name == "crop" else max(0, lists.columns - argument)
            if lists.g.rollback:  # further back is as without, and has its own test
                remove = min(
                    [
                        remove,
                        *(max(0, lists.g.rollback - row.longest + len(row)) for row in lists.rows),
                    ]
                )
            if lists.refused(remove):
                with pytest.raises(KvfoldError, match="has left behind"):
                    cache.crop(-remove)
            else:
                cache.crop(
                    -remove if name == "crop" or remove == lists.columns else lists.columns - remove
                )
                lists.crop(remove)
        elif name == "select":
            indices = [i % rows for i in argument]
            cache.batch_select_indices(torch.tensor(indices))
            lists.select(indices)
        elif name == "repeat" and rows * argument <= 6:
            cache.batch_repeat_interleave(argument)
            lists.select([i for i in range(rows) for _ in range(argument)])
        elif name == "fork":
            forks = cache.fork(argument)
            others += [(cache, lists), *((fork, lists) for fork in forks[1:])][-2:]
            kept = Lists(lists.spec, lists.g, [])
            kept.rows, kept.columns = [row.copy() for row in lists.rows], lists.columns
            cache, lists = forks[0], kept
        elif name == "reset":
            cache.reset()
            assert cache.nbytes == 0 and cache.get_seq_length() == 0
            lists = Lists(lists.spec, lists.g, [row.pad for row in lists.rows])
        lists.check(cache)
    for other, expected in others:  # forks did not touch each other
        expected.check(other)


@settings(
    max_examples=examples(300),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    geometry=geometries,
    steps=st.lists(st.tuples(st.integers(1, 120), st.integers(0, 120)), min_size=1, max_size=6),
    longer=st.integers(0, 60),
)
def test_a_crop_of_any_size_leaves_each_token_raw_or_quantised(geometry, steps, longer):
    """However far back a crop goes, what is left is the tokens themselves, at worst quantised:
    never a row of another."""
    spec, cache = SPECS["scale"], QuantizedKVCache([SPECS["scale"]], geometry)
    layer, generator = cache.layers[0], torch.Generator().manual_seed(longer)
    rows = torch.zeros(HEADS, 0, DIM)
    for i, (more, less) in enumerate(steps):
        keys = torch.randn(1, HEADS, more, DIM, generator=generator)
        cache.update(keys, keys, 0)
        layer.release_passed()
        rows = torch.cat((rows, keys[0]), 1)
        if i == 1:
            cache.extend_rollback(longer)
        try:
            cache.crop(-less)
        except KvfoldError:
            continue
        rows = rows[:, : max(0, rows.shape[1] - less)]
        g, length = layer.geometry, rows.shape[1]
        first = min(g.sinks + len(layer.table.pages()[0]) * g.page_tokens, max(length, g.sinks))
        held = [*range(min(g.sinks, length)), *range(first, length)]
        found = layer.window.keys[0][:, layer.window.slots(0, length)[held]]
        true, coarse = rows[:, held].half(), to_float16(quantised(rows[:, held].half(), spec.key))
        again = to_float16(quantised(coarse, spec.key))  # cut through twice
        same = [(found - x).abs().amax(-1) < 1e-2 for x in (true, coarse, again)]
        assert bool((same[0] | same[1] | same[2]).all())


@pytest.mark.parametrize("sliding", [1, 2, 9, 17, 33])
@pytest.mark.parametrize("rollback", [0, 5])
@pytest.mark.parametrize("window", [0, 10])
def test_pages_go_as_soon_as_no_query_to_come_sees_them(sliding, rollback, window):
    g = Geometry(HEADS, DIM, 3, window, 8, (sliding,), rollback)
    for tokens in range(120):
        least = max(0, tokens - rollback)  # where the next query may stand after a crop
        pages = [range(3 + 8 * i, 3 + 8 * (i + 1)) for i in range(g.num_pages(tokens))]
        seen = [
            i < g.num_pages(tokens) and page[-1] > least - sliding for i, page in enumerate(pages)
        ]
        stays = [i for i, needed in enumerate(seen) if needed or i >= g.num_pages(least)]
        assert (
            g.held_pages(tokens, sliding) == len(stays)
            and stays == list(range(len(pages)))[len(pages) - len(stays) :]
        )


def filled(geometry, chunks, batch=2):
    cache = QuantizedKVCache([SPECS["scale"], SPECS["mixed"]], geometry)
    for tokens in chunks:
        for i in range(2):
            keys, values = torch.randn(2, batch, HEADS, tokens, DIM)
            handle, _ = cache.update(keys, values, i)
            most = cache.nbytes
            handle.attend(torch.randn(batch, HEADS, tokens, DIM), 1.0, None)
            yield cache, most


@pytest.mark.parametrize("rollback", [0, 7])
@pytest.mark.parametrize("chunks", [[200], [50, 150], [150, *[1] * 50], [1] * 60, [3, 17, 90]])
def test_bytes_of_sliding_layers_are_the_accounts(chunks, rollback):
    geometry = Geometry(HEADS, DIM, 3, 10, 8, (30, 0), rollback)
    tokens = 0
    for i, (cache, most) in enumerate(filled(geometry, chunks)):
        if i % 2 == 0:
            tokens += chunks[i // 2]
            first = most
            continue
        expected = batch_nbytes(geometry, cache.formats, [tokens] * 2)
        assert (
            cache.nbytes
            == expected
            == resident_nbytes([cache])
            == sum(row["bytes"] for row in cache.report())
        )
        limit = batch_nbytes(geometry, cache.formats, [tokens] * 2, chunks[i // 2])
        assert max(first, most) <= limit
    if chunks[-1] == 1:
        full = batch_nbytes(
            Geometry(HEADS, DIM, 3, 10, 8, (), rollback), cache.formats, [tokens] * 2
        )
        assert expected < full


def test_a_sliding_layer_stops_growing():
    geometry = Geometry(HEADS, DIM, 3, 10, 8, (30,))
    cache = QuantizedKVCache([SPECS["scale"]], geometry)
    pages = set()
    for _ in range(400):
        handle, _ = cache.update(*torch.randn(2, 1, HEADS, 1, DIM), 0)
        handle.attend(torch.randn(1, HEADS, 1, DIM), 1.0, None)
        pages.add(cache.layers[0].num_pages())
    assert pages == {0, 1, 2, 3}  # of the last 29 tokens the first 12 to 19 are packed


def test_models_without_a_sliding_layer_are_as_before():
    plain = Geometry(HEADS, DIM, 3, 10, 8)
    formats = [(s.key.format, s.value.format) for s in SPECS.values()]
    for tokens in (0, 1, 50, 500):
        assert plain.passed_pages(tokens, 0) == 0 and plain.held_pages(tokens) == plain.num_pages(
            tokens
        )
        full = batch_nbytes(plain, formats, [tokens, 9])
        assert (
            full
            == batch_nbytes(plain, formats, [tokens, 9], 1)
            == batch_nbytes(plain, formats, [tokens, 9], tokens or 1)
        )
        assert full == batch_nbytes(
            Geometry(HEADS, DIM, 3, 10, 8, (0,) * len(formats)), formats, [tokens, 9]
        )
    assert plain.ring == 24 and plain.elements(100, 4) == 2 * 4 * HEADS * DIM * 100
    assert Geometry(HEADS, DIM, 3, 10, 8, (30, 0)).elements(100, 2) == 2 * HEADS * DIM * (30 + 100)
    assert Geometry(HEADS, DIM, 3, 10, 8, rollback=7).ring == 32


def test_a_crop_that_a_sliding_window_forbids_changes_nothing():
    cache = QuantizedKVCache([SPECS["scale"]] * 2, Geometry(HEADS, DIM, 3, 10, 8, (0, 30)))
    for i in range(2):
        cache.update(*torch.randn(2, 1, HEADS, 100, DIM), i)
        cache.layers[i].release_passed()
    before = [
        (layer.columns, layer.table.state.tolist(), layer.num_pages()) for layer in cache.layers
    ]
    with pytest.raises(
        KvfoldError,
        match=r"to 80 tokens needs some of the first 67, .* layer 1 \(30 tokens\).* rollback=20",
    ):
        cache.crop(-20)
    assert before == [
        (layer.columns, layer.table.state.tolist(), layer.num_pages()) for layer in cache.layers
    ]
    cache.crop(-4)  # the window of the next query still begins behind what is gone
    assert cache.get_seq_length() == 96
    cache.crop(2)  # the sinks are always there
    assert cache.layers[1].lengths() == [2] and cache.layers[1].num_pages() == 0


def test_a_budget_counts_what_a_prompt_holds_while_it_attends():
    geometry = Geometry(HEADS, DIM, 3, 10, 8, (30,))
    formats = [(SPECS["scale"].key.format, SPECS["scale"].value.format)]
    rest, most = (batch_nbytes(geometry, formats, [300], new) for new in (0, 300))
    assert most > rest
    keys = torch.randn(1, HEADS, 300, DIM)
    with pytest.raises(KvfoldError, match=f"need a cache of {most} bytes"):
        QuantizedKVCache([SPECS["scale"]], geometry, budget=most - 1).update(keys, keys, 0)
    cache = QuantizedKVCache([SPECS["scale"]], geometry, budget=most)
    cache.update(keys, keys, 0)
    assert cache.nbytes == most
    cache.layers[0].release_passed()
    assert cache.nbytes == rest


def test_a_longer_ring_keeps_to_the_budget():
    geometry = Geometry(HEADS, DIM, 3, 10, 8)
    cache = QuantizedKVCache([SPECS["scale"]] * 2, geometry)
    keys = torch.randn(1, HEADS, 60, DIM)
    for i in range(2):
        cache.update(keys, keys, i)
    before, row = cache.nbytes, 2 * 2 * HEADS * DIM
    need = before + row * (
        2 * 16 + 27
    )  # 16 rows more in each of two layers, and one layer's 27 once more while they move
    cache.set_budget(need - 1)
    with pytest.raises(
        KvfoldError,
        match=f"rollback of 20 tokens needs a cache of {need} bytes, but kv_budget is {need - 1}",
    ):
        cache.extend_rollback(20)
    assert cache.nbytes == before and cache.geometry == geometry
    cache.set_budget(need)
    cache.extend_rollback(20)
    assert cache.nbytes == before + row * 32 and cache.geometry.rollback == 20
    state = [layer.window.keys.nan_to_num() for layer in cache.layers]
    cache.extend_rollback(20)
    cache.extend_rollback(3)
    assert all(
        torch.equal(a, layer.window.keys.nan_to_num())
        for a, layer in zip(state, cache.layers, strict=True)
    )
