"""Prompts by kernels: 16-bit rows made of keys and values, pages decoded, and attention over both,
against plain torch."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from test_triton_attention import DEVICE, PAIRS, error

from kvfold.exports.spec import KeySpec
from kvfold.kernels.attention import Tile, attend, packed_tokens
from kvfold.kernels.formats import raw16, uniform
from kvfold.kernels.pages import page_address
from kvfold.kernels.quantizer import decode, encode, to_float16

pytest.importorskip("triton")
from kvfold.kernels.gpu import prompt as triton_prompt
from kvfold.kernels.gpu.dense import query_rows
from kvfold.kernels.gpu.mean import stored_mean
from kvfold.kernels.gpu.prompt import PageRun, PromptRows, attend_queries, decode_pages
from kvfold.kernels.gpu.records import LogitOptions, Regions
from kvfold.kernels.gpu.rows import gather_rows, store_rows


def pages_of(pair, count, heads, page, seed=0):
    """Encoded pages, one tensor each, and what they hold: two float32 [Hkv, count·page, D]."""
    rng = torch.Generator().manual_seed(seed)
    data, read = [], ([], [])
    for _ in range(count):
        blocks = [
            encode(torch.randn(heads, page, f.head_dim, generator=rng).half().to(DEVICE), f)
            for f in pair
        ]
        for side, block, fmt in zip(read, blocks, pair, strict=True):
            side.append(decode(block, fmt, page))
        data.append(torch.cat([x.flatten() for x in blocks]))
    return data, tuple(torch.cat(side, 1) for side in read)


def turning_spec(heads, dim, rotated=None, pairs="halves", matrix=True, seed=1, size=20):
    """A layer's keys with a large mean that turns."""
    rng = torch.Generator().manual_seed(seed)
    rotated = dim // 2 if rotated is None else rotated
    basis = torch.linalg.qr(torch.randn(heads, dim, dim, generator=rng))[0].to(DEVICE)
    offset = size * torch.randn(heads, dim, generator=rng).to(DEVICE)
    turns = tuple(1e4 ** (-i / rotated) for i in range(rotated))
    return KeySpec(
        raw16(dim), matrix=basis.contiguous() if matrix else None, offset=offset, frequencies=turns, pairs=pairs
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "page"), [*((name, 32) for name in PAIRS), ("mixed both", 8), ("ternary 96", 128)]
)
def test_pages_decode_to_what_the_reference_reads(name, page):
    heads, dim = 2, PAIRS[name][0].head_dim
    data, (keys, values) = pages_of(PAIRS[name], 2, heads, page)
    pages = torch.tensor([page_address(x) for x in reversed(data)], device=DEVICE)
    order = torch.arange(2 * page, device=DEVICE).view(2, page).flip(0).flatten()
    got = [
        torch.full((heads, 2 * page, dim), torch.nan, dtype=torch.float16, device=DEVICE)
        for _ in range(2)
    ]
    decode_pages(pages, *PAIRS[name], *got, page)
    for found, want in zip(got, (keys[:, order], values[:, order]), strict=True):
        # a last bit of float32 may round to the other float16
        torch.testing.assert_close(found.float(), want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("page", "dim", "rotated", "pairs"),
    [(32, 64, 32, "halves"), (8, 64, 20, "adjacent"), (128, 96, 48, "swapped"), (16, 80, 40, "halves")],
)  # fmt: skip
def test_decoded_keys_get_their_mean_back(page, dim, rotated, pairs):
    heads, first, count, sinks = 2, 3, 3, 5
    spec = turning_spec(heads, dim, rotated, pairs)
    data, (keys, _) = pages_of((uniform(dim, 4), uniform(dim, 4)), count, heads, page)
    pages = torch.tensor([page_address(x) for x in data], device=DEVICE)
    got = [torch.empty(heads, count * page, dim, device=DEVICE).half() for _ in range(2)]
    tokens = sinks + torch.arange(first * page, (first + count) * page, device=DEVICE)
    end = int(tokens[-1]) + 1
    mean = stored_mean(spec.tables(sinks), spec.mean_bases, end)
    decode_pages(pages, uniform(dim, 4), uniform(dim, 4), *got, page, mean, first)
    want = keys + spec.transform(spec.mean(tokens, sinks, end))
    torch.testing.assert_close(got[0].float(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize(
    ("dim", "matrix", "tokens"), [(64, True, 83), (80, True, 3), (128, False, 70), (256, True, 33)]
)
def test_rows_are_stored_as_the_reference_stores_them(dim, matrix, tokens, turns):
    """Into places in any order, some of them nowhere; and read again with their mean."""
    heads, sinks, start = 2, 5, 2
    spec = turning_spec(heads, dim, matrix=matrix)
    if not turns:
        spec = KeySpec(raw16(dim), matrix=spec.matrix, offset=spec.offset)
    rng = torch.Generator().manual_seed(3)
    both = (30 * torch.randn(tokens, 3 * heads, dim, generator=rng)).to(DEVICE, torch.bfloat16)
    both[0, :, 0] = 1e6  # saturates
    keys, values = both[:, :heads], both[:, 2 * heads :]
    positions = start + torch.arange(tokens, device=DEVICE)
    order = torch.randperm(tokens, generator=rng).to(DEVICE)
    rows = torch.full((tokens, heads, 2 * dim), 7.0, device=DEVICE).half()
    places = order * rows.stride(0)
    places[1] = -1
    end = start + tokens
    mean = stored_mean(spec.tables(sinks), spec.mean_bases, end) if turns else None
    constant = None if turns else spec.offset
    store_rows(
        keys, values, positions, places, spec.matrix, constant, mean, sinks, *rows.chunk(2, -1), rows.stride(1)
    )  # fmt: skip
    want = spec.apply(keys.transpose(0, 1), positions, sinks, end)
    kept = torch.arange(tokens, device=DEVICE) != 1
    found = rows[order].transpose(0, 1)
    torch.testing.assert_close(
        found[:, kept, :dim], to_float16(want)[:, kept], rtol=2e-3, atol=2e-3
    )
    assert torch.equal(found[:, kept, dim:], to_float16(values.transpose(0, 1).float())[:, kept])
    assert bool((found[:, 1] == 7.0).all())
    places = order * rows.stride(0)
    got = gather_rows(
        *rows.chunk(2, -1), rows.stride(1), positions, places, heads, dim, mean, sinks, copy=True
    )  # fmt: skip
    assert torch.equal(got.keys, found[..., :dim]) and torch.equal(got.values, found[..., dim:])
    read = got.keys.float()
    if turns:
        read = read + spec.transform(spec.mean(positions, sinks, end))
    torch.testing.assert_close(got.read_keys, to_float16(read), rtol=2e-3, atol=2e-3)


@dataclass
class Prompted:
    """A sequence whose last queries are a prompt's chunk, and what they should get.

    Attributes:
        sliding, softcap, sink_logits, shift: of the logits.
        finer: formats of the pages from the third on; None for those of all.
    """

    pair: tuple
    before: int
    chunk: int
    group: int
    page: int = 16
    sinks: int = 5
    window: int = 24
    sliding: int = 0
    softcap: float | None = None
    sink_logits: bool = False
    shift: bool = False
    turns: bool = True
    heads: int = 2
    finer: tuple | None = None

    def __post_init__(self):
        dim, total = self.pair[0].head_dim, self.before + self.chunk
        rng = torch.Generator().manual_seed(5)

        def draw(*shape):
            return torch.randn(*shape, generator=rng).to(DEVICE)

        self.at = torch.arange(total, device=DEVICE)
        self.spec = turning_spec(self.heads, dim, size=4)
        packed = packed_tokens(self.before, self.sinks, self.window, self.page)
        count = packed_tokens(total, self.sinks, self.window, self.page) // self.page
        self.packed, self.count = packed, count
        raw = [draw(self.heads, total, dim).half() for _ in range(2)]
        read = [x.float() for x in raw]
        self.pages = []
        for i in range(count):
            at = slice(self.sinks + i * self.page, self.sinks + (i + 1) * self.page)
            pair = self.pair if i < 2 else self.finer or self.pair
            blocks = [encode(x[:, at], fmt) for x, fmt in zip(raw, pair, strict=True)]
            for side, block, fmt in zip(read, blocks, pair, strict=True):
                side[:, at] = decode(block, fmt, self.page)
            self.pages.append(torch.cat([block.flatten() for block in blocks]))
        self.mean = None
        mean = torch.zeros(self.heads, total, dim, device=DEVICE)
        if self.turns:
            tables = self.spec.tables(self.sinks)
            self.mean = stored_mean(tables, self.spec.mean_bases, total)
            mean = self.spec.transform(self.spec.mean(self.at, self.sinks, total))
        self.query = draw(self.heads * self.group, self.chunk, dim)
        numbers = torch.linspace(-3, 3, self.heads * self.group, device=DEVICE)
        self.aux = numbers if self.sink_logits else None
        self.q_mu = 3 * draw(self.heads * self.group, self.chunk) if self.shift else None
        limit = (self.at[self.before :] + 1 - self.sinks - self.window).clamp_min(0)
        limit = self.sinks + (limit // self.page * self.page).clamp_min(packed)
        middle = slice(self.sinks, self.sinks + count * self.page)
        tiles = [
            Tile(raw[0].float() + mean, raw[1], self.at, False),
            Tile((read[0] + mean)[:, middle], read[1][:, middle], self.at[middle], True),
        ]
        mask = None
        if self.sliding:
            behind = self.at[self.before :, None] - self.at
            mask = (behind >= 0) & (behind < self.sliding)
        self.want = attend(
            self.spec.apply_query(self.query), self.at[self.before :], limit, tiles, sinks=self.sinks,
            scaling=dim**-0.5, mask=mask, softcap=self.softcap, sinks_logit=self.aux, shift=self.q_mu,
        )  # fmt: skip
        kept = torch.cat((self.at[: min(self.sinks, total)], self.at[self.sinks + packed :]))
        self.rows = PromptRows((raw[0].float() + mean)[:, kept].half(), raw[1][:, kept], packed)

    def got(self, cut=0):
        """By kernels; `cut`: pages of a first run, 0 for one run of all."""
        heads, dim = len(self.query), self.query.shape[2]
        table = torch.tensor([page_address(x) for x in self.pages] or [0], device=DEVICE)
        first = 0
        if self.sliding:
            first = max(self.before - self.sliding + 1 - self.sinks, 0) // self.page
        cuts = (cut, 2 if self.finer else first)
        edges = {first, *(min(max(x, first), self.count) for x in cuts), max(first, self.count)}
        runs = [
            PageRun(*(self.pair if a < 2 else self.finer or self.pair), a, b)
            for a, b in pairwise(sorted(edges))
        ]
        queries = query_rows(
            self.query, self.heads, self.spec.query_matrix, dim**-0.5, self.softcap, self.q_mu
        )
        out = torch.full((self.chunk, heads, dim), torch.nan, device=DEVICE)
        attend_queries(
            queries, self.before, runs, table, self.rows, Regions(self.sinks, self.window, self.page),
            LogitOptions(self.softcap, self.aux, self.sliding), out, self.mean,
        )  # fmt: skip
        return out.transpose(0, 1)


CASES = {
    "a first prompt": Prompted(PAIRS["mixed keys"], 0, 101, 2),
    "shorter than the sinks": Prompted(PAIRS["2 bits"], 0, 3, 1),
    "shorter than the window": Prompted(PAIRS["2 bits"], 0, 27, 3),
    "a chunk": Prompted(PAIRS["mixed keys"], 131, 90, 4),
    "a chunk of ternary codes": Prompted(PAIRS["ternary values"], 101, 75, 1),
    "96 channels": Prompted(PAIRS["4 and 5 bits, 96"], 80, 70, 3),
    "large pages": Prompted(PAIRS["ternary 96"], 290, 70, 1, page=128),
    "small pages": Prompted(PAIRS["mixed both"], 45, 70, 2, page=8),
    "many sinks": Prompted(PAIRS["2 bits"], 140, 70, 2, sinks=100),
    "no sinks": Prompted(PAIRS["2 bits"], 60, 70, 2, sinks=0),
    "no mean": Prompted(PAIRS["2 bits"], 60, 70, 2, turns=False),
    "a sliding window": Prompted(PAIRS["mixed keys"], 151, 90, 2, sliding=50),
    "a sliding window of a block": Prompted(PAIRS["mixed keys"], 0, 140, 1, sliding=32),
    "a soft-cap": Prompted(PAIRS["2 bits"], 70, 66, 2, softcap=5.0),
    "a soft-cap and a shift": Prompted(PAIRS["2 bits"], 70, 66, 2, softcap=5.0, shift=True, turns=False),
    "pages of two formats": Prompted(
        PAIRS["mixed keys"], 100, 90, 2, finer=(raw16(64), uniform(64, 256, "fp16"))
    ),
    "two formats and a sliding window": Prompted(
        PAIRS["2 bits"], 100, 90, 2, sliding=90, finer=(uniform(64, 16), uniform(64, 4))
    ),
    "sink logits": Prompted(PAIRS["2 bits"], 70, 66, 2, sink_logits=True),
    "sink logits and a shift": Prompted(PAIRS["2 bits"], 70, 66, 3, sink_logits=True, shift=True, turns=False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_prompts_read_what_token_by_token_reads(name, monkeypatch):
    """In one run of pages, and in several, of which the last calls go on from the ones before."""
    case = CASES[name]
    assert error(case.got(), case.want) < 2e-3
    if case.count > 2:
        heads, dim = case.heads, case.query.shape[2]
        monkeypatch.setattr(triton_prompt, "SCRATCH_NBYTES", 2 * 4 * heads * dim * case.page)
        assert error(case.got(cut=3), case.want) < 2e-3


def test_large_queries_stay_in_range():
    case = CASES["a chunk"]
    found = []
    for factor in (1.0, 2.0**20, 2.0**-30):
        dim = case.query.shape[2]
        queries = query_rows(case.query * factor, case.heads, None, dim**-0.5)
        found.append(queries.data)
        assert bool(queries.data.isfinite().all())
        torch.testing.assert_close(
            queries.scale / factor, query_rows(case.query, case.heads, None, dim**-0.5).scale
        )
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
