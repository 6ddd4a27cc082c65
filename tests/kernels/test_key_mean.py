"""The rotating mean of keys: its definition spelled out token by token, its logits, and what an
artifact says of it."""

import cmath
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schema import FIELDS, dump_fields

from kvfold.errors import KvfoldError
from kvfold.exports.schema import MEAN_VERSION, parse_metadata
from kvfold.exports.spec import KeySpec
from kvfold.kernels.formats import raw16
from kvfold.kernels.key_mean import (
    FIRST_TOKENS,
    SPAN,
    STEP,
    TurnTables,
    join_pairs,
    num_fast,
    pair_channels,
    split_pairs,
    turn_tables,
)

CPU = torch.device("cpu")


def slow_mean(offset: list[float], omega: list[float], position: int, sinks: int) -> list[float]:
    """m_t of one head as kernels/key_mean.py defines it, pair by pair, in Python's own numbers."""
    dim, rotated = len(offset), len(omega)
    rest = dim // 2 - rotated
    pairs = [(i, i + rotated, omega[i]) for i in range(rotated)]
    pairs += [(2 * rotated + i, 2 * rotated + rest + i, 0.0) for i in range(rest)]
    pairs.sort(key=lambda pair: -pair[2])
    mean = [0.0] * dim
    u = position - sinks
    if u < 0:
        return mean
    for place, (first, second, w) in enumerate(pairs):
        b = complex(offset[first], offset[second])
        if place < num_fast(dim):
            near = cmath.exp(1j * w * (u % SPAN))
            near = complex(*(float(torch.tensor(x).half()) for x in (near.real, near.imag)))
            m = b * cmath.exp(1j * w * (sinks + u // SPAN * SPAN)) * near
        else:
            m = b * cmath.exp(1j * w * (sinks + u // STEP * STEP + STEP // 2))
        mean[first], mean[second] = m.real, m.imag
    return mean


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_mean_and_its_logits_are_what_the_definition_says(data):
    dim = data.draw(st.sampled_from([8, 16, 24, 64, 80]))
    rotated = data.draw(st.integers(1, dim // 2))
    sinks = data.draw(st.sampled_from([0, 1, 5, 64]))
    seed = data.draw(st.integers(0, 99))
    g = torch.Generator().manual_seed(seed)
    omega = [x for x in torch.rand(rotated, generator=g).pow(3).mul(math.pi).tolist()]
    offset = torch.randn(2, dim, generator=g) * 20
    positions = torch.randint(0, data.draw(st.sampled_from([3, 130, 5000])), (7,), generator=g)
    tables = turn_tables(tuple(omega), dim, sinks, CPU)
    got = tables.mean(offset, positions)
    omega32 = [float(torch.tensor(x, dtype=torch.float64)) for x in omega]
    expected = torch.tensor(
        [[slow_mean(row, omega32, t, sinks) for t in positions.tolist()] for row in offset.tolist()]
    )
    torch.testing.assert_close(
        got, expected, rtol=0, atol=3e-4
    )  # angles of 5000 radians, in float32
    query = torch.randn(6, 3, dim, generator=g)
    logits = tables.logits(tables.coefficients(offset, query), positions)
    torch.testing.assert_close(
        logits,
        torch.einsum("htd,hnd->htn", query, got.repeat_interleave(3, 0)),
        rtol=1e-4,
        atol=1e-2,
    )


def test_the_mean_follows_rope_and_is_zero_for_sinks():
    omega = tuple((10000.0 ** (-torch.arange(32) / 32)).tolist())
    offset = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(3000)
    mean = turn_tables(omega, 64, 64, CPU).mean(offset, positions)[0]
    assert not mean[:64].any()
    angles = positions[:, None].double() * torch.tensor(omega).double()
    b = torch.complex(offset[0, :32], offset[0, 32:]) * torch.polar(torch.ones_like(angles), angles)
    exact = torch.cat((b.real, b.imag), -1).float()
    left = (mean - exact)[64:].square().sum() / exact[64:].square().sum()
    assert left < 0.03  # only slow pairs within their steps are off


@pytest.mark.parametrize("pairs", ["adjacent", "swapped"])
def test_other_pairs_are_halves_in_another_order(pairs):
    """Of channels that turn; those that don't stand behind them."""
    omega, rotated, dim = (0.9, 0.3, 0.05), 3, 16
    first, second = pair_channels(rotated, pairs)
    order = torch.cat((first, second, torch.arange(2 * rotated, dim)))  # halves are x[order]
    halves, others = turn_tables(omega, dim, 5, CPU), turn_tables(omega, dim, 5, CPU, pairs)
    offset = torch.randn(2, dim, generator=torch.Generator().manual_seed(0))
    query = torch.randn(4, 3, dim, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(300)
    assert torch.equal(
        others.mean(offset, positions)[..., order], halves.mean(offset[:, order], positions)
    )
    logits = [
        t.logits(t.coefficients(b, q), positions)
        for t, b, q in ((others, offset, query), (halves, offset[:, order], query[..., order]))
    ]
    assert torch.equal(*logits)
    x = torch.randn(2, 5, 6)
    assert torch.equal(torch.cat(split_pairs(x, pairs), -1), x[..., order[:6]])
    assert torch.equal(join_pairs(*split_pairs(x, pairs), pairs), x)


def test_tables_grow_and_old_ones_stay():
    tables = TurnTables((0.7, 0.01), 8, 3, CPU)
    spans, steps = tables.spans, tables.steps
    tables.reach(FIRST_TOKENS)
    assert tables.spans is spans
    tables.reach(3 * FIRST_TOKENS)
    assert tables.tokens == 4 * FIRST_TOKENS and tables.spans is not spans
    assert torch.equal(tables.spans[: len(spans)], spans) and torch.equal(
        tables.steps[: len(steps)], steps
    )
    assert any(kept is spans for pair in tables._old for kept in pair)


def test_frequencies_go_with_a_version_and_an_offset():
    fields = json.loads(json.dumps(FIELDS))
    fields["layers"][0]["key"]["tensors"] = ["matrix", "offset", "frequencies"]
    with pytest.raises(KvfoldError, match="format_version 3"):
        parse_metadata(dump_fields(fields))
    fields["format_version"] = MEAN_VERSION
    fields["cache"].pop("sliding", None)
    assert "frequencies" in parse_metadata(dump_fields(fields)).layers[0].key.tensors
    fields["layers"][0]["key"]["tensors"] = ["matrix", "frequencies"]
    with pytest.raises(KvfoldError, match="there is none"):
        parse_metadata(dump_fields(fields))


def test_a_constant_mean_does_not_turn():
    offset = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    still, turning = (
        KeySpec(raw16(8), offset=offset),
        KeySpec(raw16(8), offset=offset, frequencies=(1.0, 0.1)),
    )
    assert not still.turns and turning.turns
    assert torch.equal(still.mean(torch.arange(5), 3), offset[:, None])
    query = torch.randn(4, 3, 8)
    assert turning.shift(query) is None and still.shift(query).shape == (4, 3)
    keys = torch.randn(2, 5, 8)
    assert torch.equal(turning.apply(keys, torch.arange(5), 8), keys)  # sinks only
