"""NaN and infinity in a decoding step by kernels: marked on the device, reported by the host before
they reach a page."""

import pytest
import torch

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.cache.nan_check import LEAD

pytest.importorskip("triton")
from kvfold.kernels.gpu.append import UNMARKED, empty_marks, read_mark
from kvfold.runtime.backends.triton import TRITON

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, DIM = 1, 16
GEOMETRY = Geometry(HEADS, DIM, sinks=3, window=5, page_tokens=16)
MATRIX = torch.eye(DIM) + 0.2 * torch.randn(
    HEADS, DIM, DIM, generator=torch.Generator().manual_seed(3)
)
SPECS = [
    LayerSpec(
        KeySpec(uniform(DIM, 16), (), MATRIX, torch.ones(HEADS, DIM)), ValueSpec(uniform(DIM, 4))
    ),
    LayerSpec(KeySpec(Format(((8, 16), (8, 4)))), ValueSpec(raw16(DIM))),
]
NAN, INF = float("nan"), float("inf")


class Feed:
    """A cache fed with random keys and values, the same for each seed; `bad` changes them before
    they go in."""

    def __init__(self, geometry=GEOMETRY, pads=(0,), specs=SPECS, seed=0, **options):
        self.cache = QuantizedKVCache(specs, geometry, backend=TRITON, **options)
        self.generator, self.pads = torch.Generator().manual_seed(seed), list(pads)

    def __call__(self, tokens, bad=None):
        cache = self.cache
        rows = len(self.pads)
        mask = torch.arange(cache.get_seq_length() + tokens) >= torch.tensor(self.pads)[:, None]
        cache.note_padding(mask.long(), rows)
        for i in range(len(cache.layers)):
            q, *states = (
                torch.randn(rows, HEADS, tokens, DIM, generator=self.generator) for _ in "qkv"
            )
            if bad is not None and i == bad[0]:
                _, name, sequence, number = bad
                states[name == "value"][sequence, 0, -1, 7] = number
            view, _ = cache.update(*(x.to(DEVICE) for x in states), i)
            if tokens == 1:  # else all was stored by now, and the interpreter is slow
                view.attend(q.to(DEVICE), 0.25, None)
            cache.layers[i].release_passed()

    def steps_to_a_page(self):
        """1 if the next step brings one."""
        lengths = self.cache.layers[0].lengths()
        return next(
            i
            for i in range(1, 99)
            if any(GEOMETRY.num_pages(n + i) > GEOMETRY.num_pages(n) for n in lengths)
        )

    def until_a_page_is_due(self):
        """Steps up to the one before."""
        while self.steps_to_a_page() > 1:
            self(1)


def same(one, other):
    """Whether two caches hold the same tokens, to the bit."""
    for a, b in zip(one.layers, other.layers, strict=True):
        assert (
            a.lengths() == b.lengths()
            and a.table.state.tolist() == b.table.state.tolist()
            and a.columns == b.columns
        )
        for s, length in enumerate(a.lengths()):
            pages = [[layer.table.pool.page(i) for i in layer.table.pages()[s]] for layer in (a, b)]
            assert len(pages[0]) == len(pages[1]) and all(
                torch.equal(x, y) for x, y in zip(*pages, strict=True)
            )
            first = max(GEOMETRY.sinks, a.geometry.sinks + len(pages[0]) * a.geometry.page_tokens)
            slots = [
                torch.cat((x.window.slots(0, min(3, length)), x.window.slots(first, length)))
                for x in (a, b)
            ]
            assert torch.equal(a.window.keys[s][:, slots[0]], b.window.keys[s][:, slots[1]])
            assert torch.equal(a.window.values[s][:, slots[0]], b.window.values[s][:, slots[1]])
    return True


@pytest.mark.parametrize(
    ("layer", "name", "sequence", "number"),
    [(0, "key", 0, NAN), (1, "value", 1, INF), (1, "key", 1, -INF), (0, "value", 0, NAN)],
)
@torch.no_grad()
def test_it_is_reported_before_a_page_and_the_cache_goes_on(layer, name, number, sequence):
    """In one sequence of a ragged batch padded on the left."""
    feed, twin = (Feed(pads=(0, 6)) for _ in range(2))
    for one in (feed, twin):
        one(36)
        one(1)
        while (
            one.steps_to_a_page() < LEAD + 3
        ):  # the host asks some steps ahead; what comes later is for the next page to tell
            one(1)
    start = feed.cache.get_seq_length()
    feed(1, (layer, name, sequence, number))
    feed.until_a_page_is_due()
    message = rf"Layer {layer} computed a {name} .* at position {start} of sequence {sequence}; it was not cached"
    for x in feed.cache.layers:
        held = [x.held.read_pages(ids) for ids in x.table.pages() if ids]
        assert all(bool(side.isfinite().all()) for pair in held for side in pair)
    with pytest.raises(FloatingPointError, match=message):
        feed(1)
    assert feed.cache.get_seq_length() == start and same(feed.cache, twin.cache)
    feed.generator.manual_seed(9), twin.generator.manual_seed(9)
    for tokens in (1, 3, 1, 21, 1):
        feed(tokens), twin(tokens)
    assert same(feed.cache, twin.cache)


@torch.no_grad()
def test_the_earliest_column_is_the_one_reported():
    """A padded sequence's tokens have lower numbers, but came later."""
    feed = Feed(pads=(0, 11))
    feed(25)
    feed(1, (1, "value", 0, NAN))
    feed(1, (0, "key", 1, INF))
    feed(1, (0, "key", 0, INF))
    with pytest.raises(
        FloatingPointError, match=r"Layer 1 computed a value .* at position 25 of sequence 0"
    ):
        feed(2)  # a chunk looks as well
    assert feed.cache.get_seq_length() == 25
    feed(40)


@torch.no_grad()
def test_without_a_window_it_is_reported_in_the_next_step():
    geometry = Geometry(HEADS, DIM, sinks=3, window=0, page_tokens=16)
    feed, twin = (Feed(geometry) for _ in range(2))
    for one in (feed, twin):
        one(18)
    feed(1, (0, "value", 0, INF))  # the last row of a page
    assert len(feed.cache.layers[0].table.pages()[0]) == 1
    with pytest.raises(
        FloatingPointError, match=r"Layer 0 computed a value .* at position 18 of sequence 0"
    ):
        feed(1)
    assert same(feed.cache, twin.cache)


@torch.no_grad()
def test_what_a_crop_takes_away_is_not_reported():
    feed, twin = (Feed() for _ in range(2))
    for one in (feed, twin):
        one(30)
    feed(1, (0, "key", 0, NAN))
    feed(1)
    feed.cache.crop(-2)
    feed.generator.manual_seed(5), twin.generator.manual_seed(5)
    for tokens in (9, 1):  # a page at 40
        feed(tokens), twin(tokens)
    assert same(feed.cache, twin.cache) and len(feed.cache.layers[0].table.pages()[0]) == 2
    feed(1, (1, "key", 0, NAN))
    feed(1)
    feed.cache.crop(-1)  # what is left has it still
    with pytest.raises(
        FloatingPointError, match=r"Layer 1 computed a key .* at position 40 of sequence 0"
    ):
        feed(40)


@pytest.mark.parametrize("way", ["select", "repeat", "reorder", "fork", "save"])
@torch.no_grad()
def test_no_other_way_leads_past_the_look(way, tmp_path):
    feed = Feed(pads=(0, 2))
    feed.cache.artifact = "made for a test"
    feed(30)
    feed(1, (0, "key", 1, NAN))
    calls = {
        "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
        "repeat": lambda cache: cache.batch_repeat_interleave(2),
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        "fork": lambda cache: cache.fork(2),
        "save": lambda cache: cache.save(tmp_path / "cache.kv"),
    }
    with pytest.raises(
        FloatingPointError, match=r"Layer 0 computed a key .* at position 30 of sequence 1"
    ):
        calls[way](feed.cache)
    assert feed.cache.get_seq_length() == 30 and not list(tmp_path.iterdir())
    calls[way](feed.cache)  # now there is nothing to report


@torch.no_grad()
def test_reset_and_reuse():
    feed, twin = Feed(seed=1), Feed(seed=1)
    feed(30)
    feed(1, (1, "value", 0, NAN))
    feed.cache.reset()
    feed.generator.manual_seed(1)
    for one in (feed, twin):
        for tokens in (37, 1, 1, 1):
            one(tokens)
    assert same(feed.cache, twin.cache)


@torch.no_grad()
def test_a_sliding_window_may_forbid_to_go_back():
    feed = Feed(Geometry(HEADS, DIM, 3, 5, 16, (0, 24)))
    feed(40)
    assert feed.cache.layers[1].table.sequences[0].passed == 0
    feed(1, (0, "value", 0, NAN))
    feed(1), feed(1)  # tokens 3 … 18 have passed
    assert feed.cache.layers[1].table.sequences[0].passed == 1
    for _ in range(2):
        with pytest.raises(
            FloatingPointError, match=r"at position 40 of sequence 0; a sliding window .* reset\(\)"
        ):
            feed(16)
    feed.cache.reset()
    feed(54), feed(1)


@pytest.mark.parametrize("number", [0, 1, 8, 700])
def test_marks_name_what_they_were_made_of(number):
    from kvfold.kernels.gpu.append import LABELS

    mark = 41 * LABELS.value + 2 * number
    assert read_mark(mark) == (41, number, "key") and read_mark(mark + 1) == (41, number, "value")
    assert empty_marks(3, DEVICE).tolist() == [UNMARKED] * 3
    assert read_mark(2**31 * LABELS.value) == (2**31, 0, "key") and 2**31 * LABELS.value < UNMARKED


def test_the_reference_says_the_same():
    cache = QuantizedKVCache(SPECS, GEOMETRY)
    keys, values = torch.randn(2, 1, HEADS, 21, DIM)
    values[0, 0, 17, 4] = INF
    with pytest.raises(FloatingPointError) as told:
        cache.update(keys, values, 0)
    assert isinstance(told.value, FloatingPointError) and not isinstance(told.value, KvfoldError)
    assert str(told.value).startswith(
        "Layer 0 computed a value that is NaN or infinite at position 17 of sequence 0; it"
    )
