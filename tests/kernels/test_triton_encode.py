"""The kernels that write pages: bytes of the reference, whatever the format, the rows and what lies
around a page."""

import pytest
import torch

from kvfold.errors import KvfoldError
from kvfold.exports.spec import KeySpec
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.kernels.pages import anchor, page_address
from kvfold.kernels.quantizer import decode, encode, to_float16

pytest.importorskip("triton")
import triton
import triton.language as tl
from lowered import lower

from kvfold.kernels.gpu.append import append_step
from kvfold.kernels.gpu.device.codec import from_e4m3, to_e4m3
from kvfold.kernels.gpu.encode import encode_pages, lower_jobs, lower_pages
from kvfold.kernels.gpu.queries import empty_queries, prepare_queries
from kvfold.kernels.gpu.records import FormatChange, KeyTransform, PagedCache, PageFormat, Regions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POISON = 0xA5
MIXED = Format(((16, 16), (8, 8), (24, 4), (8, 2), (8, 0)))
# (keys, values, tokens of a page): every number of levels, kind, parameter type, head size and
# ternary rest
CASES = [
    (uniform(64, 4), uniform(64, 16, "e4m3", 16), 16),
    (MIXED, uniform(64, 3), 32),
    (raw16(64), uniform(64, 256, "fp16"), 16),
    (Format(((64, 3),), "scale", "fp16"), uniform(64, 3, "fp16", 16), 8),
    (uniform(80, 3), uniform(80, 8, "e4m3", 40), 64),
    (uniform(96, 3), uniform(96, 2, "fp16", 32), 16),
    (uniform(128, 3), uniform(128, 64), 8),
    (uniform(48, 3), uniform(48, 32, "e4m3", 16), 32),
    (uniform(16, 3), raw16(16), 128),
    (Format(((256, 256),)), uniform(256, 3), 16),
    (Format(((8, 2), (48, 32), (8, 64))), Format(((64, 16),), "scale", "fp16"), 16),
]


class Pages:
    """Pages of poison, with poison on both sides."""

    def __init__(self, count: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.room = torch.full(
            (count, (nbytes + 15) // 16 * 16 + 64), POISON, dtype=torch.uint8, device=DEVICE
        )
        starts = [-(row.data_ptr() + 16) % 16 + 16 for row in self.room]
        self.pages = [row[at : at + nbytes] for row, at in zip(self.room, starts, strict=True)]

    def addresses(self) -> torch.Tensor:
        return torch.tensor([page_address(page) for page in self.pages], device=DEVICE)

    def untouched(self) -> bool:
        """Nothing but the pages was written."""
        inside = torch.zeros_like(self.room, dtype=torch.bool)
        for mask, row, page in zip(inside, self.room, self.pages, strict=True):
            at = page.data_ptr() - row.data_ptr()
            mask[at : at + self.nbytes] = True
        return bool((self.room[~inside] == POISON).all())


def rows_of(batch: int, heads: int, tokens: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Random float16 rows; some of zeros, of one value, huge, tiny, or at the ends of float16."""
    x = torch.randn(batch, heads, tokens, dim, generator=torch.Generator().manual_seed(seed)).half()
    x[:, 0, 1] = 0
    x[:, 0, 3] = 3.0
    x[:, -1, 3] = -1.03
    x[:, 0, 5] *= 3000
    x[:, -1, 2] *= 1e-4
    x[:, -1, 6, ::2], x[:, -1, 6, 1::2] = 65504, -65504
    return x.to(DEVICE)


def reference(k, v, formats, clips) -> torch.Tensor:
    """The bytes of one page of float rows [Hkv, P, D]."""
    parts = []
    for x, fmt, clip in zip((k, v), formats, clips, strict=True):
        factor = (
            None if clip is None or fmt.params != "scale_min" else clip.cpu().reshape(len(x), 1, -1)
        )
        parts.append(encode(x.cpu(), fmt, factor).flatten())
    return torch.cat(parts)


def assert_page(
    page: torch.Tensor, expected: torch.Tensor, formats, heads: int, tokens: int
) -> None:
    """Equal bytes. A root mean square may be summed in another order and then, where it lies
    between two numbers of its type, be rounded the other way: one token in a hundred may, in
    "scale" formats, with every value within a step. The minimum of −0 and 0 has the sign of the one
    that was looked at first."""
    page = page.cpu()
    start = 0
    for fmt in formats:
        size = heads * fmt.nbytes(tokens)
        got, want = (
            page[start : start + size].view(heads, -1),
            expected[start : start + size].view(heads, -1),
        )
        start += size
        if fmt.params != "scale":
            codes = fmt.nbytes(tokens) - tokens * fmt.num_params * fmt.param_nbytes
            dtype = torch.float8_e4m3fn if fmt.param_dtype == "e4m3" else torch.float16
            params = [part[:, codes:].contiguous().view(dtype).float() for part in (got, want)]
            assert torch.equal(got[:, :codes], want[:, :codes]), fmt
            assert torch.equal(*params), fmt
            continue
        a, b = (decode(part, fmt, tokens) for part in (got, want))
        other = (a != b).any(-1)
        assert other.float().mean() <= 0.01, fmt
        step = 2 * b.square().mean(-1, keepdim=True).sqrt() + b.abs() / 8
        assert ((a - b).abs() <= step).all()
        if not other.any():
            assert torch.equal(got, want), fmt


@triton.jit
def _round_kernel(x, out, back, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    byte = to_e4m3(tl.load(x + i, mask=i < n, other=0.0))
    tl.store(out + i, byte.to(tl.uint8), mask=i < n)
    tl.store(back + i, from_e4m3(byte), mask=i < n)


def test_e4m3_is_rounded_to_nearest_even():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.float16).float()
    x = x[x.isfinite()]
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    ties = (every[:-1] + every[1:]) / 2
    x = torch.cat(
        (
            x,
            every,
            ties,
            ties * (1 + 2**-23),
            ties * (1 - 2**-23),
            torch.tensor([1e-30, -1e-42, 3e38, 464.0]),
        )
    )
    x = x.to(DEVICE)
    out, back = (
        torch.zeros(len(x), dtype=torch.uint8, device=DEVICE),
        torch.zeros(len(x), device=DEVICE),
    )
    _round_kernel[(triton.cdiv(len(x), 4096),)](x, out, back, len(x), BLOCK=4096)
    expected = x.clamp(-448, 448).cpu().to(torch.float8_e4m3fn)
    assert torch.equal(out.cpu(), expected.view(torch.uint8))
    assert torch.equal(back.cpu(), expected.float())


@pytest.mark.parametrize(("key_format", "value_format", "tokens"), CASES, ids=str)
def test_pages_equal_the_reference(key_format, value_format, tokens):
    heads, formats = 2, (key_format, value_format)
    k, v = (rows_of(2, heads, 2 * tokens + 5, key_format.head_dim, seed) for seed in (0, 1))
    clips = [
        torch.rand(heads, 1) * 0.3 + 0.7,
        torch.rand(heads, value_format.num_groups) * 0.3 + 0.7,
    ]
    pages = Pages(3, heads * (key_format.nbytes(tokens) + value_format.nbytes(tokens)))
    sequences, first = [1, 0, 1], [0, tokens - 3, tokens + 5]
    encode_pages(
        k,
        v,
        PageFormat(*formats, *(clip.to(DEVICE) for clip in clips)),
        pages.addresses(),
        torch.tensor(sequences, dtype=torch.int32, device=DEVICE),
        torch.tensor(first, dtype=torch.int32, device=DEVICE),
        page_tokens=tokens,
    )
    for page, b, t in zip(pages.pages, sequences, first, strict=True):
        expected = reference(k[b, :, t : t + tokens], v[b, :, t : t + tokens], formats, clips)
        assert_page(page, expected, formats, heads, tokens)
    assert pages.untouched()


def test_pages_of_a_ring_wrap_around():
    sinks, ring, tokens, formats = 3, 21, 16, (uniform(16, 4), raw16(16))
    history = [rows_of(1, 1, 64, 16, seed) for seed in (0, 1)]
    rows = [
        torch.full((1, 1, sinks + ring, 16), float("nan"), dtype=torch.float16, device=DEVICE)
        for _ in history
    ]
    for x, raw in zip(history, rows, strict=True):
        for t in range(40):
            raw[:, :, t if t < sinks else sinks + (t - sinks) % ring] = x[:, :, t]
    pages = Pages(1, sum(f.nbytes(tokens) for f in formats))
    first = torch.tensor([sinks + tokens], dtype=torch.int32, device=DEVICE)
    encode_pages(
        *rows, PageFormat(*formats), pages.addresses(), first * 0, first, page_tokens=tokens, sinks=sinks, ring=ring
    )  # fmt: skip
    part = slice(sinks + tokens, sinks + 2 * tokens)
    expected = reference(history[0][0, :, part], history[1][0, :, part], formats, (None, None))
    assert_page(pages.pages[0], expected, formats, 1, tokens)
    assert pages.untouched()


LOWER = [
    (raw16(32), uniform(32, 256, "fp16"), 16),
    (raw16(64), Format(((40, 256), (24, 16))), 32),
    (Format(((40, 256), (24, 16))), MIXED, 16),
    (uniform(32, 256, "fp16"), uniform(32, 16, "e4m3", 16), 32),
    (uniform(96, 16), uniform(96, 4, "e4m3", 48), 16),
    (uniform(64, 16, "fp16", 32), MIXED, 16),
    (uniform(48, 8), uniform(48, 3), 8),
    (
        Format(((8, 64), (32, 32), (16, 16), (8, 0))),
        Format(((32, 4), (16, 2), (16, 0)), "scale", "fp16"),
        16,
    ),
    (Format(((80, 3),)), uniform(80, 2), 16),
    (uniform(128, 3, "fp16", 32), uniform(128, 2, "fp16", 64), 8),
    (uniform(32, 3), raw16(32), 32),
]


@pytest.mark.parametrize(("old", "new", "tokens"), LOWER, ids=str)
def test_lowered_pages_equal_the_reference(old, new, tokens):
    heads, other = 2, raw16(old.head_dim)
    k, v = (rows_of(1, heads, tokens, old.head_dim, seed)[0].cpu() for seed in (2, 3))
    before, after = (old, other), (new, other)
    sources, pages = (
        Pages(2, heads * sum(f.nbytes(tokens) for f in pair)) for pair in (before, after)
    )
    clip = (torch.rand(heads) * 0.3 + 0.7).to(DEVICE)
    for source, sign in zip(sources.pages, (1, -1), strict=True):
        source.copy_(reference(sign * k, sign * v, before, (None, None)))
    held = sources.room.clone()
    lower(
        sources.addresses(), pages.addresses(), PageFormat(*before), PageFormat(*after, clip), num_kv_heads=heads,
        page_tokens=tokens,
    )  # fmt: skip
    for source, page in zip(sources.pages, pages.pages, strict=True):
        at = heads * old.nbytes(tokens)
        x = [
            decode(source.cpu()[part].view(heads, -1), f, tokens)
            for part, f in ((slice(at), old), (slice(at, None), other))
        ]
        assert_page(page, reference(*x, after, (clip, None)), after, heads, tokens)
    assert pages.untouched()
    assert torch.equal(sources.room, held)


def test_pages_of_many_formats_go_down_in_one_launch():
    """As they do one step at a time: each with its own formats and clips, of one factor a head or
    one a group, one side or both; as many pages of each as there happen to be."""
    heads, tokens, dim = 2, 16, 64
    generator = torch.Generator().manual_seed(9)
    steps = [
        (raw16(dim), uniform(dim, 256, "fp16"), 3),
        (uniform(dim, 256, "fp16"), uniform(dim, 16, "e4m3", 16), 1),
        (uniform(dim, 16), MIXED, 2),
        (uniform(dim, 16), uniform(dim, 3), 1),
    ]
    work, alone, together = [], [], []
    for i, (old, new, count) in enumerate(steps):
        sides = ((old, raw16(dim)), (new, uniform(dim, 4, "fp16", 32)))
        sizes = [heads * sum(fmt.nbytes(tokens) for fmt in pair) for pair in sides]
        sources, *pages = (Pages(count, size) for size in (sizes[0], sizes[1], sizes[1]))
        for source in sources.pages:
            x = torch.randn(2, heads, tokens, dim, generator=generator)
            source.copy_(reference(*x, sides[0], (None, None)))
        clips = [torch.rand(heads, groups, generator=generator) * 0.3 + 0.7 for groups in (1, 2)]
        fmt = PageFormat(*sides[1], *(clip.to(DEVICE) if i % 2 else None for clip in clips))
        shape = {"num_kv_heads": heads, "page_tokens": tokens}
        before = PageFormat(*sides[0])
        lower(sources.addresses(), pages[0].addresses(), before, fmt, **shape)
        addresses = [x.addresses().tolist() for x in (sources, pages[1])]
        work.append((sources, FormatChange(*addresses, before, fmt)))
        alone.append(pages[0])
        together.append(pages[1])
    (jobs,) = lower_jobs([step for _, step in work], **shape, device=DEVICE)
    lower_pages(jobs, **shape)
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.pages, other.pages, strict=True))
        assert other.untouched() and not all((page == POISON).all() for page in other.pages)
    assert not lower_jobs([], **shape, device=DEVICE)


# (sinks, window, tokens of a page, room beyond the least, head_dim, formats, with a matrix, dtype)
STEPS = [
    (3, 5, 8, 0, 16, (uniform(16, 4), uniform(16, 3)), True, torch.bfloat16),
    (
        0,
        0,
        8,
        3,
        24,
        (Format(((16, 4), (8, 2)), "scale", "fp16"), uniform(24, 16)),
        False,
        torch.float32,
    ),
    (1, 0, 16, 0, 80, (uniform(80, 4), uniform(80, 4, "e4m3", 16)), True, torch.float16),
    (2, 7, 16, 1, 32, (raw16(32), raw16(32)), True, torch.bfloat16),
]


@pytest.mark.parametrize(
    ("sinks", "window", "size", "extra", "dim", "formats", "matrix", "dtype"), STEPS
)
def test_steps_equal_the_reference(sinks, window, size, extra, dim, formats, matrix, dtype):
    batch, heads, group, steps = 2, 2, 3, 2 * size + window + 3
    ring = window + size + extra
    torch.manual_seed(0)
    m = torch.eye(dim) + 0.2 * torch.randn(heads, dim, dim) if matrix else None
    offset = torch.randn(heads, dim) if matrix else None
    spec = KeySpec(formats[0], (), m, offset, torch.tensor([0.9, 0.8])).to(DEVICE)
    inverse = None if spec.query_matrix is None else spec.query_matrix.contiguous()
    clip = (torch.rand(heads, formats[1].num_groups) * 0.2 + 0.8).to(DEVICE)
    raw = [
        torch.full(
            (batch, heads, sinks + ring, dim), float("nan"), dtype=torch.float16, device=DEVICE
        )
        for _ in "kv"
    ]
    pages = Pages(batch * 3, heads * sum(f.nbytes(size) for f in formats))
    table = pages.addresses().view(batch, 3)
    state = torch.zeros(batch, 2, dtype=torch.int32, device=DEVICE)
    history: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(batch)]
    queries = empty_queries(batch, heads * group, heads, dim, DEVICE)
    ahead = size - 1  # the second sequence begins with tokens that the steps did not write
    for t in range(ahead):
        row = t if t < sinks else sinks + (t - sinks) % ring
        for x in raw:
            x[1, :, row] = torch.randn(heads, dim).half().to(DEVICE)
        history[1].append((raw[0][1, :, row].clone(), raw[1][1, :, row].clone()))
    state[1] = torch.tensor([ahead, max(0, ahead - sinks - window) // size], dtype=torch.int32)
    written = 0
    for step in range(steps):
        k, v, q = (
            torch.randn(batch, n, 1, dim).to(DEVICE, dtype) for n in (heads, heads, heads * group)
        )
        if step == 4:
            v[0, 0, 0, 1] = 60000
            k[1, 1, 0, 2] = 65504 if dtype == torch.float16 else 3e6
        before = pages.room.clone()
        held = state.clone()
        append_step(
            k, v, q, PagedCache(table, state, *raw), queries, [PageFormat(*formats, spec.clip, clip)],
            Regions(sinks, window, size), scaling=0.3, transform=KeyTransform(spec.matrix, spec.offset, inverse),
        )  # fmt: skip
        assert torch.equal(state, held)
        z, saved = spec.apply(k, state[:, :1].long(), sinks), to_float16(v.float())
        for b, (t, n) in enumerate(state.tolist()):
            row = t if t < sinks else sinks + (t - sinks) % ring
            got = raw[0][b, :, row]
            if matrix:
                torch.testing.assert_close(
                    got.float(), to_float16(z[b, :, 0]).float(), rtol=2e-3, atol=2e-4
                )
            else:
                assert torch.equal(got, to_float16(z[b, :, 0]))
            assert torch.equal(raw[1][b, :, row], saved[b, :, 0])
            history[b].append((got.clone(), raw[1][b, :, row].clone()))
            due = max(n, max(0, t + 1 - sinks - window) // size)
            if due > n:
                part = history[b][sinks + n * size : sinks + due * size]
                keys, values = (torch.stack([pair[i] for pair in part], 1) for i in (0, 1))
                expected = reference(keys, values, formats, (spec.clip, clip))
                page = pages.pages[b * 3 + n]
                assert_page(page, expected, formats, heads, size)
                assert page.data_ptr() == anchor(page.device).data_ptr() + 16 * int(table[b, n])
                before[b * 3 + n] = pages.room[b * 3 + n]
                written += 1
            state[b] = torch.tensor([t + 1, due], dtype=torch.int32)
        assert torch.equal(pages.room, before)  # no other page
        wanted = prepare_queries(spec.apply_query(q), heads, 0.3)
        torch.testing.assert_close(queries.scale, wanted.scale, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            queries.data.float(), wanted.data.float(), rtol=1e-3, atol=2e-3 if matrix else 0
        )
        assert (queries.columns, queries.group, queries.tokens) == (
            wanted.columns,
            wanted.group,
            wanted.tokens,
        )
    assert written >= 4
    assert pages.untouched()


def test_what_cannot_be_packed_is_refused():
    x = torch.zeros(1, 2, 16, 16, dtype=torch.float16, device=DEVICE)
    one = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    fmt = PageFormat(uniform(16, 4), uniform(16, 4))
    with pytest.raises(KvfoldError, match="float16"):
        encode_pages(x.float(), x.float(), fmt, one.long(), one, one, page_tokens=16)
    with pytest.raises(KvfoldError, match="clip"):
        clipped = fmt._replace(key_clip=torch.ones(3, device=DEVICE))
        encode_pages(x, x, clipped, one.long(), one, one, page_tokens=16)
    with pytest.raises(KvfoldError, match="page_tokens=24"):
        lower(one.long(), one.long(), fmt, fmt, num_kv_heads=2, page_tokens=24)
    with pytest.raises(KvfoldError, match="head_dim 32 and 16"):
        lower(
            one.long(),
            one.long(),
            fmt,
            fmt._replace(value=raw16(32)),
            num_kv_heads=2,
            page_tokens=16,
        )
    queries = empty_queries(1, 2, 2, 16, DEVICE)
    state = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    step = (
        x[:, :, :1],
        x[:, :, :1],
        x[:, :, :1],
        PagedCache(one.long()[None], state, x, x),
        queries,
        [fmt],
    )
    with pytest.raises(KvfoldError, match=r"torch.int64 \(1,\); give contiguous int32"):
        append_step(*step, Regions(0, 0, 16), scaling=1.0, rungs=one.long())
    with pytest.raises(KvfoldError, match="ring"):
        append_step(*step, Regions(4, 8, 16), scaling=1.0)
