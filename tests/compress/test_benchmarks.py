"""The ablation and the domains command on a tiny model: every row is a real artifact, and a run
goes on where it stopped."""

import json
import os
import sys
from pathlib import Path

import pytest

from kvfold.compress.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]


# as `best`, on less text; sinks and window are the tables' own
LITTLE = """
calibration: {seq_len: 512}
sensitivity: {seq_len: 256}
"""


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def call(main, *argv):
    sys.argv = ["benchmark", *map(str, argv)]
    main()


def test_ablation_rows_are_at_one_payload_and_are_not_run_twice(
    benchmarks, monkeypatch, tmp_path, tiny_folder, capsys, no_plots
):
    import ablation

    monkeypatch.setattr(sys, "argv", sys.argv)
    (tmp_path / "little.yaml").write_text(LITTLE)
    little = load_recipe(tmp_path / "little.yaml")
    monkeypatch.setattr(ablation, "load_recipe", lambda name: little)
    arguments = [
        tiny_folder,
        "--bits",
        5,
        "--text",
        ROOT / "compress/data/heldout.txt",
        "--windows",
        2,
    ]
    arguments += ["--seq-len", 300, "--out", tmp_path, "--device", "cpu"]
    call(ablation.main, *arguments, "--rows", "no offset")
    # a whole name asks for its row alone, a part for every row that has it
    call(ablation.main, *arguments, "--rows", "best,seed,no offset,64 sinks")
    shown = capsys.readouterr().out
    made = json.loads((tmp_path / "ablation-tiny-llama.json").read_text())["rows"]
    assert (
        next(iter(made)) == "K: no offset" and len(made) == 5 and shown.count("tiny-llama\n") == 5
    )
    assert all(
        4.5 < row["payload_bits"] <= 5 and len(row["kl"]) == 2 and min(row["kl"]) > 0
        for row in made.values()
    )
    assert made["64 sinks"]["kl"] < made["best"]["kl"]
    assert made["best"]["kl"] != made["best, seed 1"]["kl"]
    assert (tmp_path / "ablation-tiny-llama.md").read_text() in shown
    monkeypatch.setattr(ablation, "make", None)  # nothing is left to do
    call(ablation.main, *arguments, "--rows", "best,seed,no offset,64 sinks")


def test_every_row_of_the_ablation_is_a_valid_recipe(benchmarks, tiny_folder):
    import ablation

    recipes = {
        name: ablation.recipe_for(change, str(tiny_folder), 4.5)
        for name, change in ablation.ROWS.items()
    }
    best = recipes.pop("best")
    assert all(recipe != best for recipe in recipes.values())
    fixed = recipes["one format for all layers"]
    assert len(fixed.key.bits) == len(fixed.value.levels) == 1 and not fixed.key.levels


def test_domains_compare_each_calibration_with_the_tests_own(
    benchmarks, monkeypatch, tmp_path, tiny_folder, capsys, no_plots
):
    import domains

    monkeypatch.setattr(sys, "argv", sys.argv)
    (tmp_path / "little.yaml").write_text(LITTLE)
    arguments = [
        tiny_folder,
        "--recipe",
        tmp_path / "little.yaml",
        "--bits",
        5,
        "--windows",
        2,
        "--seq-len",
        300,
        "--out",
        tmp_path,
        "--device",
        "cpu",
    ]
    call(domains.main, *arguments)
    shown = capsys.readouterr().out
    made = json.loads((tmp_path / "domains-tiny-llama.json").read_text())["rows"]
    assert list(made) == ["maths", "drama", "prose", "code", "all"]
    assert all(set(row["kl"]) == {"maths", "drama", "prose", "code"} for row in made.values())
    assert "(1.00)" in shown and "worst ratio between single domains" in shown
    monkeypatch.setattr(domains, "make", None)
    call(domains.main, *arguments)
    assert capsys.readouterr().out == shown
    own = {name: sum(made[name]["kl"][name]) for name in ("maths", "drama", "prose", "code")}
    worst = max(sum(made[c]["kl"][t]) / own[t] for c in own for t in own)
    assert domains.worst(made, list(own)) == pytest.approx(worst)


@pytest.mark.parametrize("jobs", [1, 2])
def test_tasks_run_side_by_side_and_each_gets_its_own_result(
    benchmarks, jobs, tmp_path, monkeypatch
):
    from multiprocessing import get_context, set_forkserver_preload

    from kvfold.compress.bench import runs

    # a process of "spawn" imports everything anew, two of this server's are there at once
    started = []
    monkeypatch.setattr(
        runs, "get_context", lambda kind: started.append(kind) or get_context("forkserver")
    )
    set_forkserver_preload([runs.__name__])
    tasks = {"a": (7, 2), "b": (9, 4), "c": (8, 3)}
    assert dict(runs.side_by_side(divmod, tasks, jobs)) == {"a": (3, 1), "b": (2, 1), "c": (2, 2)}
    with pytest.raises(ZeroDivisionError):
        list(runs.side_by_side(divmod, {"a": (1, 0)}, jobs))
    assert started == ["spawn"] * (2 * (jobs - 1))  # CUDA does not survive a fork
    assert (
        runs.folder_of(tmp_path, 1) == tmp_path and runs.folder_of(tmp_path, 2).parent == tmp_path
    )


@pytest.mark.parametrize(("given", "wanted"), [("", ["0", "1", "0"]), ("5,7", ["5", "7", "5"])])
def test_processes_take_the_gpus_in_turn(benchmarks, monkeypatch, given, wanted):
    from multiprocessing import Value

    from kvfold.compress.bench import runs

    started, threads = Value("i", 0), []
    monkeypatch.setattr(runs.torch, "set_num_threads", threads.append)
    seen = []
    for _ in range(3):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)  # each in a process of its own
        runs._take_device(started, 2, 3)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == wanted and min(threads) >= 1


def test_tables_have_few_sinks_and_a_short_window(benchmarks):
    from kvfold.compress.bench import runs
    from kvfold.compress.recipe import Recipe

    recipe = runs.comparable(Recipe())
    assert (recipe.sinks, recipe.window) == (5, 128)
