"""Pages and 16-bit rows in the blocks of an engine's pool, without an engine: what is read there is
what a cache of its own reads."""

import random
from itertools import product

import pytest
import torch

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.runtime.backends.base import LogitOptions, Workspace
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.vllm.blocks import BlockLayout, block_layout
from kvfold.runtime.vllm.layer import ServedLayer, served_layer
from kvfold.runtime.vllm.torch_attention import Batch, BlockPages, Blocks, attend_step

HEADS, DIM, SCALE = 2, 16, 0.3
SINKS, WINDOW, PAGE = 3, 24, 8
ROUNDING = {"atol": 1e-3, "rtol": 0.0}  # of float16 rows; a fault takes 0.05 and more
BLOCK, RAW, COUNT = 32, 8, 200  # tokens of a packed and of a raw block; blocks of the pool
generator = torch.Generator().manual_seed(5)
MATRIX = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=generator))[0].contiguous()
OFFSET = torch.randn(HEADS, DIM, generator=generator)
SPECS = {
    "turning mean": LayerSpec(
        KeySpec(
            Format(((8, 64), (8, 16))),
            (),
            MATRIX,
            OFFSET,
            frequencies=tuple(0.3**i for i in range(8)),
        ),
        ValueSpec(uniform(DIM, 16)),
    ),
    "constant mean": LayerSpec(
        KeySpec(uniform(DIM, 16), (), MATRIX, OFFSET, torch.tensor([0.9, 0.8])),
        ValueSpec(uniform(DIM, 4, "e4m3", 8), clip=torch.tensor([[0.9, 1.0], [0.7, 0.8]])),
    ),
    "16 bits": LayerSpec(KeySpec(raw16(DIM)), ValueSpec(raw16(DIM))),
}
CASES = [
    ("turning mean", {}),
    ("constant mean", {"softcap": 3.0}),
    ("constant mean", {"sliding": 40, "sinks_logit": torch.linspace(-1, 1, 2 * HEADS)}),
    ("turning mean", {"sliding": 20}),
    ("16 bits", {}),
]


class Pool:
    """One layer's blocks, handed out in no order, and the requests that hold them.

    Args:
        spec: of the layer.
        options: of its logits, as LogitOptions has them.
    """

    def __init__(self, spec: LayerSpec, seed: int = 0, **options) -> None:
        self.options = LogitOptions(**options)
        geometry = Geometry(HEADS, DIM, SINKS, WINDOW, PAGE, (self.options.sliding,))
        layout = BlockLayout(SINKS, WINDOW, PAGE, BLOCK, RAW)
        self.layer = ServedLayer(0, geometry, spec, layout, Workspace())
        packed = torch.full((COUNT, self.layer.block_nbytes), 255, dtype=torch.uint8)
        raw = torch.full((COUNT, HEADS, RAW, 2 * DIM), torch.nan, dtype=torch.float16)
        self.blocks = Blocks(packed, raw)
        self.free = random.Random(seed).sample(range(1, COUNT), COUNT - 1)
        self.tables: dict[str, tuple[list[int], list[int]]] = {}
        self.lengths: dict[str, int] = {}

    def share(self, source: str, name: str, tokens: int) -> None:
        """A request that begins with the blocks of another one's first tokens, as a prefix hit brings
        them: of the raw ones, sinks and window."""
        packed, raw = self.tables[source]
        needed = raw[: tokens // RAW]
        first = (tokens - self.layer.layout.raw_window() + 1) // RAW
        kept = [b if i < 1 or i >= first else 0 for i, b in enumerate(needed)]
        self.tables[name], self.lengths[name] = (packed[: tokens // BLOCK], kept), tokens

    def step(self, states: dict[str, tuple], advance: bool = True) -> dict[str, torch.Tensor]:
        """New states of some requests (query [heads, n, dim], keys, values) → what they attend to,
        [heads, n, dim]."""
        starts, lengths, slots = [0], [], []
        for name, (query, *_) in states.items():
            packed, raw = self.tables.setdefault(name, ([], []))
            before, new = self.lengths.get(name, 0), query.shape[1]
            lengths.append(before + new)
            starts.append(starts[-1] + new)
            for table, size in ((packed, BLOCK), (raw, RAW)):
                table += [self.free.pop() for _ in range(-(-lengths[-1] // size) - len(table))]
            slots += [raw[p // RAW] * RAW + p % RAW for p in range(before, lengths[-1])]
            if advance:
                self.lengths[name] = lengths[-1]
        width = max(len(raw) for _, raw in self.tables.values())
        tables = [
            torch.tensor([self.tables[name][i] + [0] * (width - len(self.tables[name][i])) for name in states],
                         dtype=torch.int32)
            for i in (0, 1)
        ]  # fmt: skip
        batch = Batch(starts, lengths, *tables, torch.tensor(slots))
        query, keys, values = (
            torch.cat([s[i] for s in states.values()], 1).transpose(0, 1) for i in range(3)
        )
        out = torch.full_like(query, torch.nan)
        self.attend(batch, query, keys, values, out)
        return {
            name: out[first:end].transpose(0, 1)
            for name, first, end in zip(states, starts, starts[1:], strict=False)
        }

    def attend(self, batch: Batch, query, keys, values, out) -> None:
        """A step, by what is to be tested."""
        attend_step(self.layer, self.blocks, batch, query, keys, values, SCALE, self.options, out)


def drawn(tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Random queries, keys and values of a request."""
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(h, tokens, DIM, generator=rng) for h in (2 * HEADS, HEADS, HEADS))


def alone(spec: LayerSpec, states: tuple, **options) -> torch.Tensor:
    """The same through a cache of its own, token by token: [heads, tokens, dim]."""
    sliding = options.get("sliding", 0)
    cache = QuantizedKVCache(
        [spec], Geometry(HEADS, DIM, SINKS, WINDOW, PAGE, (sliding,) if sliding else ())
    )
    found = []
    for t in range(states[0].shape[1]):
        query, keys, values = (x[None, :, t : t + 1] for x in states)
        cache.note_padding(torch.ones(1, t + 1), 1)
        behind = t - torch.arange(t + 1)
        mask = (behind < sliding)[None, None, None] if sliding else None
        view = cache.update(keys, values, 0)[0]
        found.append(
            view.attend(
                query, SCALE, mask, options.get("softcap"), options.get("sinks_logit"), sliding
            )
        )
    return torch.cat(found, 2)[0]


def part(states: tuple, first: int, end: int) -> tuple:
    return tuple(x[:, first:end] for x in states)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_steps_of_many_requests_give_each_what_it_gets_alone(name, options):
    """Chunks of any size, requests that come and go, blocks in no order."""
    pool, rng = Pool(SPECS[name], **options), random.Random(3)
    lengths = {"a": 130, "b": 2, "c": 75, "d": 200}
    states = {n: drawn(length, i) for i, (n, length) in enumerate(lengths.items())}
    found: dict[str, list] = {n: [] for n in lengths}
    while left := [n for n in lengths if pool.lengths.get(n, 0) < lengths[n]]:
        step = {}
        for n in rng.sample(left, rng.randint(1, len(left))):
            first = pool.lengths.get(n, 0)
            step[n] = part(states[n], first, min(first + rng.choice((1, 1, 5, 40)), lengths[n]))
        for n, out in pool.step(step).items():
            found[n].append(out)
    for n in lengths:
        expected = alone(SPECS[name], states[n], **options)
        torch.testing.assert_close(torch.cat(found[n], 1), expected, **ROUNDING)


@pytest.mark.parametrize("drafts", [1, 5, WINDOW])
def test_rejected_drafts_leave_no_trace(drafts):
    spec, states, wrong = SPECS["turning mean"], drawn(120, 1), drawn(200, 2)
    plain, drafting = Pool(spec), Pool(spec)
    for t in range(120):
        step = part(states, t, t + 1)
        expected = plain.step({"a": step})["a"]
        drafted = tuple(
            torch.cat((x, y[:, t : t + drafts]), 1) for x, y in zip(step, wrong, strict=True)
        )
        found = drafting.step({"a": drafted}, advance=False)["a"][:, :1]
        drafting.lengths["a"] = t + 1
        torch.testing.assert_close(found, expected, **ROUNDING)


@pytest.mark.parametrize("first", [32, 64, 96, 160])
def test_a_request_goes_on_from_blocks_of_another_in_the_very_step_that_fills_them(first):
    """Whichever comes first in the step."""
    spec, states = SPECS["turning mean"], drawn(200, 1)
    expected = alone(spec, states)
    for order in ("ab", "ba"):
        pool = Pool(spec)
        pool.tables["a"] = [[pool.free.pop() for _ in range(n)] for n in (7, 25)]
        pool.share("a", "b", first)
        ranges = {"a": (0, 200), "b": (first, 200)}
        found = pool.step({name: part(states, *ranges[name]) for name in order})
        torch.testing.assert_close(found["a"], expected, **ROUNDING)
        torch.testing.assert_close(found["b"], expected[:, first:], **ROUNDING)


@pytest.mark.parametrize(("sinks", "page"), product((0, 3, 64, 65), (8, 24, 32, 128)))
def test_a_page_lies_in_a_block_of_its_own_tokens_or_later_ones(sinks, page):
    """So that a block that two requests share holds nothing of the tokens behind it."""
    layout = block_layout(Geometry(HEADS, DIM, sinks, 100, page), [(raw16(DIM), raw16(DIM))])
    places = [layout.place(p) for p in range(50)]
    assert len(set(places)) == 50
    for p, (entry, place) in enumerate(places):
        assert 0 <= place < layout.pages_per_block
        end = entry * layout.block_tokens + (place + 1) * page
        assert sinks + (p + 1) * page <= end < sinks + (p + 2) * page


@pytest.mark.parametrize("levels", [2, 4, 16, 256])
@pytest.mark.parametrize("page", [8, 24, 32])
def test_a_raw_block_fills_a_packed_ones_bytes(levels, page):
    formats = [(uniform(DIM, levels), uniform(DIM, 4)), (uniform(DIM, 4), uniform(DIM, 4))]
    geometry = Geometry(HEADS, DIM, SINKS, 100, page)
    layout = block_layout(geometry, formats)
    packed = layout.pages_per_block * sum(geometry.pair_nbytes(*pair) for pair in formats)
    raw = layout.raw_block_tokens * len(formats) * HEADS * DIM * 4
    assert layout.block_tokens % layout.raw_block_tokens == 0 == layout.block_tokens % page
    # by half at least, unless the next power of two is no divisor
    assert raw <= packed < 2 * raw or layout.block_tokens % (2 * layout.raw_block_tokens)


def test_blocks_of_no_whole_pages_are_refused():
    with pytest.raises(
        KvfoldError, match=r"block of 100 tokens .* multiple of 32, or leave it out"
    ):
        block_layout(Geometry(HEADS, DIM, SINKS, 100, 32), [(raw16(DIM), raw16(DIM))], 100)


def test_pages_are_read_and_written_in_place():
    pool = Pool(SPECS["turning mean"])
    pages = BlockPages(pool.layer, pool.blocks.packed)
    pages.page(4 * 17 + 3).copy_(torch.arange(pages.sizes[0]) % 251)
    stride = pool.layer.page_stride
    assert stride % 16 == 0 and stride >= pages.sizes[0]
    there = pool.blocks.packed[17, 3 * stride : 3 * stride + pages.sizes[0]]
    assert torch.equal(there, pages.load([71])[0]) and torch.equal(there, pages.readable([71])[0])
    assert pages.rung(71) == 0


def test_a_rank_has_its_heads_alone():
    spec = SPECS["constant mean"]
    one = spec.of_heads(slice(1, 2))
    assert torch.equal(one.key.matrix, MATRIX[1:]) and torch.equal(one.key.offset, OFFSET[1:])
    assert one.value.clip.tolist() == spec.value.clip[1:].tolist() and one.key.clip.shape == (1,)
    assert one.key.format == spec.key.format


def test_an_artifact_is_read_on_the_host_whatever_the_default_device_is(tiny_artifact):
    """vLLM makes models with the GPU as the default device."""
    with torch.device("meta"):
        layer = served_layer(str(tiny_artifact), 0, 1, 2, None)
    key = layer.spec.key
    found = [x for x in (key.matrix, key.offset, key.clip, layer.spec.value.clip) if x is not None]
    assert found and all(x.device.type == "cpu" and len(x) == 1 for x in found)
