"""How much of the rotating mean is taken off: the statistics of what stays, and the choice by head."""

from dataclasses import replace

import pytest
import torch
from conftest import char_tokenizer, save_tiny, tiny_model

from kvfold.compress import search
from kvfold.compress.calibrate import LayerStats, calibrate
from kvfold.compress.models.attention_hook import NAME
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.compress.search import fisher
from kvfold.compress.search.candidates import key_candidates
from kvfold.compress.search.mean_factors import choose_factors, takes_mean
from kvfold.compress.search.sensitivity import Passage, Probe
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import architecture_of
from kvfold.kernels.key_mean import STEP, turn_tables
from kvfold.runtime import load_pretrained

GEOMETRY = Geometry(2, 16, 3, 24, 8)
EARLY = 3 + 24 + 8 - 1
FACTORS = (1.0, 0.5, 0.0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A tiny model whose keys have a large mean, its probe, statistics and recipe."""
    model = tiny_model("qwen2", attention=NAME)
    arch = architecture_of(model.config)
    with torch.no_grad():
        for attention in arch.attention_modules(model):
            attention.k_proj.bias.add_(3 * torch.randn(attention.k_proj.bias.shape))
    ids = torch.randint(0, 128, (2, 90), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        stats = calibrate(
            model, arch, [x[None] for x in ids], [1, 5], 64, tmp_path_factory.mktemp("work")
        )
        probe = Probe(model, arch, [Passage(x[None]) for x in ids], EARLY)
    return probe, stats, load_recipe()


def test_statistics_of_what_stays(measured):
    """The sample is r + (1 − f)·m_t to the bit of its type, and the second moment's ends are known."""
    stats = measured[1][1]
    none, half = (
        stats.with_mean(torch.zeros(2).double()),
        stats.with_mean(torch.tensor([1.0, 0.5], dtype=torch.float64)),
    )
    both = stats.key_cov + stats.key_mean[:, :, None] * stats.key_mean[:, None, :]
    torch.testing.assert_close(none.rest_moment, both)
    torch.testing.assert_close(none.rest_sample, stats.key_sample)
    assert not none.center.any()
    torch.testing.assert_close(half.rest_moment[0], stats.rest_moment[0])
    torch.testing.assert_close(half.center, stats.center * torch.tensor([[1.0], [0.5]]).double())
    between = (stats.key_sample + stats.rest_sample) / 2
    torch.testing.assert_close(half.rest_sample[1], between[1])
    assert torch.linalg.eigvalsh(half.rest_moment).min() > 0


def test_the_moment_is_that_of_keys_at_random_positions():
    """Of keys that scatter around a mean before RoPE and are turned to positions that know nothing of
    it: E[(k − f·m_t)(k − f·m_t)ᵀ] as it is counted."""
    rng = torch.Generator().manual_seed(0)
    tokens, dim = 40_000, 8
    omega = torch.tensor([0.9, 0.4, 0.2, 0.1])
    center = torch.randn(1, dim, generator=rng)
    places = torch.randint(0, 4000, (tokens,), generator=rng) // STEP * STEP
    tables = turn_tables(tuple(omega.tolist()), dim, 0, torch.device("cpu"), "halves")
    means = tables.mean_at(center, places, torch.zeros(tokens, dtype=torch.int64))
    rest = torch.randn(1, tokens, dim, generator=rng) @ torch.randn(dim, dim, generator=rng)
    rest -= rest.mean(1, keepdim=True)
    keys = (rest + means).double()
    blank = dict.fromkeys(LayerStats.__dataclass_fields__, torch.empty(0))
    centred = keys - keys.mean(1, keepdim=True)
    # the tokens that are attended to are those whose keys lie against the mean
    weights = torch.sigmoid(-(rest @ torch.ones(dim)).double())

    def moment(x):
        return (weights[..., None] * x.double()).mT @ x.double() / weights.sum()

    stats = LayerStats(
        **blank
        | {
            "key_mean": keys.mean(1),
            "key_cov": centred.mT @ centred / tokens,
            "center": center.double(),
            "rest_moment": rest.double().mT @ rest.double() / tokens,
            "rest_sample": rest,
            "key_sample": keys.float(),
            "attended_keys": moment(keys),
            "attended_rest": moment(rest),
            "attended_turned": moment(means),
        }
    )
    found = stats.with_mean(torch.tensor([0.3], dtype=torch.float64))
    stays = keys - 0.3 * means.double()
    counted = stays.mT @ stays / tokens
    assert (found.rest_moment - counted).norm() < 0.02 * counted.norm()
    weighted = (weights[..., None] * stays).mT @ stays / weights.sum()
    torch.testing.assert_close(found.attended_rest, weighted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.attended_turned, 0.09 * moment(means))
    torch.testing.assert_close(found.rest_sample.double(), stays, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_head_gets_the_factor_that_loses_least(measured, tmp_path):
    probe, stats, recipe = measured
    layers = range(len(stats))
    assert all(takes_mean(recipe, x) for x in stats)
    candidates = [
        [
            key_candidates(
                x.with_mean(torch.full((2,), f, dtype=torch.float64)),
                recipe,
                i,
                False,
                near_bits=2.5,
            )[0]
            for f in FACTORS
        ]
        for i, x in enumerate(stats)
    ]
    assert {len(row) for row in candidates} == {3}
    assert len({c.spec.format.payload_bits for row in candidates for c in row}) == 1
    losses = fisher.Losses(fisher.Sweep(probe, GEOMETRY, 4, 0), tmp_path / "losses.json")
    found = {i: choose_factors(losses, i, candidates[i], FACTORS) for i in layers[::-1]}
    sweep = fisher.Sweep(probe, GEOMETRY, 4, 0)
    again = {
        i: [
            sum(seen.loss(GEOMETRY, {"key_spec": x.spec}) for seen in passages)
            for x in candidates[i]
        ]
        for i, passages in ((i, sweep.at(i)) for i in layers[::-1])
    }
    for i in layers:
        for head in range(2):
            own = [float(loss[head]) for loss in again[i]]
            assert min(own) > 0
            assert found[i][head] == FACTORS[own.index(min(own))]
    assert len({float(f) for x in found.values() for f in x}) > 1  # else this shows nothing
    assert not takes_mean(recipe, replace(stats[0], frequencies=torch.empty(0)))


def test_an_artifact_holds_the_part_that_is_taken_off(tmp_path, text_file, recipe_file):
    """One factor is no choice: nothing is measured, and the stored mean is that part of the whole."""
    source, means = save_tiny(tmp_path / "model", "qwen2"), {}
    for factor in (1.0, 0.25):
        recipe = load_recipe(recipe_file)
        key = recipe.key.model_copy(update={"mean_factors": (factor,)})
        artifact = compress(
            str(source),
            "4.0",
            tmp_path / f"out{factor}",
            calib=str(text_file),
            recipe=recipe.model_copy(update={"key": key}),
            device="cpu",
            accept_loss=True,
        )
        means[factor] = [x.key.offset for x in artifact.specs]
    for whole, part in zip(means[1.0], means[0.25], strict=True):
        if whole is not None and part is not None:
            torch.testing.assert_close(part, whole / 4)
    ids = char_tokenizer()("the cache of a long sequence" * 3, return_tensors="pt").input_ids
    model = load_pretrained(artifact.path, device="cpu")
    assert bool(torch.isfinite(model(ids).logits).all())


def test_first_order_sensitivities_measure_no_factor(monkeypatch, tmp_path, text_file, recipe_file):
    monkeypatch.setattr(search, "choose_factors", None)
    recipe = load_recipe(recipe_file)
    sensitivity = recipe.sensitivity.model_copy(update={"method": "first-order"})
    artifact = compress(
        str(save_tiny(tmp_path / "model", "llama")),
        "4.0",
        tmp_path / "out",
        calib=str(text_file),
        recipe=recipe.model_copy(update={"sensitivity": sensitivity}),
        device="cpu",
        accept_loss=True,
    )
    assert artifact.metadata.layers
