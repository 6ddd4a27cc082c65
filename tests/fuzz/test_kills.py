"""A few moments at which a run, of one process or two, is killed, the same each time, others in nightly
runs (`make kills` tries 40)."""

import random

import pytest
from conftest import NIGHTLY

from fuzz.kills import Kills
from fuzz.pairs import Pairs

SEED = random.randrange(1 << 30) if NIGHTLY else 0


@pytest.fixture(scope="module")
def kills(tmp_path_factory) -> Kills:
    return Kills(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize("number", range(40 if NIGHTLY else 4))
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(kills, tmp_path, number):
    kills.point(tmp_path / "out", random.Random(f"{SEED}.{number}"))


@pytest.fixture(scope="module")
def pairs(kills, tmp_path_factory) -> Pairs:
    return Pairs(kills, tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize("number", range(20 if NIGHTLY else 2))
def test_two_of_which_one_was_killed_go_on_to_the_same_bytes(pairs, tmp_path, number):
    pairs.point(tmp_path / "out", random.Random(f"{SEED}.{number}"))
