"""Ctrl-C: exit code 130 and one sentence, wherever it comes, and what --resume promises is
there."""

import os
import signal
import subprocess
import sys
import threading
import time

import prepared
import pytest

from kvfold.compress import cli

START = [sys.executable, "-m", "kvfold"]
RESUME = "kvfold: interrupted; run the same command with --resume to go on.\n"


def start(*args: object) -> subprocess.Popen:
    """A process that hears SIGINT, as one in a terminal does."""
    return subprocess.Popen(
        [*START, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, out, err


@pytest.mark.parametrize("seconds", [0.5, 1.5])
def test_in_the_imports(seconds):
    process = start("compress", "no-such-model")
    time.sleep(seconds)  # importing torch and transformers takes longer
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code in (130, 2) and out == ""  # 2: a machine that was faster
    assert code == 2 or err in ("kvfold: interrupted.\n", RESUME)


def test_in_a_run_which_then_goes_on(tmp_path, tiny_folder, tiny_artifact, text_file, recipe_file):
    out = tmp_path / "tiny"
    args = [
        "compress",
        tiny_folder,
        "--budget=4.0",
        f"--out={out}",
        f"--calib={text_file}",
        f"--recipe={recipe_file}",
    ]
    process = start(*args)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("kvfold: reading"):
            break
    process.send_signal(signal.SIGINT)
    code, stdout, err = finish(process)
    assert (code, stdout) == (130, "") and err.endswith(RESUME)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.work"]
    assert prepared.command(*args, "--resume").returncode == 0
    assert (out / "kv_cache.json").read_bytes() == (tiny_artifact / "kv_cache.json").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("turned_into", [None, RuntimeError("of a library"), SystemExit(1)])
@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["compress", "m"], RESUME), (["eval", "a", "--tasks=needle"], RESUME), (["eval", "a"], "kvfold: interrupted.\n"),
     (["validate", "a"], "kvfold: interrupted.\n")],
)  # fmt: skip
def test_whatever_becomes_of_the_exception(monkeypatch, capsys, words, sentence, turned_into):
    """typer makes an exit code of it, and what a library makes of it is anyone's guess."""

    def run(*args):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt as error:
            if turned_into is None:
                raise
            raise turned_into from error

    before = signal.default_int_handler
    signal.signal(signal.SIGINT, before)  # a shell's job in the background ignores it
    monkeypatch.setattr(cli, "_run", run)
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 130 and capsys.readouterr().err == sentence
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_of_its_own_stays_one(monkeypatch):
    def fail(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "_run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["validate", "a"])


def test_in_a_thread_there_are_no_signals(tmp_path, capsys):
    codes: list[object] = []

    def run():
        with pytest.raises(SystemExit) as stop:
            cli.main(["validate", str(tmp_path / "nothing")])
        codes.append(stop.value.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [2]
