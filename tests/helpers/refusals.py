"""`kvfold compress` with bad input, and the checks of its refusal (fixtures for the tests that give
some)."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from kvfold.compress.cli import main

WORDS = ("finding the model", "reading ", "measuring all", "warning: A KL", "writing and checking")
STAGES = tuple(f"kvfold: {word}" for word in WORDS)


def listing(folder: Path) -> set[tuple[str, int]]:
    return {(str(p), p.stat().st_size if p.is_file() else 0) for p in folder.rglob("*")}


@pytest.fixture
def kvfold(monkeypatch, capsys):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvfold", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


def check_refusal(code: int, out: str, err: str, *words: object) -> str:
    """One sentence after the stage lines, nothing on stdout; returns the sentence."""
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    *stages, last = [line for line in err.splitlines() if line and "it/s]" not in line]
    assert last.startswith("kvfold: ")
    assert all(line.startswith(STAGES) for line in stages), err
    for word in words:
        assert str(word) in last, last
    return last


@pytest.fixture
def refused(kvfold, tmp_path, tiny_folder, text_file, recipe_file):
    """Runs `compress` with options that replace good ones, and checks the refusal and that the
    folder is as before."""

    def run(*words: object, **options: object) -> str:
        out = tmp_path / "out"
        good = {"budget": "4.0", "out": out, "calib": text_file, "recipe": recipe_file}
        model = options.pop("model", tiny_folder)
        flags = [f"--{name}={value}" for name, value in {**good, **options}.items()]
        before = listing(tmp_path)
        last = check_refusal(*kvfold("compress", model, *flags), *words)
        assert listing(tmp_path) == before
        return last

    return run


@pytest.fixture
def checkpoint(tmp_path, tiny_folder) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit_config(folder: Path, **fields) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder
