"""How long a window is that the budget decides."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.compress.budget import Budget
from kvfold.compress.plan import SLIDING_SHARE, WINDOW_SHARE, longest_window, make_plan
from kvfold.compress.recipe import Recipe, load_recipe
from kvfold.exports.account import Geometry, cache_nbytes
from kvfold.kernels.formats import Format

LAYERS = 24
LEAST = [(Format(((64, 2),)), Format(((32, 2), (32, 0))))] * LAYERS
GEOMETRY = Geometry(num_kv_heads=2, head_dim=64, sinks=64, window=128, page_tokens=32)


def budget(bits: float, at: int) -> Budget:
    return Budget("", at, int(bits * GEOMETRY.elements(at, LAYERS) / 8))


@pytest.mark.parametrize(
    ("bits", "at", "window"),
    [
        (2.354, 32768, 512),
        (2.5, 8192, 128),
        (2.5, 131072, 2048),
        (4.5, 32768, 1024),
        (4.5, 8192, 256),
        (2.0, 2048, 128),
    ],
)
def test_the_window_is_a_power_of_two_times_the_shortest_within_an_eighth_of_the_bytes(
    bits, at, window
):
    assert longest_window(GEOMETRY, budget(bits, at), LEAST) == window


@given(bits=st.floats(1.2, 16), at=st.integers(300, 200_000))
def test_the_smallest_formats_always_fit_beside_it(bits, at):
    allowed = budget(bits, at)
    if cache_nbytes(GEOMETRY, LEAST, at) > allowed.nbytes:
        return
    window = longest_window(GEOMETRY, allowed, LEAST)
    assert cache_nbytes(replace(GEOMETRY, window=window), LEAST, at) <= allowed.nbytes
    assert window == 128 or window * 4 * 64 * 2 * LAYERS * WINDOW_SHARE <= allowed.nbytes
    tight = Budget("", at, cache_nbytes(GEOMETRY, LEAST, at))
    assert (
        cache_nbytes(replace(GEOMETRY, window=longest_window(GEOMETRY, tight, LEAST)), LEAST, at)
        <= tight.nbytes
    )


def test_a_sliding_layer_keeps_most_of_what_it_sees_in_pages():
    sliding = replace(GEOMETRY, sliding=(512, 0) * (LAYERS // 2))
    assert longest_window(sliding, budget(8, 32768), LEAST) == 128
    sliding = replace(GEOMETRY, sliding=(4096, 0) * (LAYERS // 2))
    assert longest_window(sliding, budget(8, 32768), LEAST) == 4096 // SLIDING_SHARE


def test_a_plan_says_what_the_window_became_and_a_number_is_kept(tiny_folder):
    assert (
        Recipe().window == "auto"
        and load_recipe("skvq").window == load_recipe("pm-kvq").window == 128
    )
    plan = make_plan(str(tiny_folder), "8", None, Recipe(), None)
    assert plan.recipe.window == plan.geometry.window >= 128
    fixed = make_plan(str(tiny_folder), "8", None, Recipe.model_validate({"window": 48}), None)
    assert fixed.recipe.window == fixed.geometry.window == 48
    with pytest.raises(ValueError):
        Recipe.model_validate({"window": "long"})
