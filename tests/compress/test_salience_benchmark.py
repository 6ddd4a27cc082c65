"""benchmarks/salience.py and its orders: what goes first, equal bytes, a run that goes on where it
stopped."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def ordered(order, scores):
    from page_orders import Ordered
    from test_progressive import policy_of

    policy = Ordered(1 << 30, policy_of(["mixed", "mixed"]))  # 208, 304, 640 and 1024 bytes
    policy.order, policy.scores = order, [torch.tensor(row) for row in scores]
    policy.losses, policy.lost = [(0.02, 0.01)] * 2, [[100.0] * 4] * 2
    return policy


def test_older_pages_that_wait_for_younger_ones_share_their_mean(benchmarks):
    from page_orders import rising_means

    assert rising_means([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert rising_means([3.0, 1.0, 2.0, 0.5, 4.0]) == [1.625] * 4 + [4.0]


def test_pages_that_queries_lean_on_keep_their_bits(benchmarks):
    scores = [[0.1, 3.0, 0.4, 0.5], [1.0, 1.0, 1.0, 1.0]]
    limit = 8 * 290
    found = {}
    for order in ("age", "squares", "monotone", "drop"):
        rungs = [[3] * 4, [3] * 4]
        nbytes = ordered(order, scores).lower(rungs, limit)
        sizes = [208, 304, 640, 1024]
        assert nbytes == sum(sizes[r] + 4 for row in rungs for r in row) <= limit
        found[order] = rungs
    # all of a layer alike: the first one goes first, and the oldest pages
    assert found["age"][0] == sorted(found["age"][0]) and found["age"][0] < found["age"][1]
    assert found["squares"][0][1] == max(map(max, found["squares"]))
    assert found["squares"][0][0] == 0
    assert all(row == sorted(row) for row in found["monotone"])
    assert found["drop"] == found["squares"]  # what goes altogether costs most here


def test_a_page_that_nobody_looks_at_may_go(benchmarks):
    policy = ordered("drop", [[1e-3, 1.0, 1.0, 2.0]] * 2)
    policy.lost = [[1e-6, 100.0, 100.0, 100.0]] * 2
    rungs = [[3] * 4, [3] * 4]
    policy.lower(rungs, 8 * 304)
    assert [row[0] for row in rungs] == [-1, -1] and min(min(row[1:]) for row in rungs) >= 0


def test_the_command(benchmarks, monkeypatch, tmp_path, tiny_artifact, capsys):
    import salience

    def call(*more):
        arguments = ["--text", ROOT / "compress/data/heldout.txt", "--out", tmp_path]
        arguments += ["--prompt", 200, "--new", 60, "--chunk", 20, *more]
        monkeypatch.setattr(
            sys, "argv", ["x", *map(str, [tiny_artifact, tiny_artifact, *arguments])]
        )
        salience.main()

    call("--samples", 1)
    call("--samples", 2)
    shown = capsys.readouterr().out
    (path,) = tmp_path.glob("*-text.json")
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["0", "1"] and shown.count("sample ") == 2
    for row in rows.values():
        assert set(row) == {"16 bits", *salience.ROWS} and row["16 bits"]["kl"] == 0
        uniform = row["uniform"]
        assert uniform["pages"]["floor"] == sum(uniform["pages"].values()) > 0
        # one artifact for both: all pages end on its floor
        assert all(0 < row[name]["nbytes"] <= uniform["nbytes"] for name in salience.ROWS)
        assert row["age"]["kl"] == pytest.approx(uniform["kl"], abs=1e-6)
