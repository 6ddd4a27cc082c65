"""Products with packed codes against the same products with decoded tokens."""

import pytest
import torch

import kvfold.kernels.codes as codes_module
import kvfold.runtime.backends.reference as reference
from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.attention import Tile, attend
from kvfold.kernels.codes import Codes, field_order
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.kernels.quantizer import decode, encode, load_param
from kvfold.runtime.budget.ladder import Ladders
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.cache.sequence import PASSED
from kvfold.runtime.cache.store import Lowering

LIMITS = ("CODE_TOKENS", "CODE_NBYTES", "BLOCK_ELEMENTS")

FORMATS = [
    raw16(24),
    Format(((16, 3),)),
    Format(((48, 3),), "scale", "fp16"),
    *(Format(((24, levels),)) for levels in (2, 4, 8, 16, 32, 64, 256)),
    Format(((8, 64), (16, 16), (8, 8), (24, 4), (8, 2), (16, 0))),
    Format(((8, 0), (8, 2), (16, 32)), "scale", "fp16"),
    *(uniform(32, levels, "fp16", 16) for levels in (2, 4, 8, 16, 32, 64, 256)),
    uniform(48, 8, "e4m3", 8),
    uniform(48, 3, "e4m3", 24),
    uniform(40, 2),
]


def pages_of(fmt, pages, heads, page_tokens, seed=0):
    """Packed pages uint8 [pages, heads, nbytes], and what they decode to, float32 [heads,
    pages·page_tokens, head_dim]."""
    x = (
        torch.randn(
            pages, heads, page_tokens, fmt.head_dim, generator=torch.Generator().manual_seed(seed)
        )
        + 0.3
    )
    packed = encode(x, fmt)
    return packed, decode(packed, fmt, page_tokens).transpose(0, 1).flatten(1, 2)


def relative(found, expected):
    return float(
        (found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    )


@pytest.mark.parametrize("page_tokens", [8, 24, 32])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_products_are_those_of_the_decoded_tokens(fmt, page_tokens):
    pages, heads, rows = 3, 2, 5
    packed, decoded = pages_of(fmt, pages, heads, page_tokens)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(heads, rows, fmt.head_dim, generator=generator)
    weights = torch.rand(heads, rows, pages * page_tokens, generator=generator)
    codes = Codes(packed, fmt, page_tokens)
    kept = packed.clone(), query.clone(), weights.clone()
    want = field_order((query.double() @ decoded.double().mT), page_tokens)
    assert (
        codes.products(query).shape == want.shape and relative(codes.products(query), want) <= 5e-6
    )
    want = weights.double() @ decoded.double()
    found = codes.weighted(field_order(weights, page_tokens))
    assert found.shape == want.shape and relative(found, want) <= 5e-6
    assert all(torch.equal(a, b) for a, b in zip(kept, (packed, query, weights), strict=True))


def test_integers_are_exact():
    """With a scale of a power of two, no step and integer queries nothing rounds: products are
    equal to the last bit."""
    fmt = uniform(16, 16, "fp16", 8)
    codes = torch.randint(0, 16, (2, 2, 16, 16), generator=torch.Generator().manual_seed(2)).float()
    codes[..., ::8], codes[..., 1::8] = 0, 15  # both ends in every group: minimum -4, scale 1/2
    packed = encode(codes / 2 - 4, fmt)
    decoded = decode(packed, fmt, 16).transpose(0, 1).flatten(1, 2)
    assert torch.equal(decoded, (codes / 2 - 4).transpose(0, 1).flatten(1, 2))
    query = torch.arange(-16.0, 16.0).view(2, 1, 16)
    weights = torch.arange(64.0).view(2, 1, 32)
    found = Codes(packed, fmt, 16)
    assert torch.equal(found.products(query), field_order(query @ decoded.mT, 16))
    assert torch.equal(found.weighted(field_order(weights, 16)), weights @ decoded)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(
    "fmt", [Format(((16, 16), (8, 2), (8, 0))), uniform(32, 4, "e4m3", 16), raw16(32)], ids=str
)
def test_attention_over_codes_is_attention_over_decoded_tokens(fmt, masked):
    heads, page_tokens, sinks, pages, raw = 2, 16, 3, 5, 21
    packed, decoded = pages_of(fmt, pages, heads, page_tokens)
    end = sinks + pages * page_tokens
    rows = torch.randn(heads, sinks + raw, 32, generator=torch.Generator().manual_seed(3))
    where = torch.cat((torch.arange(sinks), torch.arange(end, end + raw)))
    dense = [Tile(rows, rows, where, False), Tile(decoded, decoded, torch.arange(sinks, end), True)]
    coded = dense[:1]
    for first, last in ((0, 2), (2, 5)):
        held = Codes(packed[first:last], fmt, page_tokens)
        at = torch.arange(sinks + first * page_tokens, sinks + last * page_tokens)
        coded.append(Tile(held, held, field_order(at, page_tokens), True))
    mask = None
    if masked:
        mask = torch.rand(1, end + raw, generator=torch.Generator().manual_seed(4)) < 0.5
    query = torch.randn(6, 1, 32, generator=torch.Generator().manual_seed(5))
    position, limit = torch.tensor([end + raw - 1]), torch.tensor([end])
    extras = {"softcap": 20.0, "sinks_logit": torch.ones(6), "shift": torch.ones(6, 1)}
    want = attend(query, position, limit, dense, sinks=sinks, scaling=0.3, mask=mask, **extras)
    assert (
        relative(
            attend(query, position, limit, coded, sinks=sinks, scaling=0.3, mask=mask, **extras),
            want.double(),
        )
        <= 2e-6
    )


@pytest.mark.parametrize(
    "sizes", [(2**14, 2**21, 2**18), (16, 2**21, 1), (2**14, 2000, 2**9)], ids=str
)
@pytest.mark.parametrize("sliding", [0, 100], ids=["full", "sliding"])
def test_a_step_of_a_layer_is_attention_over_its_decoded_pages(monkeypatch, sizes, sliding):
    """Pages on four rungs, cut into tiles and blocks of any size; the memory that is worked in
    outlives an inference mode."""
    for where, name, size in zip((reference, reference, codes_module), LIMITS, sizes, strict=True):
        monkeypatch.setattr(where, name, size)
    geometry = Geometry(2, 16, 3, 24, 8, sliding=(sliding,) if sliding else ())
    key = KeySpec(
        Format(((8, 16), (8, 4))),
        matrix=torch.eye(16).repeat(2, 1, 1) * 2,
        offset=torch.ones(2, 16),
    )
    spec = LayerSpec(key, ValueSpec(uniform(16, 4, "e4m3", 8)))
    ladders = Ladders([spec], [(1.0, 1.0)], geometry)
    cache = QuantizedKVCache([spec], geometry, 1 << 30, ladders=ladders)
    layer = cache.layers[0]
    generator = torch.Generator().manual_seed(7)

    def states(tokens):
        return torch.randn(2, 2, 2, tokens, 16, generator=generator)

    cache.update(*states(190), 0)
    for rung, count in ((3, 24), (2, 16), (1, 8)):
        with Lowering() as lowering:
            lowering.add(layer.held, layer.table.oldest(rung, count))
    layer.table.publish()
    assert [layer.table.pool.rung(i) for i in layer.table.pages()[0]] == 4 * [0] + 4 * [1] + 4 * [
        2
    ] + 8 * [3]
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            view, _ = cache.update(*states(1), 0)
            query = torch.randn(2, 6, 1, 16, generator=generator)
            mask = torch.arange(layer.columns)[None, None, None] >= (
                layer.columns - sliding if sliding else 0
            )
            want = []
            for b, row in enumerate(view.rows):
                gone = row.pages.count(PASSED)
                at = torch.arange(3 + 8 * gone, 3 + 8 * len(row.pages))
                tiles = [Tile(row.keys, row.values, row.raw_positions, False)]
                tiles.append(Tile(*layer.held.read_pages(row.pages[gone:]), at, True))
                q = key.apply_query(query[b])
                want.append(
                    attend(
                        q, row.positions, row.limit, tiles, sinks=3, scaling=0.25, mask=mask[0, 0]
                    )
                )
            found = view.attend(query, 0.25, mask if sliding else None)
            assert relative(found, torch.stack(want).double()) <= 2e-6


def test_looked_up_parameters_are_the_cast_ones():
    stored = torch.arange(256, dtype=torch.uint8).view(2, 8, 16)
    cast = stored.view(torch.float8_e4m3fn).float()
    found = load_param(stored, "e4m3")
    assert torch.equal(found.view(torch.int32), cast.view(torch.int32)) and bool(
        found.isnan().any()
    )  # NaNs' bits too
    assert torch.equal(
        load_param(stored[..., 1::2], "e4m3").view(torch.int32), cast[..., 1::2].view(torch.int32)
    )
