"""Transforms against their formulas, and on heads that real models have too: dead, rank-deficient,
huge biases."""

import itertools
from dataclasses import replace

import pytest
import torch

from kvfold.compress.calibrate import LayerStats
from kvfold.compress.recipe import Recipe
from kvfold.compress.search.candidates import key_candidates, value_candidates
from kvfold.compress.transforms import KEY_TRANSFORMS, VALUE_TRANSFORMS, Request
from kvfold.compress.transforms.basis import EPS, mixing_matrix, regularised
from kvfold.compress.transforms.reorder import reorder
from kvfold.compress.transforms.rotate import balance, rotate, unit_scale
from kvfold.compress.transforms.whiten import (
    CLASS_LEVELS,
    compositions,
    water_fill,
    whiten,
    whitened,
)
from kvfold.kernels.formats import Format, uniform
from kvfold.kernels.kinds.levels import GAUSSIAN_MSE, PLANE_WIDTHS


def make_stats(head_dim=16, heads=2, seed=0, tokens=600, kind="plain"):
    g = torch.Generator().manual_seed(seed)

    def draw(n):
        mix = (
            torch.randn(heads, head_dim, head_dim, generator=g)
            * torch.logspace(0.5, -1.5, head_dim)[:, None]
        )
        return torch.randn(heads, n, head_dim, generator=g) @ mix

    keys, values, queries = draw(tokens) + 2, draw(tokens), draw(tokens)
    if kind == "bias":
        keys[..., 1] += 150
    if kind == "channel":
        keys[..., 3], values[..., 5], queries[..., 3] = 0, 0, 0
    if kind == "steep":  # 14 orders of magnitude between the largest and the smallest variance
        keys, queries = (
            keys * torch.logspace(2, -5, head_dim),
            queries * torch.logspace(-4, 3, head_dim),
        )
    if kind == "dead":
        keys[0], values[0], queries[0] = 0, 0, 0
    if kind == "rank":
        keys, values = keys[..., :1] * torch.ones(head_dim), values[..., :1] * torch.ones(head_dim)
    wo = torch.randn(heads, 40, head_dim, generator=g).double()

    def cov(x):
        centred = x.double() - x.double().mean(1, keepdim=True)
        return centred.mT @ centred / x.shape[1]

    def moment(x):
        return x.double().mT @ x.double() / x.shape[1]

    def span(x):
        return torch.stack((x.amin(1), x.amax(1)), 1).double()

    return LayerStats(
        keys.double().mean(1), cov(keys), queries.double().mT @ queries.double() / tokens, values.double().mean(1),
        cov(values),
        wo.mT @ wo, span(keys), span(values), keys, values, queries, torch.tensor([tokens // 2, tokens - tokens // 2]),
        torch.tensor(head_dim**-0.5),
        torch.empty(0), keys.double().mean(1), cov(keys), keys - keys.mean(1, keepdim=True),
        moment(keys), keys.double().mean(1), cov(keys), 0 * cov(keys), moment(values),
    )  # fmt: skip


def output_weight(head_dim=16, heads=2):
    return torch.randn(40, heads * head_dim, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("n", [8, 16, 24, 40, 80])
def test_mixing_matrices_are_orthogonal_and_spread(n):
    h = mixing_matrix(n, torch.Generator().manual_seed(1))
    torch.testing.assert_close(h @ h.mT, torch.eye(n, dtype=torch.float64))
    assert float(h.abs().max()) < 0.9
    assert torch.equal(h, mixing_matrix(n, torch.Generator().manual_seed(1)))
    assert not torch.equal(h, mixing_matrix(n, torch.Generator().manual_seed(2)))


def test_whitened_coordinates_are_uncorrelated_and_measure_logit_error():
    stats = make_stats()
    basis, variances = whitened(stats)
    torch.testing.assert_close(
        basis @ stats.key_cov @ basis.mT, torch.diag_embed(variances), rtol=1e-9, atol=1e-9
    )
    assert bool((variances.diff(dim=-1) <= 1e-9).all())
    delta = torch.randn(16, dtype=torch.float64)
    logit_error = delta @ stats.query_moment[0] @ delta
    assert (
        abs(float((basis[0] @ delta).square().sum() / logit_error) - 1) < 0.05
    )  # up to the regularisation


def test_whiten_brings_every_channel_to_unit_variance_and_half_whitens_classes():
    stats = make_stats()
    fmt = Format(((8, 16), (8, 2)))
    found = whiten(stats, Request(fmt))
    variance = (found.online @ stats.key_cov @ found.online.mT).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(variance, torch.ones_like(variance))
    assert torch.equal(found.offset, stats.key_mean)
    # the error of one shared step in class c is n·Σ_i [(M⁻¹ᵀ Σ_q M⁻¹)_ii] with unit variances: (Σ
    # √λ)² at its best
    inverse = torch.linalg.inv(found.online[0])
    weight = (inverse.mT @ stats.query_moment[0] @ inverse).diagonal()[:8].sum() * 8
    _, variances = whitened(stats)
    assert float(weight / variances[0, :8].sqrt().sum() ** 2) == pytest.approx(1, abs=0.05)


def test_what_formats_share_changes_no_basis():
    stats = make_stats()
    for row, part in ((KEY_TRANSFORMS["whiten"], "online"), (VALUE_TRANSFORMS["whiten"], "fused")):
        assert row.shared is not None
        shared = row.shared(stats, Request())
        assert shared.eigen is not None
        for fmt in (Format(((8, 16), (8, 2))), Format(((16, 4),))):
            alone, found = row.fit(stats, Request(fmt)), row.fit(stats, replace(shared, fmt=fmt))
            assert torch.equal(getattr(found, part), getattr(alone, part))


@pytest.mark.parametrize("head_dim", [16, 24, 64])
def test_compositions_are_all_ways_to_cut(head_dim):
    sizes = compositions(head_dim)
    assert (sizes.sum(1) == head_dim).all() and (sizes % 8 == 0).all() and (sizes >= 0).all()
    n, k = head_dim // 8, len(CLASS_LEVELS)
    expected = (
        sum(1 for c in itertools.product(range(n + 1), repeat=k) if sum(c) == n)
        if n <= 3
        else len(sizes)
    )
    assert len(sizes) == expected == len({tuple(row) for row in sizes.tolist()})


@pytest.mark.parametrize("head_dim", [80, 96, 128, 256])
def test_compositions_stay_bounded_for_wide_heads(head_dim):
    sizes = compositions(head_dim)
    assert (
        100 < len(sizes) <= 120_000 and (sizes.sum(1) == head_dim).all() and (sizes % 8 == 0).all()
    )


def test_water_filling_is_the_cheapest_cut():
    _, variances = whitened(make_stats(head_dim=16))

    def cost(classes):
        total, start = 0.0, 0
        for channels, levels in classes:
            part = variances[:, start : start + channels].sqrt().sum(-1) ** 2 / channels
            total += float((GAUSSIAN_MSE[levels] * part / variances.sum(-1)).sum())
            start += channels
        return total

    for limit in (1.0, 1.5, 2.0, 3.0):
        [found] = water_fill(variances, (limit,))
        cuts = [((8, a), (8, b)) for a in CLASS_LEVELS for b in CLASS_LEVELS if a > b] + [
            ((16, a),) for a in CLASS_LEVELS if a
        ]
        allowed = [
            c for c in cuts if sum(n * sum(PLANE_WIDTHS[levels]) for n, levels in c) / 16 <= limit
        ]
        assert cost(found.classes) == pytest.approx(min(map(cost, allowed)))


def test_values_get_equal_variance_from_a_rotation_and_keep_their_norm():
    stats = make_stats()
    matrix = rotate(stats, torch.Generator().manual_seed(0))
    gram = matrix @ matrix.mT
    scale = gram[:, 0, 0]
    torch.testing.assert_close(
        gram, scale[:, None, None] * torch.eye(16, dtype=torch.float64).expand(2, -1, -1)
    )
    # a power of two, exact in any float type; the sum of squares that it is read from may round
    torch.testing.assert_close(scale.log2() / 2, (scale.log2() / 2).round(), rtol=0, atol=1e-12)
    variance = (matrix @ stats.value_cov @ matrix.mT).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(variance, variance.mean(-1, keepdim=True).expand_as(variance))
    rms = (stats.value_sample @ matrix.float().mT).square().mean((1, 2)).sqrt()
    assert bool(((rms > 0.5) & (rms < 2)).all())


KINDS = ["dead", "rank", "bias", "channel", "steep"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", sorted(KEY_TRANSFORMS))
def test_keys_of_difficult_heads_stay_finite_and_keep_their_logits(kind, key):
    stats = make_stats(kind=kind)
    levels = (
        {}
        if key == "whiten"
        else {"levels": [3, 16, 256, 65536], "group_size": 0 if key == "smooth" else 8}
    )
    recipe = Recipe.model_validate({"key": {"transform": key, **levels}})
    for candidate in key_candidates(stats, recipe, 0, False, output_weight()):
        assert 0 <= candidate.distortion < float("inf")
        spec = candidate.spec
        if spec.matrix is None:
            continue
        assert bool(torch.isfinite(spec.matrix).all()) and bool(
            torch.isfinite(spec.query_matrix).all()
        )
        query = torch.randn(2, 5, 16)
        exact = query @ (stats.key_sample - (0 if spec.offset is None else spec.offset[:, None])).mT
        got = (
            spec.apply_query(query)
            @ spec.apply(stats.key_sample, torch.arange(stats.key_sample.shape[1]), 0).mT
        )
        assert float((got - exact).abs().max()) <= 2e-3 * (1 + float(exact.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", sorted(VALUE_TRANSFORMS))
def test_values_of_difficult_heads_stay_finite(kind, value):
    recipe = Recipe.model_validate(
        {"value": {"transform": value, "group_size": 8, "params": ["scale", "scale_min"]}}
    )
    for candidate in value_candidates(make_stats(kind=kind), recipe, 0):
        assert 0 <= candidate.distortion < float("inf")
        assert bool(torch.isfinite(torch.linalg.inv(candidate.matrix)).all())


@pytest.mark.parametrize(
    "side, name", [("key", n) for n in KEY_TRANSFORMS] + [("value", n) for n in VALUE_TRANSFORMS]
)
def test_every_basis_is_undone_by_its_inverse_and_leaves_the_model_alone(side, name):
    """Any row of the tables: what is fused commutes with RoPE, and values get nothing at run
    time."""
    row = (KEY_TRANSFORMS if side == "key" else VALUE_TRANSFORMS)[name]
    basis = row.fit(
        make_stats(), Request(uniform(16, 4, group_size=8), 8, 3, output_weight=output_weight())
    )
    if basis.matrix is not None:
        eye = torch.eye(16, dtype=torch.float64).expand(2, -1, -1)
        torch.testing.assert_close(basis.inverse @ basis.matrix, eye, rtol=1e-7, atol=1e-7)
    if side == "value":
        assert basis.online is None and basis.offset is None and basis.fused is not None
    elif basis.fused is not None:
        diagonal = basis.fused.diagonal(dim1=-2, dim2=-1)
        assert torch.equal(basis.fused, torch.diag_embed(diagonal)) and torch.equal(
            diagonal[:, :8], diagonal[:, 8:]
        )
    assert row.name == name and (
        row.mixed is None or row.mixed(make_stats(), (1.0, 2.0), Request())
    )


def test_parts_of_the_whitening_can_be_left_out():
    stats, fmt = make_stats(kind="bias"), Format(((8, 16), (8, 2)))
    plain = whiten(stats, Request(fmt, without=("offset",)))
    moment = stats.key_cov + stats.key_mean[:, :, None] * stats.key_mean[:, None, :]
    assert plain.offset is None
    unit = (plain.online @ moment @ plain.online.mT).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(unit, torch.ones_like(unit))
    unmixed = whiten(stats, Request(fmt, without=("mixing",))).online
    covariance = (
        unmixed @ stats.key_cov @ unmixed.mT
    )  # eigen-channels stay uncorrelated where nothing mixes them
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(covariance, torch.diag_embed(diagonal), atol=1e-8, rtol=1e-8)
    assert (
        bool((diagonal <= 1 + 1e-6).all()) and float(diagonal[:, :14].min()) > 0.999
    )  # the last may be floored
    basis, variances = whitened(stats, ("metric",))
    torch.testing.assert_close(
        variances, torch.linalg.eigvalsh(stats.key_cov).flip(-1), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        basis @ basis.mT, torch.eye(16, dtype=torch.float64).expand(2, -1, -1)
    )


def test_regularised_matrices_have_a_bounded_condition():
    """EPS of the mean eigenvalue bounds cond(W) by √(D/EPS), and half-whitening by the fourth root
    of the same."""
    stats = make_stats(kind="steep")
    bound = (16 / EPS + 1) ** 0.75
    basis, variances = whitened(stats)
    half = regularised(variances)[..., None] ** -0.25 * basis
    assert bool((torch.linalg.cond(half) <= bound).all())


@pytest.mark.parametrize("dtype, limit", [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", ["plain", "dead", "rank", "channel"])
def test_online_matrices_survive_sixteen_bits(dtype, limit, kind):
    """M and M⁻¹ rounded to 16 bits: the logits move by a part of their own spread, far less than
    two bits a key move them."""
    stats = make_stats(kind=kind)
    for candidate in key_candidates(stats, Recipe(), 0, False):
        spec = candidate.spec
        if spec.matrix is None:
            continue
        exact = (
            spec.apply_query(stats.query_sample)
            @ spec.apply(stats.key_sample, torch.arange(stats.key_sample.shape[1]), 0).mT
        )
        matrix, inverse = spec.matrix.to(dtype).float(), spec.query_matrix.to(dtype).float()
        assert bool(torch.isfinite(matrix).all()) and bool(torch.isfinite(inverse).all())
        rounded = (stats.query_sample @ inverse) @ (
            (stats.key_sample - spec.offset[:, None]) @ matrix.mT
        ).mT
        assert (
            float((rounded - exact).square().mean().sqrt())
            <= limit * float(exact.square().mean().sqrt()) + 1e-6
        )


def test_whitening_beats_plain_uniform_keys_at_equal_bits():
    stats = make_stats(head_dim=64, kind="bias")
    whitened_keys = {str(c.spec.format): c for c in key_candidates(stats, Recipe(), 0, False)}
    plain = key_candidates(stats, Recipe.model_validate({"key": {"transform": "none"}}), 0, False)
    two_bit = next(c for c in plain if c.spec.format == uniform(64, 4))
    best = min(c.distortion for c in whitened_keys.values() if c.spec.format.payload_bits <= 2.25)
    assert best < two_bit.distortion / 20


def test_more_bits_never_measure_worse_by_much():
    """Of a layer's own cuts: each is the best of its size. The catalogue's second cut of a size may
    be for other spectra."""
    stats, own = make_stats(head_dim=64), Recipe.model_validate({"catalogue": False})
    for group in (key_candidates(stats, own, 0, False), value_candidates(stats, own, 0)):
        for kind in ("scale", "scale_min"):
            ordered = sorted(
                (c for c in group if c.spec.format.params == kind),
                key=lambda c: c.spec.format.payload_bits,
            )
            assert all(b.distortion < 1.1 * a.distortion for a, b in itertools.pairwise(ordered))
        assert min(c.distortion for c in group[:-1]) < max(c.distortion for c in group) / 1000


@pytest.mark.parametrize(("head_dim", "least"), [(24, 4), (40, 4), (48, 3)])
def test_heads_that_ternary_codes_do_not_fit(head_dim, least):
    """Ternary codes take 16 channels at a time; other heads start at four levels, and the plan's
    lower bound says so."""
    stats = make_stats(head_dim=head_dim)
    recipe = Recipe.model_validate({"key": {"transform": "none"}, "value": {"transform": "rotate"}})
    for group, side in (
        (key_candidates(stats, recipe, 0, False), recipe.key),
        (value_candidates(stats, recipe, 0), recipe.value),
    ):
        formats = [c.spec.format for c in group]
        assert (
            min(formats, key=lambda f: f.nbytes(32))
            == uniform(head_dim, least)
            == side.least_format(head_dim)
        )
        assert len(formats) == (8 if least == 4 else 9)


def test_balance_makes_the_product_of_metric_and_covariance_even():
    stats = make_stats()
    matrix = balance(stats, torch.Generator().manual_seed(0))
    inverse = torch.linalg.inv(matrix)
    variance = (matrix @ stats.value_cov @ matrix.mT).diagonal(dim1=-2, dim2=-1)
    weight = (inverse.mT @ stats.output_metric @ inverse).diagonal(dim1=-2, dim2=-1)
    for x in (variance, weight):
        assert float((x / x.mean(-1, keepdim=True) - 1).abs().max()) < 0.05


def test_unit_scale_only_scales():
    matrix = unit_scale(make_stats())
    assert torch.equal(matrix, torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1)))


def test_reordering_groups_channels_of_like_range():
    widths = torch.tensor([1.0, 9.0] * 8)
    sample = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(0)) * widths
    order = reorder(torch.stack((sample.amin(1), sample.amax(1)), 1).double(), 8, 0)
    assert torch.equal(order.sum(1), torch.ones(2, 16, dtype=torch.float64)) and torch.equal(
        order.sum(2), order.sum(1)
    )
    moved = sample @ order.float().mT
    spans = (moved.amax(1) - moved.amin(1)).unflatten(-1, (2, 8))
    assert bool((spans[:, 0].amax(-1) < spans[:, 1].amin(-1)).all())
