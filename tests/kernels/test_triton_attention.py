"""Attention kernels against plain torch on the same packed bytes: every format, ragged batches,
prompts; compiled for a GPU."""

from copy import copy

import prepared
import pytest
import torch

from kvfold.kernels.attention import Tile, attend, packed_tokens
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.kernels.pages import page_address
from kvfold.kernels.quantizer import decode, encode

triton = pytest.importorskip("triton")
from kvfold.kernels.gpu import attention as kernels  # noqa: E402
from kvfold.kernels.gpu.queries import prepare_queries  # noqa: E402
from kvfold.kernels.gpu.records import LogitOptions, PagedCache, Regions  # noqa: E402

MIX = Format(((16, 16), (8, 8), (16, 4), (16, 2), (8, 0)))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS = {
    "2 bits": (uniform(64, 4), uniform(64, 4)),
    "mixed keys": (MIX, uniform(64, 4)),
    "mixed both": (MIX, MIX),
    "ternary values": (MIX, uniform(64, 3)),
    "ternary keys, 3 bits": (uniform(64, 3), uniform(64, 8, "fp16")),
    "ternary 128": (uniform(128, 3), uniform(128, 3)),
    "ternary 96": (uniform(96, 3), uniform(96, 3, "fp16")),
    "ternary symmetric": (Format(((80, 3),), "scale"), Format(((80, 3),), "scale")),
    "4 and 5 bits, 96": (uniform(96, 16), uniform(96, 32, "fp16")),
    "8 and 6 bits, 80": (uniform(80, 256, "fp16"), uniform(80, 64, "fp16")),
    "16 and 8 bits": (raw16(64), uniform(64, 256, "fp16")),
    "6 and 16 bits": (uniform(64, 64, "fp16"), raw16(64)),
    "groups": (uniform(64, 4, "e4m3", 32), uniform(64, 8, "e4m3", 16)),
    "wide": (Format(((64, 16), (64, 4), (128, 2))), uniform(256, 4)),
}


class Case:
    """Sequences in packed pages and a ring, and what every query should get."""

    def __init__(
        self, pair, lengths, heads, kv_heads, page, sinks=5, window=24, seed=0, dtype=torch.float32
    ):
        self.key_format, self.value_format = pair
        self.sinks, self.window, self.page, self.lengths = sinks, window, page, lengths
        self.ring = -(-(window + page) // page) * page
        dim = self.key_format.head_dim
        rng = torch.Generator().manual_seed(seed)
        batch = len(lengths)
        pages = [packed_tokens(n, sinks, window, page) // page for n in lengths]
        shape = (batch, kv_heads, sinks + self.ring, dim)
        # rows that hold no token: numbers that would be seen in the output
        self.raw_keys = torch.full(shape, 1e4, dtype=torch.float16, device=DEVICE)
        self.raw_values = torch.full(shape, 1e4, dtype=torch.float16, device=DEVICE)
        self.table = torch.zeros(batch, max(*pages, 1), dtype=torch.int64, device=DEVICE)
        self.state = torch.tensor(
            [[n, m] for n, m in zip(lengths, pages, strict=True)], dtype=torch.int32, device=DEVICE
        )
        self.query = torch.randn(batch, heads, 1, dim, generator=rng).to(DEVICE, dtype)
        self.kept, self.rows = [], []
        for b, (n, count) in enumerate(zip(lengths, pages, strict=True)):
            raw = [torch.randn(kv_heads, n, dim, generator=rng).half().to(DEVICE) for _ in range(2)]
            read = [x.float() for x in raw]
            for p in range(count):
                run = slice(sinks + p * page, sinks + (p + 1) * page)
                blocks = [
                    encode(raw[i][:, run], (self.key_format, self.value_format)[i])
                    for i in range(2)
                ]
                for i in range(2):
                    read[i][:, run] = decode(
                        blocks[i], (self.key_format, self.value_format)[i], page
                    )
                data = torch.cat([x.flatten() for x in blocks])
                self.kept.append(data)
                self.table[b, p] = page_address(data)
            for t in [*range(min(sinks, n)), *range(sinks + count * page, n)]:
                slot = t if t < sinks else sinks + (t - sinks) % self.ring
                self.raw_keys[b, :, slot], self.raw_values[b, :, slot] = raw[0][:, t], raw[1][:, t]
            self.rows.append((raw, read, count))

    def regions(self, ring=0):
        return Regions(self.sinks, self.window, self.page, ring)

    def cache(self):
        return PagedCache(self.table, self.state, self.raw_keys, self.raw_values)

    def expected(self, softcap=None, sliding=0, aux=None):
        """[B, 1, H, D] by `attend` over what is cached."""
        out = []
        for b, (_, read, _) in enumerate(self.rows):
            n = self.lengths[b]
            at = torch.arange(n, device=DEVICE)
            mask = (at > n - 1 - sliding)[None] if sliding else None
            out.append(
                attend(
                    self.query[b].float(), at[-1:], torch.zeros_like(at[-1:]), [Tile(*read, at, False)],
                    sinks=0, scaling=self.query.shape[-1] ** -0.5, mask=mask, softcap=softcap, sinks_logit=aux,
                )
            )  # fmt: skip
        return torch.stack(out).transpose(1, 2)

    def got(self, softcap=0.0, sliding=0, aux=None, **options):
        dim = self.query.shape[-1]
        queries = prepare_queries(self.query, self.raw_keys.shape[1], dim**-0.5, softcap)
        out = torch.full(
            (len(self.lengths), 1, self.query.shape[1], dim), float("nan"), device=DEVICE
        )
        return kernels.attention(
            queries, self.cache(), [(self.key_format, self.value_format)], out.to(self.query.dtype),
            self.regions(self.ring), LogitOptions(softcap, aux, sliding), **options,
        )  # fmt: skip


def error(got, expected):
    return float((got.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("page", [8, 32, 128])
@pytest.mark.parametrize("name", PAIRS)
def test_every_format(name, page):
    case = Case(PAIRS[name], [5 + 24 + 3 * page + 7, 37 if page == 8 else 1], 4, 2, page)
    assert error(case.got(), case.expected()) < 1e-3


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (7, 1), (12, 4), (16, 1)])
def test_query_groups(heads, kv_heads):
    case = Case(PAIRS["mixed keys"], [211, 64], heads, kv_heads, 16)
    assert error(case.got(), case.expected()) < 1e-3


@pytest.mark.parametrize("length", [1, 4, 5, 6, 28, 29, 44, 45, 46, 60, 61, 62, 301])
def test_lengths_around_every_edge(length):
    case = Case(PAIRS["2 bits"], [length], 2, 1, 16)
    assert error(case.got(), case.expected()) < 1e-3


@pytest.mark.parametrize("splits", [1, 3, 5])
def test_the_number_of_splits_does_not_matter(splits):
    case = Case(PAIRS["mixed keys"], [700, 100], 4, 2, 32)
    assert error(case.got(splits=splits), case.expected()) < 1e-3


@pytest.mark.parametrize("invariant", [True, False])
def test_a_rows_bits_do_not_depend_on_its_batch(invariant, monkeypatch):
    """A sequence by itself, and beside a longer one, whose table is wider, and a short one."""
    monkeypatch.setattr(kernels, "FIXED_TILES", 1)
    monkeypatch.setattr(
        kernels, "pick_splits", lambda programs, tokens, device: tokens // (256 * programs) + 1
    )
    lengths = [420, 5000, 33]  # of 4, 39 and 1 parts
    case = Case(PAIRS["2 bits"], lengths, 2, 1, 32)
    options = {"batch_invariant": invariant}
    together = case.got(**options)
    assert error(together, case.expected()) < 1e-3
    for b, length in enumerate(lengths[:2]):
        alone = copy(case)
        alone.lengths, alone.table = [length], case.table[b : b + 1, : length // 32].contiguous()
        for name in ("state", "raw_keys", "raw_values", "query"):
            setattr(alone, name, getattr(case, name)[b : b + 1])
        assert torch.equal(alone.got(**options)[0], together[b]) == invariant


@pytest.mark.parametrize("name", ["2 bits", "mixed keys", "16 and 8 bits"])
@pytest.mark.parametrize("sliding", [1, 20, 100, 1000])
def test_sliding_windows(name, sliding):
    case = Case(PAIRS[name], [250, 30], 2, 1, 32)
    assert error(case.got(sliding=sliding), case.expected(sliding=sliding)) < 1e-3


def test_soft_cap_and_sink_logits():
    case = Case(PAIRS["mixed keys"], [250, 30], 4, 2, 32)
    aux = torch.tensor([2.0, -1.0, 5.0, 0.0], device=DEVICE)
    assert error(case.got(softcap=2.0), case.expected(softcap=2.0)) < 1e-3
    assert error(case.got(aux=aux), case.expected(aux=aux)) < 1e-3


def test_large_queries_and_values_stay_in_range():
    case = Case(PAIRS["2 bits"], [150], 2, 1, 32)
    case.query *= 3e4
    assert (
        error(case.got(), case.expected()) < 2e-2
    )  # attention of one token, nearly: a rounded query may pick another
    case.query *= 1e-9  # equal weights: the output is small beside what is summed
    assert error(case.got(), case.expected()) < 2e-3


def test_state_moves_on_only_when_asked():
    case = Case(PAIRS["2 bits"], [100, 61], 2, 1, 16)
    case.state[:, 0] -= 1
    case.state[1, 1] -= 1  # its last page came due with the last token
    before = case.state.clone()
    assert error(case.got(new=1), case.expected()) < 1e-3
    assert torch.equal(case.state, before)
    case.got(new=1, advance=True)
    assert case.state.tolist() == [[100, 4], [61, 2]]


def prompt_case(pair, before, chunk, group, kv_heads=2, page=16, sinks=5, window=24):
    """A Case, queries, what they should get, and the keywords of `attention` for them."""
    total, dim = before + chunk, pair[0].head_dim
    case = Case(pair, [total], group * kv_heads, kv_heads, page, sinks, window)
    raw, read, count = case.rows[0]
    query = torch.randn(
        1, group * kv_heads, chunk, dim, generator=torch.Generator().manual_seed(3)
    ).to(DEVICE)
    packed = packed_tokens(before, sinks, window, page)
    at = torch.arange(total, device=DEVICE)
    limit = sinks + (at[before:] + 1 - sinks - window).clamp_min(0) // page * page
    limit = limit.clamp_min(sinks + packed)
    middle = slice(sinks, sinks + count * page)
    tiles = [Tile(*raw, at, False), Tile(read[0][:, middle], read[1][:, middle], at[middle], True)]
    rows = torch.cat((at[: min(sinks, total)], at[sinks + packed :]))
    raw16s = [x[None, :, rows].contiguous() for x in raw]
    cache = PagedCache(case.table, case.state, *raw16s)
    prompt = kernels.Prompt(
        *(torch.tensor([x], dtype=torch.int32, device=DEVICE) for x in (before, packed))
    )
    together = (int(limit[0]) - sinks) // page
    return case, query, (at[before:], limit, tiles), cache, prompt, together


@pytest.mark.parametrize("name", ["2 bits", "mixed keys", "ternary values", "16 and 8 bits"])
@pytest.mark.parametrize(
    ("before", "chunk", "group"), [(0, 70, 1), (70, 20, 3), (131, 2, 4), (20, 19, 2)]
)
def test_prompts_read_what_token_by_token_reads(name, before, chunk, group):
    pair = PAIRS[name]
    dim = pair[0].head_dim
    case, query, (positions, limit, tiles), cache, prompt, _ = prompt_case(
        pair, before, chunk, group
    )
    want = attend(query[0], positions, limit, tiles, sinks=5, scaling=dim**-0.5)
    out = torch.full((1, chunk, group * 2, dim), float("nan"), device=DEVICE)
    kernels.attention(
        prepare_queries(query, 2, dim**-0.5), cache, [pair], out, case.regions(), prompt=prompt
    )
    assert error(out[0].transpose(0, 1), want) < 1e-3


@pytest.mark.parametrize(
    ("sinks", "before", "chunk", "window"),
    [(0, 40, 20, 24), (31, 40, 20, 24), (33, 0, 45, 24), (33, 140, 20, 24), (64, 0, 72, 100), (64, 60, 44, 24),
     (64, 140, 20, 24), (100, 60, 3, 24), (100, 140, 20, 24)],
)  # fmt: skip
def test_prompts_read_all_sinks_however_many_blocks_they_fill(sinks, before, chunk, window):
    pair = PAIRS["2 bits"]
    dim = pair[0].head_dim
    case, query, (positions, limit, tiles), cache, prompt, _ = prompt_case(
        pair, before, chunk, 2, sinks=sinks, window=window
    )
    want = attend(query[0], positions, limit, tiles, sinks=sinks, scaling=dim**-0.5)
    out = torch.full((1, chunk, 4, dim), float("nan"), device=DEVICE)
    kernels.attention(
        prepare_queries(query, 2, dim**-0.5), cache, [pair], out, case.regions(), prompt=prompt
    )
    assert error(out[0].transpose(0, 1), want) < 1e-3


@pytest.mark.parametrize("sinks", [0, 31, 33, 64, 100])
@pytest.mark.parametrize("length", [64, 90, 170])
def test_steps_read_all_sinks_however_many_blocks_they_fill(sinks, length):
    case = Case(PAIRS["2 bits"], [length, 1], heads=4, kv_heads=2, page=16, sinks=sinks)
    assert error(case.got(), case.expected()) < 1e-3


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles what it runs")
@pytest.mark.parametrize("prompt", [False, True])
def test_compiles_for_a_gpu(prompt):
    """The interpreter lets through what the compiler refuses. Every kind of plane, in a step or a
    prompt: a pair takes seconds."""
    pairs = (
        ["mixed keys", "16 and 8 bits", "decode"]
        if prompt
        else ["2 bits", "ternary values", "8 and 6 bits, 80", "cap", "merge"]
    )
    code = "import compile_kernels, sys; compile_kernels.main(sys.argv[2:], bool(int(sys.argv[1])))"
    run = prepared.python("compiler", code, int(prompt), *pairs)
    assert run.returncode == 0, run.stderr[-2000:]
