"""The catalogue of formats: valid, ordered, small, and what the search picks from unless a recipe
says otherwise."""

import itertools

import pytest
from test_transforms import make_stats

from kvfold.compress.recipe import Recipe, load_recipe
from kvfold.compress.search.candidates import key_candidates, value_candidates
from kvfold.compress.transforms.whiten import (
    CLASS_LEVELS,
    compositions,
    eigenbasis,
    value_moment,
    water_fill,
    whitened,
)
from kvfold.kernels.catalogue import HEAD_DIMS, code_bits, key_formats, mixed_between, value_formats
from kvfold.kernels.formats import Format, raw16, uniform

SIDES = {"key": key_formats, "value": value_formats}


def test_the_supported_head_dims_have_one():
    assert HEAD_DIMS == (64, 80, 96, 128, 256)
    for find in SIDES.values():
        assert find(16) == find(112) == ()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_formats_are_of_the_head_ordered_and_different(head_dim, side):
    formats = SIDES[side](head_dim)
    assert all(f.head_dim == head_dim for f in formats)
    assert len(set(formats)) == len(formats) <= 40
    bits = [f.payload_bits for f in formats]
    assert bits == sorted(bits) and bits[0] < 1.25 and bits[-1] == 16
    near = [b for b in bits if b <= 6.5]
    assert all(b - a <= 1.4 for a, b in itertools.pairwise(near)) and near[-1] > 5


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_mixed_formats_are_cuts_that_a_layer_could_make_itself(head_dim, side):
    cuts = {tuple(row) for row in compositions(head_dim).tolist()}
    for fmt in SIDES[side](head_dim):
        if fmt.params == "scale":
            own = {levels: channels for channels, levels in fmt.classes}
            assert fmt.param_dtype == "e4m3" and tuple(own.get(n, 0) for n in CLASS_LEVELS) in cuts


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_what_the_default_offers_and_the_steps_of_the_ladder_are_in_it(head_dim, side):
    formats = SIDES[side](head_dim)
    assert {raw16(head_dim), uniform(head_dim, 256, "fp16")} <= set(formats)
    assert set(getattr(Recipe(), side).uniform_formats(head_dim)) <= set(formats)


def test_a_range_of_bits_counts_codes_alone_in_whole_classes():
    formats = key_formats(80)
    found = mixed_between(formats, 0.75, 2.0)
    assert found and all(
        0.7 <= code_bits(f) <= 2.0 for f in found
    )  # 60 bits are 56 in whole classes
    assert set(mixed_between(formats, 0.0, 6.0)) == {f for f in formats if f.params == "scale"}
    assert code_bits(Format(((8, 64), (24, 2), (32, 0)))) == (48 + 24) / 64


@pytest.mark.parametrize(("side", "find"), [("key", key_candidates), ("value", value_candidates)])
def test_the_search_evaluates_all_that_the_catalogue_offers(side, find):
    stats = make_stats(head_dim=64)
    extra = (False,) if side == "key" else ()
    recipe = Recipe()
    found = [c.spec.format for c in find(stats, recipe, 0, *extra)]
    shared = getattr(recipe, side).shared_formats(64)
    assert (
        set(found) == {*shared, *getattr(recipe, side).uniform_formats(64)} <= set(SIDES[side](64))
    )
    assert len(shared) > 10
    own = Recipe.model_validate({"catalogue": False})
    spectrum = (
        whitened(stats)[1]
        if side == "key"
        else eigenbasis(value_moment(stats), stats.output_metric)[1]
    )
    expected = [
        *water_fill(spectrum, getattr(own, side).bits),
        *getattr(own, side).uniform_formats(64),
    ]
    assert [c.spec.format for c in find(stats, own, 0, *extra)] == expected


def test_a_head_dim_without_one_makes_its_own_cuts():
    stats, recipe = make_stats(head_dim=48), Recipe()
    expected = water_fill(whitened(stats)[1], recipe.key.bits)
    assert [c.spec.format for c in key_candidates(stats, recipe, 0, False)][
        : len(expected)
    ] == expected


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("side", SIDES)
def test_the_least_format_is_the_smallest_candidate(head_dim, side):
    for bits in ((0.5, 3.0), (1.0, 2.0)):
        part = getattr(Recipe.model_validate({side: {"bits": bits}}), side)
        offered = [*part.shared_formats(head_dim), *part.uniform_formats(head_dim)]
        assert part.least_format(head_dim, True).nbytes(32) == min(f.nbytes(32) for f in offered)


@pytest.mark.parametrize("name", ["skvq", "skvq-v1.5", "pm-kvq"])
def test_recipes_of_uniform_formats_stay_outside(name):
    recipe = load_recipe(name)
    assert recipe.key.shared_formats(128) == recipe.value.shared_formats(128) == ()
