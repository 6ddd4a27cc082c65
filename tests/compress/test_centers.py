"""Which pairs of a head lose their rotating mean: statistics of any choice, and the choice
itself."""

import pytest
import torch

from kvfold.compress.calibrate import LayerStats, _Accumulator
from kvfold.compress.centers import SHARES, best_center, middle, options, with_center
from kvfold.compress.recipe import Recipe
from kvfold.compress.search.candidates import key_candidates
from kvfold.compress.transforms import Request
from kvfold.kernels.catalogue import key_formats
from kvfold.kernels.key_mean import turn_tables

DIM, HEADS, TOKENS = 128, 2, 1200
OMEGA = 1e4 ** (-torch.arange(DIM // 2) / (DIM / 2))


def turned(x, places):
    """Keys before RoPE [Hkv, T, D] at their positions."""
    angles = places[:, None].double() * OMEGA
    z = torch.complex(x[..., : DIM // 2].double(), x[..., DIM // 2 :].double()) * torch.complex(
        angles.cos(), angles.sin()
    )
    return torch.cat((z.real, z.imag), -1).float()


def stats_of(outliers=0.0, seed=0) -> LayerStats:
    """Keys with a mean before RoPE. outliers: part of the tokens that lack it in pair 0 of head
    1."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(HEADS, TOKENS, DIM, generator=g) * torch.logspace(0.3, -0.7, DIM)
    keys[:, :, [0, DIM // 2, 40, DIM // 2 + 40]] += 200.0
    lost = torch.rand(TOKENS, generator=g) < outliers
    for channel in (0, DIM // 2):
        keys[1, lost, channel] -= 200.0
    places = torch.arange(TOKENS)
    sums = _Accumulator(0, HEADS, 600, OMEGA)
    queries, values = torch.randn(2, HEADS, TOKENS, DIM, generator=g)
    sums.add(queries, turned(keys, places), keys, values, places, DIM**-0.5)
    return sums.finish(torch.eye(DIM, dtype=torch.float64).expand(HEADS, -1, -1))


@pytest.mark.parametrize("index", range(len(SHARES)))
def test_statistics_of_a_masked_mean_are_those_of_the_keys_without_it(index):
    stats = stats_of(0.1)
    taken = options(stats)[index].expand(HEADS, DIM)
    found = with_center(stats, taken)
    places = torch.arange(TOKENS)
    sums = _Accumulator(0, HEADS, 600, OMEGA)
    tables = turn_tables(tuple(stats.frequencies.tolist()), DIM, 0, torch.device("cpu"))
    mean = tables.mean_at(found.center.float(), places, places % 32)
    keys = stats_keys()
    rest = (keys - mean).double()
    torch.testing.assert_close(found.rest_moment, rest.mT @ rest / TOKENS, rtol=1e-4, atol=1e-3)
    drawn = torch.linspace(0, TOKENS - 1, 600).round().long()
    torch.testing.assert_close(found.rest_sample, rest[:, drawn].float(), rtol=1e-4, atol=1e-3)
    assert bool(((found.center == 0) | (found.center == stats.center)).all()) and sums.count == 0


def stats_keys():
    """The keys after RoPE that `stats_of(0.1)` drew."""
    kept = []
    real = _Accumulator.finish

    def finish(self, metric):
        kept.extend(key for key, *_ in self.keys)
        return real(self, metric)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Accumulator, "finish", finish)
        stats_of(0.1)
    return kept[0]


def test_a_mean_that_few_tokens_lack_is_left_in_where_they_are():
    """Head 0 has none of these tokens and loses its whole mean; head 1 keeps that of its fastest
    pairs, and loses that of pair 40."""
    formats = key_formats(DIM)
    plain, mixed = (best_center(stats_of(x), formats, Request(None, 0, 1)) for x in (0.0, 0.04))
    assert bool((plain.center != 0).all())
    fast, slow = [0, DIM // 2], [40, DIM // 2 + 40]
    assert bool((mixed.center[0] != 0).all())
    assert bool((mixed.center[1, fast] == 0).all()) and bool((mixed.center[1, slow] != 0).all())


def test_candidates_have_the_better_mean():
    stats = stats_of(0.04)
    with_choice = {c.spec.format: c.distortion for c in key_candidates(stats, Recipe(), 0, False)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvfold.compress.search.candidates.best_center", lambda stats, *_: stats)
        without = {c.spec.format: c.distortion for c in key_candidates(stats, Recipe(), 0, False)}
    tried = middle(key_formats(DIM))
    assert len(tried) >= 3
    ratios = torch.tensor([with_choice[f] / without[f] for f in tried])
    assert float(ratios.log().mean().exp()) < 0.8


def test_no_mixed_format_is_no_reason_to_choose():
    stats = stats_of()
    assert best_center(stats, (), Request(None, 0, 1)) is stats
