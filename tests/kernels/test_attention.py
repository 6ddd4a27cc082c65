"""Reference attention against a plain float64 softmax that picks, for each query and position, the
raw or the packed token."""

import math

import pytest
import torch

from kvfold.kernels.attention import QUERY_BLOCK, Tile, attend, packed_tokens


def cut(keys, values, positions, packed: bool, sizes: list[int]) -> list[Tile]:
    """Tiles of the given sizes, again and again, over tokens in rising position."""
    tiles, start = [], 0
    while start < len(positions):
        part = slice(start, start + sizes[len(tiles) % len(sizes)])
        tiles.append(Tile(keys[:, part], values[:, part], positions[part], packed))
        start = part.stop
    return tiles


def naive(query, positions, raw, pages, sinks, window, page_tokens, scaling, mask):
    """The docstring's rule, one query at a time, in float64."""
    num_heads, num_kv_heads = query.shape[0], raw[0].shape[0]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for i, t in enumerate(positions.tolist()):
        packed = page_tokens * max(0, math.floor((t + 1 - sinks - window) / page_tokens))
        seen = torch.arange(t + 1)
        from_page = ((seen >= sinks) & (seen < sinks + packed))[:, None]
        keys, values = (
            torch.where(from_page, p[:, : t + 1], r[:, : t + 1]).double()
            for r, p in zip(raw, pages, strict=True)
        )
        allowed = torch.ones(t + 1, dtype=torch.bool) if mask is None else mask[i, : t + 1]
        if not bool(allowed.any()):
            continue
        for head in range(num_heads):
            group = head // (num_heads // num_kv_heads)
            logits = (keys[group] @ query[head, i].double() * scaling).masked_fill(
                ~allowed, -math.inf
            )
            out[head, i] = logits.softmax(0) @ values[group]
    return out


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize(
    ("num_kv_heads", "ratio", "head_dim", "sinks", "window", "page", "length", "chunk", "sizes"),
    [
        (2, 1, 8, 0, 5, 4, 37, 37, [7, 3]),
        (2, 3, 16, 3, 7, 4, 61, 61, [64]),
        (1, 4, 24, 3, 16, 8, 90, 33, [8, 5, 11]),
        (3, 1, 8, 0, 1, 1, 29, 29, [1, 2]),
        (1, 3, 8, 3, 9, 5, 47, 1, [13]),
        (2, 4, 8, 3, 40, 8, 23, 23, [9]),  # nothing packed yet
        (
            1,
            1,
            8,
            0,
            33,
            16,
            QUERY_BLOCK + 50,
            QUERY_BLOCK + 50,
            [100, 33],
        ),  # more than one block of queries
        (1, 3, 8, 3, 0, 4, 35, 20, [6]),
    ],
)
def test_attend_is_the_naive_softmax(
    num_kv_heads, ratio, head_dim, sinks, window, page, length, chunk, sizes, masked
):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    keys, values = normal(num_kv_heads, length, head_dim), normal(num_kv_heads, length, head_dim)
    # far from the raw tokens, so that one token read from the wrong side shows
    raw, pages = (keys, values), (keys + normal(*keys.shape), values + normal(*values.shape))
    query = normal(num_kv_heads * ratio, chunk, head_dim)
    positions = torch.arange(length - chunk, length)
    mask = None
    if masked:
        mask = torch.rand(chunk, length, generator=generator) < 0.6
        mask[0] = chunk == 1  # of several queries, the first may look at nothing
    limit = torch.tensor(
        [sinks + packed_tokens(t + 1, sinks, window, page) for t in positions.tolist()]
    )
    end = sinks + packed_tokens(length, sinks, window, page)
    first = sinks + packed_tokens(
        length - chunk + 1, sinks, window, page
    )  # raw tokens before it are gone
    held = torch.tensor([t for t in range(length) if t < sinks or t >= first])
    tiles = cut(keys[:, held], values[:, held], held, False, sizes)
    tiles += cut(
        pages[0][:, sinks:end], pages[1][:, sinks:end], torch.arange(sinks, end), True, sizes
    )
    tiles.insert(1, Tile(keys[:, :0], values[:, :0], held[:0], False))
    out = attend(query, positions, limit, tiles, sinks=sinks, scaling=0.7, mask=mask)
    expected = naive(query, positions, raw, pages, sinks, window, page, 0.7, mask)
    assert out.shape == query.shape and out.dtype == torch.float32
    assert float((out - expected).square().mean().sqrt() / expected.square().mean().sqrt()) <= 1e-5
    if masked and chunk > 1:
        assert bool((out[:, 0] == 0).all())
    # the order of tiles, and so which of them comes first in the online softmax, is of no
    # consequence
    again = attend(query, positions, limit, tiles[::-1], sinks=sinks, scaling=0.7, mask=mask)
    assert float((again - out).abs().max()) <= 1e-5


def test_logits_of_any_size_stay_finite():
    keys = torch.tensor([[[3e4], [-3e4], [2.9e4]]]).expand(1, 3, 8)
    values = torch.arange(24.0).view(1, 3, 8)
    tiles = cut(keys, values, torch.arange(3), False, [1])
    for sign, winner in ((1.0, 0), (-1.0, 1)):
        out = attend(
            torch.full((1, 1, 8), sign),
            torch.tensor([2]),
            torch.tensor([0]),
            tiles,
            sinks=0,
            scaling=1.0,
        )
        assert torch.equal(out[0, 0], values[0, winner])


def test_no_tile_gives_zeros():
    out = attend(
        torch.ones(2, 3, 8),
        torch.arange(3),
        torch.zeros(3, dtype=torch.int64),
        [],
        sinks=0,
        scaling=1.0,
    )
    assert torch.equal(out, torch.zeros(2, 3, 8))


@pytest.mark.parametrize(
    ("seq_len", "sinks", "window", "page", "packed"),
    [
        (0, 0, 0, 1, 0),
        (1, 0, 0, 1, 1),
        (1, 4, 16, 8, 0),
        (27, 4, 16, 8, 0),  # one token short of a page
        (28, 4, 16, 8, 8),
        (29, 4, 16, 8, 8),
        (35, 4, 16, 8, 8),
        (36, 4, 16, 8, 16),
        (10, 3, 0, 7, 7),
        (32768, 4, 128, 32, 32608),
    ],
)
def test_packed_tokens(seq_len, sinks, window, page, packed):
    assert packed_tokens(seq_len, sinks, window, page) == packed


def test_a_page_fills_only_once_a_whole_window_follows_it():
    sinks, window, page = 3, 10, 4
    for seq_len in range(200):
        packed = packed_tokens(seq_len, sinks, window, page)
        assert packed % page == 0
        raw_after = seq_len - sinks - packed
        assert packed == 0 or raw_after >= window
        assert raw_after < window + page
