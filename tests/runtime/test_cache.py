"""The packed cache against plain lists, and its bytes against the account."""

import pytest
import torch
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvfold.errors import KVBudgetExceeded
from kvfold.exports.account import Geometry, batch_nbytes, cache_nbytes
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.kernels.quantizer import round_trip, to_float16
from kvfold.runtime.cache.cache import QuantizedKVCache

HEADS, DIM = 2, 16
GEOMETRY = Geometry(HEADS, DIM, sinks=3, window=10, page_tokens=8)
GENERATOR = torch.Generator().manual_seed(0)
MATRIX = torch.randn(HEADS, DIM, DIM, generator=GENERATOR) + 2 * torch.eye(DIM)
SPECS = {
    "mixed": LayerSpec(
        KeySpec(
            Format(((8, 16), (8, 4))),
            matrix=MATRIX,
            offset=torch.randn(HEADS, DIM, generator=GENERATOR),
        ),
        ValueSpec(uniform(DIM, 4), clip=torch.tensor([0.9, 0.8])),
    ),
    "turning": LayerSpec(
        KeySpec(
            Format(((8, 8), (8, 2))),
            matrix=MATRIX,
            offset=4 * torch.randn(HEADS, DIM, generator=GENERATOR),
            frequencies=(1.0, 0.4, 0.1, 0.02, 0.005, 1e-4),
        ),
        ValueSpec(uniform(DIM, 4)),
    ),
    "ternary": LayerSpec(KeySpec(uniform(DIM, 8, "fp16")), ValueSpec(uniform(DIM, 3))),
    "raw": LayerSpec(KeySpec(raw16(DIM)), ValueSpec(raw16(DIM))),
}


def quantised(x, spec):
    """One token as the cache holds it in a page: float32 [Hkv, D]. Parameters are per token, so a
    page changes nothing."""
    return round_trip(
        x[:, None].float(), spec.format, None if spec.clip is None else spec.clip[:, None, None]
    )[:, 0]


class PlainLists:
    """What a cache of one layer must hold, as lists of tokens."""

    def __init__(self, spec, batch):
        self.spec, self.rows = spec, [[] for _ in range(batch)]
        self.packed = [0] * batch

    def append(self, keys, values):
        places = None
        if self.spec.key.turns:
            places = torch.stack([len(row) + torch.arange(keys.shape[2]) for row in self.rows])
        keys, values = (
            to_float16(self.spec.key.apply(keys, places, GEOMETRY.sinks)),
            to_float16(values),
        )
        for b, row in enumerate(self.rows):
            row += [(keys[b, :, t], values[b, :, t]) for t in range(keys.shape[2])]
            self._pack(b)

    def _pack(self, b):
        g, row = GEOMETRY, self.rows[b]
        while len(row) - g.sinks - self.packed[b] - g.page_tokens >= g.window:
            for t in range(g.sinks + self.packed[b], g.sinks + self.packed[b] + g.page_tokens):
                row[t] = quantised(row[t][0], self.spec.key), quantised(row[t][1], self.spec.value)
            self.packed[b] += g.page_tokens

    def crop(self, remove):
        for b, row in enumerate(self.rows):
            del row[max(0, len(row) - remove) :]
            whole = max(0, len(row) - GEOMETRY.sinks) // GEOMETRY.page_tokens * GEOMETRY.page_tokens
            for t in range(GEOMETRY.sinks + whole, min(len(row), GEOMETRY.sinks + self.packed[b])):
                row[t] = (
                    to_float16(row[t][0]),
                    to_float16(row[t][1]),
                )  # a page cut through goes back to the window
            self.packed[b] = min(self.packed[b], whole)

    def select(self, indices):
        self.rows, self.packed = (
            [list(self.rows[i]) for i in indices],
            [self.packed[i] for i in indices],
        )


def contents(layer, b):
    """(keys, values) float32 [Hkv, n, D] of sequence b in order, decoded."""
    length, pages = layer.table.state[b].tolist()
    g = layer.geometry
    first = max(g.sinks + pages * g.page_tokens, min(g.sinks, length))
    slots = torch.cat(
        (layer.window.slots(0, min(g.sinks, length)), layer.window.slots(first, length))
    )
    parts = []
    assert pages == len(layer.table.pages()[b]) and layer.table.block_table[
        b, :pages
    ].tolist() == layer.table.pool.addresses(layer.table.pages()[b])
    packed = layer.held.read_pages(layer.table.pages()[b]) if pages else (None, None)
    for raw, middle in ((layer.window.keys, packed[0]), (layer.window.values, packed[1])):
        rows = raw[b][:, slots].float()
        pieces = [rows[:, : g.sinks], *([middle] if middle is not None else []), rows[:, g.sinks :]]
        parts.append(torch.cat(pieces, 1))
    return parts


def check(cache, lists):
    layer = cache.layers[0]
    if not layer.is_initialized:
        assert cache.nbytes == 0 and not any(lists.rows)
        return
    assert layer.lengths() == [len(row) for row in lists.rows]
    for b, row in enumerate(lists.rows):
        if row:
            keys, values = contents(layer, b)
            torch.testing.assert_close(
                keys, torch.stack([k.float() for k, _ in row], 1), rtol=1e-6, atol=1e-6
            )
            torch.testing.assert_close(
                values, torch.stack([v.float() for _, v in row], 1), rtol=1e-6, atol=1e-6
            )
    assert cache.nbytes == sum(t.nbytes for t in layer.tensors())
    used = {i for ids in layer.table.pages() for i in ids}
    assert layer.num_pages() == len(used)  # nothing leaks, nothing is missing


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 60)),
        st.tuples(st.just("append"), st.just(1)),
        st.tuples(st.just("crop"), st.integers(0, 40)),
        st.tuples(st.just("keep"), st.integers(1, 60)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=4)),
        st.tuples(st.just("repeat"), st.integers(1, 3)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    min_size=1,
    max_size=9,
)


@settings(
    max_examples=examples(120),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    spec=st.sampled_from(sorted(SPECS)),
    batch=st.integers(1, 3),
    steps=operations,
    seed=st.integers(0, 2**16),
)
def test_any_sequence_of_operations_equals_plain_lists(spec, batch, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    cache = QuantizedKVCache([SPECS[spec]], GEOMETRY)
    lists = PlainLists(SPECS[spec], batch)
    for name, argument in [("append", 5), *steps]:
        rows = len(lists.rows)
        if name == "append":
            keys, values = (
                torch.randn(rows, HEADS, argument, DIM, generator=generator) * 2 for _ in range(2)
            )
            cache.note_padding(None, rows)
            cache.update(keys, values, 0)
            lists.append(keys, values)
        elif name == "crop":
            cache.crop(-argument)
            lists.crop(argument)
        elif name == "keep":
            lists.crop(max(0, len(lists.rows[0]) - argument))
            cache.crop(argument)
        elif name == "select":
            indices = [i % rows for i in argument]
            cache.batch_select_indices(torch.tensor(indices))
            lists.select(indices)
        elif name == "repeat" and rows * argument <= 6:
            cache.batch_repeat_interleave(argument)
            lists.select([i for i in range(rows) for _ in range(argument)])
        elif name == "reset":
            cache.reset()
            assert cache.nbytes == 0 and cache.get_seq_length() == 0
            lists = PlainLists(SPECS[spec], rows)
            continue
        check(cache, lists)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 12, 13, 20, 21, 22, 29, 150, 163])
@pytest.mark.parametrize("spec", sorted(SPECS))
def test_bytes_equal_the_account(spec, tokens):
    cache = QuantizedKVCache([SPECS[spec]] * 2, GEOMETRY)
    for layer in range(2):
        cache.update(torch.randn(1, HEADS, tokens, DIM), torch.randn(1, HEADS, tokens, DIM), layer)
    assert cache.nbytes == cache_nbytes(GEOMETRY, cache.formats, tokens)
    report = cache.report()
    assert sum(row["bytes"] for row in report) == cache.nbytes and report[0]["tokens"] == [tokens]


def test_one_by_one_fills_the_same_bytes_as_one_shot():
    spec = SPECS["ternary"]  # no matrix: products of other shapes round differently
    keys, values = torch.randn(2, 2, HEADS, 75, DIM)
    whole, single = (QuantizedKVCache([spec], GEOMETRY) for _ in range(2))
    whole.update(keys, values, 0)
    for t in range(75):
        single.update(keys[:, :, t : t + 1], values[:, :, t : t + 1], 0)
    for b in range(2):
        for a, c in zip(contents(whole.layers[0], b), contents(single.layers[0], b), strict=True):
            assert torch.equal(a, c)


def test_beams_share_pages():
    cache = QuantizedKVCache([SPECS["mixed"]], GEOMETRY)
    cache.update(torch.randn(1, HEADS, 90, DIM), torch.randn(1, HEADS, 90, DIM), 0)
    pages = cache.layers[0].num_pages()
    cache.batch_repeat_interleave(4)
    assert cache.layers[0].num_pages() == pages > 0
    cache.reorder_cache(torch.tensor([3, 3, 0, 1]))
    cache.update(torch.randn(4, HEADS, 8, DIM), torch.randn(4, HEADS, 8, DIM), 0)
    assert cache.layers[0].num_pages() == pages + 4


def test_a_budget_is_never_passed():
    spec = SPECS["mixed"]
    limit = batch_nbytes(GEOMETRY, [(spec.key.format, spec.value.format)], [50, 50])
    cache = QuantizedKVCache([spec], GEOMETRY, budget=limit)
    cache.update(torch.randn(2, HEADS, 50, DIM), torch.randn(2, HEADS, 50, DIM), 0)
    before = cache.nbytes
    with pytest.raises(KVBudgetExceeded, match=f"kv_budget is {limit}"):
        cache.update(torch.randn(2, HEADS, 9, DIM), torch.randn(2, HEADS, 9, DIM), 0)
    assert before == cache.nbytes == limit and cache.get_seq_length() == 50
    cache.crop(-20)
    cache.update(torch.randn(2, HEADS, 20, DIM), torch.randn(2, HEADS, 20, DIM), 0)
    assert cache.nbytes <= limit


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_reported_and_not_stored(bad):
    cache = QuantizedKVCache([SPECS["mixed"]], GEOMETRY)
    keys, values = torch.randn(2, 1, HEADS, 30, DIM)
    values[0, 1, 17, 4] = bad
    with pytest.raises(
        FloatingPointError, match=r"Layer 0 computed a value .* at position 17 of sequence 0"
    ):
        cache.update(keys, values, 0)
    assert cache.layers[0].lengths() == [0]
