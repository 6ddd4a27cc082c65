"""Some hundred cases of the mutator, the same each time, others in nightly runs (`make fuzz` runs
20,000)."""

import logging
import random

import pytest
from conftest import NIGHTLY

from fuzz.artifacts import Artifacts
from fuzz.caches import Caches
from fuzz.ggufs import Ggufs
from fuzz.run import Report, run_case
from fuzz.works import Works

SEED = random.randrange(1 << 30) if NIGHTLY else 0


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def no_case_fails(target, count: int, scratch, seconds: float = 20.0) -> Report:
    """The seconds are for a machine with other work on it; a case takes hundredths of one."""
    report = Report()
    for number in range(count):
        run_case(target, SEED, number, scratch, report, seconds)
    assert not report.failures, f"seed {SEED}: " + "\n".join(report.failures)
    return report


def test_artifacts(tmp_path, tiny_artifact):
    report = no_case_fails(Artifacts(tiny_artifact), 200, tmp_path)
    assert report.outcomes["refused"] > 100 and report.outcomes["another"] > 10


def test_saved_caches(tmp_path, tiny_artifact):
    report = no_case_fails(Caches(tiny_artifact, tmp_path), 250, tmp_path)
    assert report.outcomes["refused"] > 150 and report.outcomes["same"] > 5


def test_ggufs(tmp_path):
    report = no_case_fails(Ggufs(tmp_path), 48, tmp_path)
    assert (
        report.outcomes["refused"] > 20 and report.outcomes["same"] + report.outcomes["another"] > 3
    )


def test_work_folders(tmp_path):
    report = no_case_fails(Works(tmp_path), 40 if NIGHTLY else 2, tmp_path, 100.0)
    assert report.outcomes["same"] >= 1
