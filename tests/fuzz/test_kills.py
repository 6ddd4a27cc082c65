"""A few moments at which a run is killed, the same each time, others in nightly runs (`make kills`
tries 40)."""

import random

import pytest
from conftest import NIGHTLY

from fuzz.kills import Kills

SEED = random.randrange(1 << 30) if NIGHTLY else 0


@pytest.fixture(scope="module")
def kills(tmp_path_factory) -> Kills:
    return Kills(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize("number", range(40 if NIGHTLY else 4))
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(kills, tmp_path, number):
    kills.point(tmp_path / "out", random.Random(f"{SEED}.{number}"))
