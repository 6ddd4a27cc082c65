"""Where an artifact goes that nobody named, by `kvfold compress` and by make alike, whatever the
names hold."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvfold.compress.naming import default_output

ROOT = Path(__file__).resolve().parents[2]
ECHO = """#!{python}
import os, sys
if sys.argv[1:3] == ["-m", "kvfold.compress.naming"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
print(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("model", "budget", "name"),
    [("smollm2-135m", "2.5", "smollm2-135m-2.5"), ("owner/name", "2.5", "name-2.5"), ("./x/", "2.5", "x-2.5"),
     ("a/x.gguf", "3", "x-3"),
     ("x.GGUF", "3", "x-3"), ("a b/c d", "512MiB@32768", "c d-512MiB-at-32768"), ("x", "../4", "x-..-4"),
     ("it's", "3", "it's-3")],
)  # fmt: skip
def test_names(model, budget, name):
    assert default_output(model, budget) == Path("artifacts") / name


def test_folders_are_named_by_what_they_are(tmp_path, monkeypatch):
    (tmp_path / "model" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model" / "inner")
    assert (
        default_output(".", "3").name == "inner-3" and default_output("..", "3").name == "model-3"
    )
    assert default_output("../..", "3").name == f"{tmp_path.name}-3"


@pytest.mark.parametrize(
    "model",
    ["smollm2-135m", "./x/", "x.gguf", "a b/my model", "it's", '"$HOME" `id` $(id)', "#;&|*"],
)
def test_make_passes_words_as_they_are(tmp_path, model):
    for name in ("kvfold", "python"):
        (tmp_path / name).write_text(ECHO.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    escaped = model.replace("$", "$$")

    def make(target: str, *words: str) -> list[str]:
        command = [
            "make",
            "-s",
            "-o",
            ".venv/.ready",
            target,
            f"BIN={tmp_path}",
            f"MODEL={escaped}",
            *words,
        ]
        # what `make test ARGS=…` was given is not for this one
        outer = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "ARGS")
        env = {name: value for name, value in os.environ.items() if name not in outer}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return ast.literal_eval(
            done.stdout.splitlines()[-1]
        )  # a list of strings, by the script above

    assert make("compress", "BUDGET=3", "OUT=o'ut")[:5] == [
        "compress",
        model,
        "--budget",
        "3",
        "--out",
    ]
    assert make("compress", "BUDGET=3", "OUT=o'ut", "CALIB=my text")[5:] == [
        "o'ut",
        "--calib",
        "my text",
    ]
    assert make("eval", "BUDGET=3", "OUT=o'ut") == ["eval", "o'ut"]
    assert make("eval", "BUDGET=1MiB@512") == ["eval", str(default_output(model, "1MiB@512"))]
