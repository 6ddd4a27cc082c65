"""The byte account: literals worked out by hand, and equality with caches that are really
filled."""

import pytest
import torch

from kvfold.exports.account import (
    LEAST_ENTRIES,
    Geometry,
    batch_nbytes,
    cache_nbytes,
    payload_bits,
    stepped_nbytes,
)
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.runtime.cache.cache import QuantizedKVCache

GEOMETRY = Geometry(num_kv_heads=2, head_dim=16, sinks=3, window=10, page_tokens=16)
# bytes of a token and head: keys 4 + 2 + 1 scale = 7 and 32, values 4 of ternary codes (a byte of
# five and one of three for eight codes) + 2, and 16 + 8 (two fp16 pairs)
FORMATS = [
    (Format(((8, 16), (8, 4))), uniform(16, 3)),
    (raw16(16), uniform(16, 256, "fp16", 8)),
]
RAW_BUFFER = 35 * 2 * 16 * 2 * 2  # rows · heads · channels · (K, V) · float16


def test_one_sequence_by_hand():
    assert RAW_BUFFER == 4480
    page = 2 * 16 * (7 + 6) + 2 * 16 * (32 + 24)  # heads · tokens · (K + V) of both layers
    assert page == 2208
    for tokens, pages, entries in (
        (1, 0, 0),
        (28, 0, 0),
        (29, 1, 16),
        (44, 1, 16),
        (45, 2, 16),
        (269, 16, 16),
        (285, 17, 32),
        (525, 32, 32),
        (541, 33, 64),
        (797, 49, 64),
    ):
        assert GEOMETRY.num_pages(tokens) == pages
        assert (
            cache_nbytes(GEOMETRY, FORMATS, tokens) == 2 * (4480 + 8 + 8 * entries) + 2208 * pages
        )
    assert cache_nbytes(GEOMETRY, FORMATS, 0) == 0
    assert cache_nbytes(GEOMETRY, FORMATS, 285) == 2 * (4480 + 8 + 256) + 2208 * 17 == 47024


def test_tables_of_before_grew_sixteen_entries_at_a_time():
    for tokens, pages, entries in (
        (0, 0, 0),
        (28, 0, 0),
        (29, 1, 16),
        (541, 33, 48),
        (797, 49, 64),
        (1053, 65, 80),
    ):
        fixed = 2 * (4480 + 8 + 8 * entries) if tokens else 0
        assert stepped_nbytes(GEOMETRY, FORMATS, tokens) == fixed + 2208 * pages


def test_a_batch_by_hand():
    # tables are as long as the longest sequence's: 17 pages, 32 entries, in all three sequences
    assert batch_nbytes(GEOMETRY, FORMATS, [285, 29, 5]) == 3 * 2 * (4480 + 8 + 256) + 2208 * (
        17 + 1 + 0
    )
    assert batch_nbytes(GEOMETRY, FORMATS, [285, 0]) == 2 * 2 * (4480 + 8 + 256) + 2208 * 17
    assert batch_nbytes(GEOMETRY, FORMATS, [0, 0]) == 0
    assert batch_nbytes(GEOMETRY, FORMATS, [100, 100]) == 2 * cache_nbytes(GEOMETRY, FORMATS, 100)


def test_parts_of_the_account():
    assert LEAST_ENTRIES == 16
    assert GEOMETRY.raw_rows == 35 == 3 + 2 * 16
    assert GEOMETRY.fixed_nbytes(0) == 0
    assert GEOMETRY.fixed_nbytes(285) == 4480 + 8 + 256
    assert [GEOMETRY.page_nbytes(fmt) for pair in FORMATS for fmt in pair] == [224, 192, 1024, 768]
    assert GEOMETRY.side_nbytes(FORMATS[0][0], 285) == 17 * 224
    assert GEOMETRY.elements(100, 2) == 2 * 2 * 2 * 16 * 100
    assert payload_bits(FORMATS) == (7 / 2 + 6 / 2 + 16 + 24 / 2) / 4


def specs(formats: list[tuple[Format, Format]]) -> list[LayerSpec]:
    heads, dim = GEOMETRY.num_kv_heads, GEOMETRY.head_dim
    matrix = torch.randn(heads, dim, dim, generator=torch.Generator().manual_seed(0))
    key = {"matrix": matrix, "offset": torch.ones(heads, dim)}
    clip = torch.full((heads,), 0.9)
    return [LayerSpec(KeySpec(k, **key), ValueSpec(v, clip=clip)) for k, v in formats]


def fill(
    cache: QuantizedKVCache, chunks: list[int], batch: int, mask: torch.Tensor | None = None
) -> None:
    """Appends chunks of random keys and values to all layers; `mask` [batch, all columns] marks
    padding with 0."""
    generator, done = torch.Generator().manual_seed(1), 0
    for tokens in chunks:
        done += tokens
        cache.note_padding(None if mask is None else mask[:, :done], batch)
        for i in range(len(cache.layers)):
            k, v = torch.randn(
                2, batch, GEOMETRY.num_kv_heads, tokens, GEOMETRY.head_dim, generator=generator
            )
            cache.update(k, v, i)


def resident(cache: QuantizedKVCache) -> int:
    """What the cache's tensors hold, storage by storage: a view that keeps a larger buffer alive
    counts in full."""
    storages = {
        t.untyped_storage().data_ptr(): t
        for layer in cache.layers
        for t in layer.tensors()
        if t.numel()
    }
    return sum(t.untyped_storage().nbytes() for t in storages.values())


@pytest.mark.parametrize(
    "tokens", [1, 2, 3, 12, 13, 14, 28, 29, 30, 44, 45, 46, 61, 100, 268, 269, 284, 285, 286]
)
@pytest.mark.parametrize("chunk", ["whole", "single", "mixed"])
def test_a_filled_cache_holds_what_the_account_says(tokens, chunk):
    cache = QuantizedKVCache(specs(FORMATS), GEOMETRY)
    assert cache.nbytes == 0
    chunks = {
        "whole": [tokens],
        "single": [1] * tokens,
        "mixed": [-(-tokens // 2), tokens // 2] if tokens > 1 else [1],
    }
    fill(cache, chunks[chunk], 1)
    expected = cache_nbytes(GEOMETRY, FORMATS, tokens)
    assert cache.nbytes == expected
    assert resident(cache) == expected
    assert sum(row["bytes"] for row in cache.report()) == expected
    assert [row["pages"] for row in cache.report()] == [
        {f"K {k} | V {v}": GEOMETRY.num_pages(tokens)} for k, v in FORMATS
    ]


@pytest.mark.parametrize("lengths", [[285, 29, 5], [100, 100], [1, 30], [294, 1, 293, 28]])
@pytest.mark.parametrize("decode", [0, 9])
def test_a_ragged_batch_holds_what_the_account_says(lengths, decode):
    prompt = max(lengths)
    mask = torch.tensor([[0] * (prompt - n) + [1] * (n + decode) for n in lengths])
    cache = QuantizedKVCache(specs(FORMATS), GEOMETRY)
    fill(cache, [prompt] + [1] * decode, len(lengths), mask)
    total = [n + decode for n in lengths]
    assert [layer.lengths() for layer in cache.layers] == [total] * 2
    assert cache.nbytes == resident(cache) == batch_nbytes(GEOMETRY, FORMATS, total)


def test_effective_bits_of_the_report():
    fmt = Format(((8, 0), (8, 256)))
    cache = QuantizedKVCache(specs([(fmt, fmt)]), GEOMETRY)
    fill(cache, [285], 1)
    # 9 bytes per token and head: eight codes and a scale
    nbytes = 4480 + 8 + 256 + 17 * 16 * 2 * 2 * 9
    assert cache.report()[0]["bytes"] == nbytes
    assert cache.report()[0]["effective_bits"] == 8 * nbytes / (2 * 2 * 16 * 285)
