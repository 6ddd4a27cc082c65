"""Processes that `kvfold compress --processes N` starts itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import prepared
import pytest
import torch
from conftest import TINY_RECIPE

from kvfold.compress import local
from kvfold.errors import KvfoldError

WORDS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# the command with two threads, one for each process; PATCH has this process note how many it has met
CODE = """
import torch, sys
torch.set_num_threads(2)
from kvfold.compress import pipeline, processes
real = pipeline.compress
def compress(*args, **options):
    print("processes:", processes.Processes.current().size, torch.get_num_threads())
    return real(*args, **options)
pipeline.compress = compress
from kvfold.__main__ import main
main()
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Nobody's launcher is told of."""
    for name in (*WORDS, local.LED):
        monkeypatch.delenv(name, raising=False)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_two_give_the_bytes_of_one(tiny_folder, text_file, tmp_path):
    (tmp_path / "recipe.yaml").write_text(TINY_RECIPE)
    found = {}
    for count in (1, 2):
        out = tmp_path / str(count) / "artifact"
        code = CODE if count == 2 else CODE.replace("set_num_threads(2)", "set_num_threads(1)")
        done = prepared.python(
            "kvfold", code, "compress", "--budget", "4.0", "--out", out, "--calib", text_file,
            "--recipe", tmp_path / "recipe.yaml", "--context", "400", "--seed", "3", "--accept-loss",
            "--processes", count, "--", tiny_folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"processes: {count} 1\n" in done.stdout
        text = done.stdout.replace(f"processes: {count}", "").replace(str(out), "OUT")
        found[count] = files(out), text, done.stderr
    assert found[1] == found[2] and found[1][0]


@pytest.mark.parametrize("first", [0, 1])
def test_a_fault_is_said_once_whoever_has_it(first, tiny_folder, tmp_path):
    """Of the recipe: read in each process, and not what it should be in one of them."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sinks: -5\n")
    code = CODE.replace(
        "from kvfold.__main__",
        "from kvfold.compress import recipe, launch\n"
        "import os, contextlib\n"
        "load = recipe.load_recipe\n"
        "recipe.load_recipe = lambda name, seed: load(name if os.environ.get('RANK') == FIRST else 'best', seed)\n"
        "from kvfold.__main__".replace("FIRST", repr(str(first))),
    )
    # the other process is the command itself: it takes the patch by a sitecustomize module
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('KVFOLD_LED'):\n"
        "    import builtins\n    real = builtins.__import__\n"
        "    def hook(name, *args, **named):\n"
        "        found = real(name, *args, **named)\n"
        "        if name == 'kvfold.compress.recipe' and not hasattr(found, 'patched'):\n"
        "            import sys\n            module = sys.modules['kvfold.compress.recipe']\n"
        "            load, module.patched = module.load_recipe, True\n"
        f"            module.load_recipe = lambda name, seed: load(name if {first} == 1 else 'best', seed)\n"
        "            found.patched = True\n"
        "        return found\n"
        "    builtins.__import__ = hook\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = prepared.python(
        "kvfold", code, "compress", tiny_folder, "--recipe", recipe, "--out", tmp_path / "out",
        "--processes", "2", env={"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if "sinks" in line]
    assert len(said) == 1 and "Traceback" not in done.stderr and "Another" not in done.stderr


def test_one_that_does_not_begin_is_said(monkeypatch):
    monkeypatch.setattr(local.sys, "executable", "/bin/false")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(KvfoldError, match="did not begin"), local.started(2, ["compress"]):
        pytest.fail("it went on")
    assert "WORLD_SIZE" not in os.environ


def test_one_that_is_led_ends_with_the_one_that_leads():
    code = "import time; from kvfold.compress import local; local._follow(1); time.sleep(100)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout
        assert process.stdout.read(len(local.READY)) == local.READY and process.poll() is None
        process.send_signal(signal.SIGINT)  # Ctrl-C in a terminal, which both hear
        time.sleep(0.2)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(30) == 1


def test_what_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check = local.check_processes
    check(1, "cuda", ["/dev/stdin"])
    check(4, "auto", ["model", None, "best"])
    os.mkfifo(tmp_path / "pipe")
    for count, device, read, words in (
        (5, "cpu", [], "more than the 4 threads .* give 4 at the most"),
        (
            2,
            "cuda",
            [],
            "--processes 2 is for a CPU, but --device cuda is a GPU; give --device cpu",
        ),
        (2, "cpu", ["model", "/dev/fd/63"], "'/dev/fd/63' can be read once"),
        (
            2,
            "cpu",
            [str(tmp_path / "pipe")],
            "pipe' can be read once, but --processes 2 reads it 2",
        ),
    ):
        with pytest.raises(KvfoldError, match=words):
            check(count, device, read)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(KvfoldError, match="--device auto is a GPU"):
        check(2, "auto", [])
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(KvfoldError, match="WORLD_SIZE is '1': a launcher has started this one"):
        check(2, "cpu", [])
