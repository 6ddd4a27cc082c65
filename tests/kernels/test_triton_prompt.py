"""Pages that all queries of a prompt read together: decoding by kernel, and the same attention as
token by token."""

from dataclasses import replace

import pytest
import torch
from test_triton_attention import DEVICE, PAIRS, error, prompt_case

from kvfold.kernels.attention import attend
from kvfold.kernels.formats import raw16, uniform
from kvfold.kernels.pages import page_address
from kvfold.kernels.quantizer import decode, encode

pytest.importorskip("triton")
from kvfold.kernels.gpu import attention as kernels
from kvfold.kernels.gpu import prompt as triton_prompt
from kvfold.kernels.gpu.prompt import PageRun, decode_pages, plain_attention
from kvfold.kernels.gpu.queries import prepare_queries
from kvfold.kernels.gpu.records import LogitOptions


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


@pytest.mark.parametrize(
    ("name", "page"), [*((name, 32) for name in PAIRS), ("mixed both", 8), ("ternary 96", 128)]
)
def test_pages_decode_to_what_the_reference_reads(name, page):
    heads, dim = 2, PAIRS[name][0].head_dim
    data, (keys, values) = pages_of(PAIRS[name], 2, heads, page)
    pages = torch.tensor([page_address(x) for x in reversed(data)], device=DEVICE)
    order = torch.arange(2 * page, device=DEVICE).view(2, page).flip(0).flatten()
    factors = torch.tensor([0.25, 64.0], device=DEVICE)
    got = [
        torch.full((heads, 2 * page, dim), torch.nan, dtype=torch.float16, device=DEVICE)
        for _ in range(2)
    ]
    decode_pages(pages, *PAIRS[name], factors, *got, page)
    wanted = ((keys * factors[:, None, None])[:, order], values[:, order])
    for found, want in zip(got, wanted, strict=True):
        # a last bit of float32 may round to the other float16
        torch.testing.assert_close(found.float(), want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "before", "chunk", "group", "sink_logits"),
    [
        ("2 bits", 131, 19, 1, True),
        ("mixed keys", 60, 37, 4, False),
        ("ternary values", 101, 5, 7, True),
        ("4 and 5 bits, 96", 80, 20, 3, False),
    ],
)
def test_reading_pages_together_changes_nothing(
    name, before, chunk, group, sink_logits, monkeypatch
):
    pair = PAIRS[name]
    dim = pair[0].head_dim
    case, query, (positions, limit, tiles), cache, prompt, together = prompt_case(
        pair, before, chunk, group
    )
    assert together > 1
    monkeypatch.setattr(triton_prompt, "SCRATCH_NBYTES", 4 * 2 * dim * 32)  # two pages at a time
    aux = torch.linspace(-3, 3, group * 2, device=DEVICE) if sink_logits else None
    want = attend(query[0], positions, limit, tiles, sinks=5, scaling=dim**-0.5, sinks_logit=aux)
    for count in (1, together):
        out = torch.full((1, chunk, group * 2, dim), float("nan"), device=DEVICE)
        kernels.attention(
            prepare_queries(query, 2, dim**-0.5), cache, [pair], out, case.regions(), LogitOptions(sink_logits=aux),
            prompt=replace(prompt, together=[PageRun(*pair, 0, count)]),
        )  # fmt: skip
        assert error(out[0].transpose(0, 1), want) < 1e-3


def test_runs_of_several_formats_are_read_together():
    """Two rungs, the second in 16 bits; all of the first and part of the second are read
    together."""
    dim, page, sinks = 64, 16, 5
    pairs = [PAIRS["mixed keys"], (raw16(dim), uniform(dim, 256, "fp16"))]
    case, query, (positions, limit, tiles), cache, prompt, together = prompt_case(
        pairs[0], 150, 18, 2
    )
    count = case.rows[0][2]
    data, read = pages_of(pairs[1], count - 4, 2, page, seed=9)
    for i, block in enumerate(data):
        case.table[0, 4 + i] = page_address(block)
    at = slice(4 * page, None)
    for tensor, new in zip(tiles[1][:2], read, strict=True):
        tensor[:, at] = new
    want = attend(query[0], positions, limit, tiles, sinks=sinks, scaling=dim**-0.5)
    segments = torch.tensor([[0, 4, count]], dtype=torch.int32, device=DEVICE)
    assert together > 6
    for end in (2, 6):
        runs = [
            PageRun(*pairs[0], 0, min(end, 4)),
            *([PageRun(*pairs[1], 4, end)] if end > 4 else []),
        ]
        out = torch.full((1, 18, 4, dim), float("nan"), device=DEVICE)
        kernels.attention(
            prepare_queries(query, 2, dim**-0.5), cache._replace(segments=segments), pairs, out, case.regions(),
            prompt=replace(prompt, together=runs),
        )  # fmt: skip
        assert error(out[0].transpose(0, 1), want) < 1e-3


def test_the_librarys_sums_are_natural_logarithms():
    """What `read_together` counts on, of whichever attention this machine has."""
    query, keys, values = (torch.randn(1, 2, n, 64, device=DEVICE).half() for n in (33, 70, 70))
    out, sums = plain_attention(query, keys, values, 0.3)
    scores = query.float() @ keys.float().mT * 0.3
    assert out.shape == query.shape and out.dtype == torch.float16
    assert error(out, scores.softmax(-1) @ values.float()) < 2e-3
    torch.testing.assert_close(sums, scores.logsumexp(-1), rtol=1e-4, atol=1e-3)
