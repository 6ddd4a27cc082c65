"""benchmarks/progressive.py and cpu_decode.py on a tiny artifact: equal peaks, a run that goes on
where it stopped."""

import json
import sys
from pathlib import Path

import pytest

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry

ROOT = Path(__file__).resolve().parents[2]
GEOMETRY = Geometry(num_kv_heads=2, head_dim=16, sinks=3, window=24, page_tokens=8)


@pytest.fixture
def call(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def run(main, *argv):
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, argv)])
        main()

    return run


def test_loss_by_position(call, monkeypatch, tmp_path, tiny_artifact, capsys):
    import progressive

    arguments = [
        tiny_artifact,
        "--tokens",
        600,
        "--text",
        ROOT / "compress/data/heldout.txt",
        "--windows",
        2,
    ]
    arguments += ["--chunk", 50, "--device", "cpu", "--out", tmp_path]
    call(progressive.main, *arguments, "--rules", "floor,progressive")
    call(progressive.main, *arguments)
    shown = capsys.readouterr().out
    stem = tmp_path / f"progressive-{tiny_artifact.name}"
    found = json.loads(stem.with_suffix(".json").read_text())
    budget, rows = found["options"]["budget"], found["rows"]
    assert (
        list(rows)[:4] == ["floor, 0", "progressive, 0", "floor, 1", "progressive, 1"]
        and len(rows) == 6
    )
    assert all(
        len(row[name]) == 599 for row in rows.values() for name in ("nll", "plain_nll", "kl")
    )
    assert all(min(row["kl"]) > -1e-6 for row in rows.values())
    assert rows["floor, 0"]["plain_nll"] == pytest.approx(rows["progressive, 0"]["plain_nll"])
    assert sum(rows["floor, 0"]["kl"]) > sum(rows["progressive, 0"]["kl"]) > 0
    assert stem.with_suffix(".md").read_text() in shown and stem.with_suffix(".png").is_file()
    for rule in ("progressive", "whole layers"):
        for window in range(2):
            row = rows[f"{rule}, {window}"]
            assert 0.9 * budget < row["peak_bytes"] <= budget and row["positions"][-1] == 600
            assert (
                row["bits"] == sorted(row["bits"], reverse=True)
                and row["bits"][0] == 16
                and row["bits"][-1] < 6
            )
            assert max(row["kl"][:49]) < 1e-3  # nothing lowered yet
    assert max(rows["floor, 0"]["bytes"]) <= budget
    whole = rows["whole layers, 0"]["pages"]
    assert all(
        sum(count > 0 for count in layer) == 1 for layer in whole
    )  # a layer's pages stand on one rung
    monkeypatch.setattr(progressive, "losses_of", None)  # nothing is left to do
    call(progressive.main, *arguments)
    with pytest.raises(KvfoldError, match=r"more than the budget of \d+; raise --share"):
        call(progressive.main, *arguments, "--share", 0.05)
    with pytest.raises(KvfoldError, match="'best', which is no rule"):
        call(progressive.main, *arguments, "--rules", "best")


def test_a_model_is_compressed_to_the_budget(call, tmp_path, tiny_folder, monkeypatch):
    import progressive

    made = []
    monkeypatch.setattr(progressive, "compress", lambda *args, **kwargs: made.append(args[:2]))
    monkeypatch.setattr(progressive, "geometry_of", lambda *args: (GEOMETRY, 3, 2048))
    progressive.artifact_for(str(tiny_folder), 1000, 0.25, tmp_path, "cpu")
    assert made == [(str(tiny_folder), f"{int(0.25 * 2 * 2 * 3 * 2 * 16 * 1000) - 60}B@1000")]


def test_decoding_times(call, tmp_path, capsys):
    import cpu_decode

    arguments = [
        "--tokens",
        "100,300",
        "--steps",
        2,
        "--layers",
        1,
        "--heads",
        2,
        "--kv-heads",
        1,
        "--head-dim",
        16,
    ]
    call(cpu_decode.main, *arguments, "--json", tmp_path / "times.json")
    rows = json.loads((tmp_path / "times.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [100, 300] and all(
        row[name] > 0 for row in rows for name in cpu_decode.CACHES
    )
    assert "| 300 | " in capsys.readouterr().out
