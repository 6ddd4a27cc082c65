"""Processes that `kvfold compress` starts itself."""

import os
import subprocess
import sys
from pathlib import Path

import prepared
import pytest
import torch
from conftest import TINY_RECIPE

from kvfold.compress import local
from kvfold.errors import KvfoldError

WORDS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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
        done = prepared.command(
            "compress", "--budget", "4.0", "--out", out, "--calib", text_file, "--recipe", tmp_path / "recipe.yaml",
            "--context", "400", "--seed", "3", "--accept-loss", "--processes", count, "--", tiny_folder,
            env={name: "" for name in WORDS if name != "WORLD_SIZE"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = [x for x in done.stderr.splitlines() if not x.startswith("kvfold: warning")]
        found[count] = files(out), done.stdout.replace(str(out), "OUT"), lines
    assert found[1] == found[2] and found[1][0]


def test_a_fault_is_said_once(tmp_path):
    done = prepared.command("compress", tmp_path / "nothing", "--processes", "2")
    assert done.returncode == 2 and done.stderr.count("is not a checkpoint folder") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("program", ["/bin/false", "/nowhere/python"])
def test_where_none_can_be_started_one_goes_on_alone(program, monkeypatch):
    monkeypatch.setattr(local.sys, "executable", program)
    threads = torch.get_num_threads()
    with local.started(2, ["compress", "--help"]):
        assert "WORLD_SIZE" not in os.environ and torch.get_num_threads() == threads


def test_one_that_is_led_ends_with_the_one_that_leads():
    code = "import time; from kvfold.compress import local; local._follow(); time.sleep(100)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout
        assert process.stdout.read(len(local.READY)) == local.READY and process.poll() is None
        process.stdin.close()
        assert process.wait(30) == 1


def test_large_models_are_shared_on_a_cpu(tmp_path, monkeypatch):
    small, large = tmp_path / "small", tmp_path / "large"
    for folder, nbytes in ((small, local.LEAST_NBYTES - 1), (large, local.LEAST_NBYTES)):
        folder.mkdir()
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(nbytes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(local, "memory_left", lambda: None)
    count = lambda model, device="auto", asked=None: local.count_of(asked, str(model), device)  # noqa: E731
    assert count(small) == 1 and count(large) == count("someone/model") == 2
    assert count(large / "model.safetensors") == 2 and count(small, asked=3) == 3
    for left, found in ((8 << 30, 2), ((8 << 30) - 1, 1)):
        monkeypatch.setattr(local, "memory_left", lambda left=left: (left, ""))
        assert count(large) == count("someone/model") == found and count(large, asked=2) == 2
    monkeypatch.setattr(local, "memory_left", lambda: (15 << 30, ""))
    for nbytes, found in ((1 << 30, 2), (2 << 30, 1)):
        os.truncate(large / "model.safetensors", nbytes)
        assert count(large) == found
    monkeypatch.setattr(local, "memory_left", lambda: None)
    assert count(large) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count(large) == 1
    with pytest.raises(KvfoldError, match="leave --processes out"):
        count(large, asked=2)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert count(large) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert count(large) == 1 and count(large, "cpu") == 2
    with pytest.raises(KvfoldError, match="--processes 2 is for a CPU, but the device is 'cuda'"):
        count(large, "cuda", 2)
