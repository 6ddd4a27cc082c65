"""Pages of different formats in one call: the kernels against plain torch on the same bytes, from
16 bits down to the floor."""

from collections.abc import Sequence
from itertools import pairwise

import prepared
import pytest
import torch
from torch import Tensor

from kvfold import KvfoldError
from kvfold.kernels.attention import Tile, attend, packed_tokens
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.kernels.pages import page_address
from kvfold.kernels.quantizer import decode, encode

pytest.importorskip("triton")
from lowered import lower

from kvfold.kernels.gpu.append import append_step
from kvfold.kernels.gpu.attention import Prompt, attention
from kvfold.kernels.gpu.queries import empty_queries, prepare_queries
from kvfold.kernels.gpu.records import LogitOptions, PagedCache, PageFormat, Regions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIX = Format(((16, 16), (8, 8), (16, 4), (16, 2), (8, 0)))
RAW = (raw16(64), raw16(64))
BYTE = (uniform(64, 256, "fp16"), uniform(64, 256, "fp16"))
HALF = (uniform(64, 16), uniform(64, 16))
LADDERS = {
    "four rungs": [(MIX, uniform(64, 3)), HALF, BYTE, RAW],
    "two rungs": [(uniform(64, 4), uniform(64, 4)), RAW],
    "classes above classes": [
        (MIX, uniform(64, 4)),
        (Format(((40, 256), (24, 16))), uniform(64, 16, "e4m3", 32)),
        RAW,
    ],
}


def decode_rungs(
    pages: Sequence[Tensor],
    formats: Sequence[tuple[Format, Format]],
    segments: Sequence[int],
    num_kv_heads: int,
    page_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence's pages of several formats, in plain torch: what the
    attention kernels' `formats` and `segments` mean.

    Args:
        pages: uint8, [keys of all heads | values of all heads] each, in rising position.
        formats: (key format, value format) of each of R rungs.
        segments: R + 1 rising numbers; pages segments[r] … segments[r + 1] − 1 are of rung r. The
            first counts as 0, the last as the number of pages, whatever they are.
    Returns:
        Two float32 [num_kv_heads, len(pages)·page_tokens, head_dim].
    """
    edges = [0, *segments[1:-1], len(pages)]
    parts = []
    for pair, (start, end) in zip(formats, pairwise(edges), strict=True):
        split = num_kv_heads * pair[0].nbytes(page_tokens)
        for page in pages[start:end]:
            blocks = (page[:split], page[split:])
            parts.append(
                [
                    decode(x.view(num_kv_heads, -1), f, page_tokens)
                    for x, f in zip(blocks, pair, strict=True)
                ]
            )
    if not parts:
        empty = torch.zeros(num_kv_heads, 0, formats[0][0].head_dim, dtype=torch.float32)
        return empty, empty
    return torch.cat([keys for keys, _ in parts], 1), torch.cat([values for _, values in parts], 1)


class Mixed:
    """Sequences whose pages are of several formats, the oldest of the lowest rung."""

    def __init__(
        self, ladder, lengths, cuts, heads=4, kv_heads=2, page=16, sinks=5, window=24, seed=0
    ):
        self.ladder, self.lengths, self.page, self.sinks, self.window = (
            ladder,
            lengths,
            page,
            sinks,
            window,
        )
        self.kv_heads, self.ring = kv_heads, -(-(window + page) // page) * page
        dim = ladder[0][0].head_dim
        rng = torch.Generator().manual_seed(seed)
        counts = [packed_tokens(n, sinks, window, page) // page for n in lengths]
        shape = (len(lengths), kv_heads, sinks + self.ring, dim)
        self.raw = [torch.full(shape, 1e4, dtype=torch.float16, device=DEVICE) for _ in "kv"]
        self.table = torch.zeros(
            len(lengths), max(*counts, 1) + 1, dtype=torch.int64, device=DEVICE
        )
        self.state = torch.tensor(
            list(zip(lengths, counts, strict=True)), dtype=torch.int32, device=DEVICE
        )
        # the outer columns mean nothing
        self.segments = torch.tensor(
            [[77, *cut, -5] for cut in cuts], dtype=torch.int32, device=DEVICE
        )
        self.query = torch.randn(len(lengths), heads, 1, dim, generator=rng).to(DEVICE)
        self.pages, self.rows = [], []
        for b, (n, count) in enumerate(zip(lengths, counts, strict=True)):
            raw = [torch.randn(kv_heads, n, dim, generator=rng).half().to(DEVICE) for _ in "kv"]
            pages = []
            for p in range(count):
                run = slice(sinks + p * page, sinks + (p + 1) * page)
                pair = ladder[sum(p >= cut for cut in cuts[b])]
                pages.append(
                    torch.cat(
                        [encode(x[:, run], f).flatten() for x, f in zip(raw, pair, strict=True)]
                    )
                )
                self.table[b, p] = page_address(pages[-1])
            for t in [*range(min(sinks, n)), *range(sinks + count * page, n)]:
                slot = t if t < sinks else sinks + (t - sinks) % self.ring
                for buffer, x in zip(self.raw, raw, strict=True):
                    buffer[b, :, slot] = x[:, t]
            self.pages.append(pages)
            self.rows.append(raw)

    def read(self, b):
        """Keys and values of sequence b as the cache has them, float32 [Hkv, length, D]."""
        read = [x.float() for x in self.rows[b]]
        middle = slice(self.sinks, self.sinks + len(self.pages[b]) * self.page)
        cut = self.segments[b].tolist()
        packed = decode_rungs(self.pages[b], self.ladder, cut, self.kv_heads, self.page)
        for x, pages in zip(read, packed, strict=True):
            x[:, middle] = pages.to(DEVICE)
        return read

    def expected(self, sliding=0, **options):
        out = []
        for b, n in enumerate(self.lengths):
            at = torch.arange(n, device=DEVICE)
            mask = (at > n - 1 - sliding)[None] if sliding else None
            tiles = [Tile(*self.read(b), at, False)]
            scaling = self.query.shape[-1] ** -0.5
            none = torch.zeros_like(at[-1:])
            out.append(
                attend(
                    self.query[b],
                    at[-1:],
                    none,
                    tiles,
                    sinks=0,
                    scaling=scaling,
                    mask=mask,
                    **options,
                )
            )
        return torch.stack(out).transpose(1, 2)

    def got(self, sliding=0, softcap=0.0, aux=None, **options):
        dim = self.query.shape[-1]
        out = torch.full(
            (len(self.lengths), 1, self.query.shape[1], dim), float("nan"), device=DEVICE
        )
        return attention(
            prepare_queries(self.query, self.kv_heads, dim**-0.5, softcap), self.cache(), self.ladder, out,
            self.regions(), LogitOptions(softcap, aux, sliding), **options,
        )  # fmt: skip

    def cache(self):
        return PagedCache(self.table, self.state, *self.raw, self.segments)

    def regions(self):
        return Regions(self.sinks, self.window, self.page, self.ring)


def error(got, expected):
    return float((got.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


# of 21, 3, 8 and 0 pages: ragged cuts; all in the floor; all in one rung between; none
LENGTHS = [5 + 24 + 21 * 16 + 3, 77, 5 + 24 + 8 * 16, 3]
CUTS = {
    2: [[9], [3], [0], [0]],
    3: [[9, 9], [3, 3], [0, 8], [0, 0]],
    4: [[2, 9, 15], [3, 3, 3], [0, 8, 8], [0, 0, 0]],
}


@pytest.mark.parametrize("name", LADDERS)
@pytest.mark.parametrize("splits", [0, 3])
def test_pages_of_several_formats(name, splits):
    ladder = LADDERS[name]
    case = Mixed(ladder, LENGTHS, CUTS[len(ladder)])
    assert error(case.got(splits=splits), case.expected()) < 1e-3


@pytest.mark.parametrize(("page", "sliding"), [(8, 100), (32, 20), (128, 0)])
def test_other_page_sizes_and_windows(page, sliding):
    case = Mixed(
        LADDERS["four rungs"], [29 + 6 * page + 1, 29 + page], [[1, 3, 4], [0, 0, 1]], page=page
    )
    assert error(case.got(sliding=sliding), case.expected(sliding=sliding)) < 1e-3


def test_soft_cap_and_sink_logits():
    case = Mixed(LADDERS["two rungs"], LENGTHS, CUTS[2])
    aux = torch.tensor([2.0, -1.0, 5.0, 0.0], device=DEVICE)
    assert error(case.got(softcap=2.0), case.expected(softcap=2.0)) < 1e-3
    assert error(case.got(aux=aux), case.expected(sinks_logit=aux)) < 1e-3


@pytest.mark.parametrize(
    ("before", "chunk", "cut"), [(209, 20, [2, 6, 9]), (131, 2, [6, 6, 6]), (70, 33, [0, 0, 0])]
)
def test_prompts(before, chunk, cut):
    """A chunk's queries read pages of every rung, and in 16 bits what the chunk itself packed."""
    total, dim, ladder = before + chunk, 64, LADDERS["four rungs"]
    case = Mixed(ladder, [total], [cut])
    sinks, window, page = case.sinks, case.window, case.page
    query = torch.randn(1, 4, chunk, dim, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    packed = packed_tokens(before, sinks, window, page)
    at = torch.arange(total, device=DEVICE)
    limit = (sinks + (at[before:] + 1 - sinks - window).clamp_min(0) // page * page).clamp_min(
        sinks + packed
    )
    raw, read = case.rows[0], case.read(0)
    middle = slice(sinks, sinks + len(case.pages[0]) * page)
    tiles = [Tile(*raw, at, False), Tile(read[0][:, middle], read[1][:, middle], at[middle], True)]
    want = attend(query[0], at[before:], limit, tiles, sinks=sinks, scaling=dim**-0.5)
    rows = torch.cat((at[:sinks], at[sinks + packed :]))
    out = torch.full((1, chunk, 4, dim), float("nan"), device=DEVICE)
    cache = PagedCache(
        case.table, case.state, *(x[None, :, rows].contiguous() for x in raw), case.segments
    )
    prompt = Prompt(
        *(torch.tensor([x], dtype=torch.int32, device=DEVICE) for x in (before, packed))
    )
    attention(
        prepare_queries(query, 2, dim**-0.5), cache, ladder, out, Regions(sinks, window, page), prompt=prompt
    )  # fmt: skip
    assert error(out[0].transpose(0, 1), want) < 1e-3


def test_steps_add_pages_to_the_last_rung_and_lowering_moves_the_cuts():
    """Pages come due in 16 bits, and old ones go down a rung at a time; `segments` is written only
    for the latter."""
    ladder, dim, page = LADDERS["four rungs"], 64, 16
    case = Mixed(ladder, [5 + 24 + 4 * page + 13, 58], [[1, 2, 4], [0, 0, 1]])
    sizes = [2 * sum(f.nbytes(page) for f in pair) for pair in ladder]
    formats = [PageFormat(*pair) for pair in ladder]
    queries = empty_queries(2, 4, 2, dim, torch.device(DEVICE))
    case.table = torch.cat((case.table, torch.zeros_like(case.table)), 1)
    for step in range(20):
        for b, (n, count) in enumerate(case.state.tolist()):
            if (n + 1 - case.sinks - case.window) // page > count:
                case.pages[b].append(
                    torch.full((sizes[-1],), 0xA5, dtype=torch.uint8, device=DEVICE)
                )
                case.table[b, count] = page_address(case.pages[b][-1])
        if step in (3, 9):
            rung = 2 if step == 3 else 1  # the oldest page of `rung` + 1 goes down
            for b in range(2):
                at = int(case.segments[b, rung + 1])
                old = case.pages[b][at]
                case.pages[b][at] = torch.full(
                    (sizes[rung],), 0xA5, dtype=torch.uint8, device=DEVICE
                )
                places = [
                    torch.tensor([page_address(x)], device=DEVICE) for x in (old, case.pages[b][at])
                ]
                lower(*places, formats[rung + 1], formats[rung], num_kv_heads=2, page_tokens=page)
                case.table[b, at] = places[1]
                case.segments[b, rung + 1] += 1
        keys, values, query = (torch.randn(2, heads, 1, dim, device=DEVICE) for heads in (2, 2, 4))
        append_step(
            keys, values, query, case.cache(), queries, formats, case.regions(), scaling=0.125
        )
        case.query = query
        case.rows = [
            [torch.cat((x, new[b].half()), 1) for x, new in zip(raw, (keys, values), strict=True)]
            for b, raw in enumerate(case.rows)
        ]
        case.lengths = [n + 1 for n in case.lengths]
        out = torch.full((2, 1, 4, dim), float("nan"), device=DEVICE)
        attention(queries, case.cache(), ladder, out, case.regions(), new=1, advance=True)
        assert error(out, case.expected()) < 1e-3
        assert case.state.tolist() == [
            [n, len(pages)] for n, pages in zip(case.lengths, case.pages, strict=True)
        ]
    assert case.segments[:, 1:4].tolist() == [[1, 3, 5], [0, 1, 2]]


def test_what_does_not_fit_is_refused():
    case = Mixed(LADDERS["two rungs"], [40], [[0]])
    with pytest.raises(KvfoldError, match=r"segments of shape \(1, 2\) don't fit 2 formats"):
        case.segments = case.segments[:, 1:]
        case.got()
    case.segments = None
    with pytest.raises(KvfoldError, match="segments of shape None"):
        case.got()


def test_the_reference_decodes_by_rung():
    pair, other = LADDERS["two rungs"]
    x = torch.randn(2, 8, 64)
    pages = [torch.cat([encode(x, f).flatten() for f in formats]) for formats in (pair, other)]
    keys, values = decode_rungs(pages, [pair, other], [0, 1, 2], 2, 8)
    for got, low, high in zip((keys, values), pair, other, strict=True):
        assert torch.equal(got[:, :8], decode(encode(x, low), low, 8))
        assert torch.equal(got[:, 8:], decode(encode(x, high), high, 8))
    assert [x.shape for x in decode_rungs([], [pair, other], [0, 0, 0], 2, 8)] == [(2, 0, 64)] * 2


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles what it runs")
def test_kernels_that_add_the_rotating_mean_compile_for_a_gpu():
    code = "import compile_kernels; compile_kernels.main(['mean'], prompt=False)"
    run = prepared.python("compiler", code)
    assert run.returncode == 0, run.stderr[-2000:]
