"""Runs of two processes, `kvfold compress --processes 2`, of which one is killed at a random moment: the
other ends too, and two that --resume end with the bytes of one.

The command is process 0, which writes; its moments are those of kills.py. Process 1 writes nothing: it
is killed when it begins to give process 0 something, for the n-th time, or a random part of a hundredth
of a second later. It is forked from process 0 instead of started anew, so that it imports nothing; else
all is as the command does it.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import IO, Any

import torch

from fuzz.kills import Kills, die, forked, some_step, sums, told
from kvfold.__main__ import main as command
from kvfold.compress import launch, local
from kvfold.compress.processes import Processes

LIMIT = 100  # seconds until a process that waits for ever is ended by SIGALRM


class Forked:
    """What local.py has of subprocess.Popen, of a process that goes on from this one.

    Args:
        words: sys.executable, its options, `-m kvfold`, and the command's words.
        env: its environment.
    """

    before: Any = staticmethod(lambda: None)  # called in it before the command

    def __init__(self, words: Sequence[str], env: dict[str, str], **_: Any) -> None:
        (heard, says), (hears, said) = os.pipe(), os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                for ours in (says, hears):  # else its stdin would never end
                    os.close(ours)
                os.dup2(heard, 0)
                os.dup2(said, 1)
                os.environ.clear()
                os.environ.update(env)
                signal.alarm(LIMIT)
                self.before()
                code = run_command(words[words.index("kvfold") + 1 :])
            finally:
                os._exit(code)
        for theirs in (heard, said):
            os.close(theirs)
        self.stdin: IO[bytes] = open(says, "wb")  # noqa: SIM115 - local.py closes both
        self.stdout: IO[bytes] = open(hears, "rb")  # noqa: SIM115

    def wait(self, timeout: float | None = None) -> int:
        """As subprocess.Popen.wait."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            number, status = os.waitpid(self.pid, 0 if end is None else os.WNOHANG)
            if number:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("kvfold", timeout or 0.0)
            else:
                time.sleep(0.01)
        return self.returncode

    def kill(self) -> None:
        """As subprocess.Popen.kill."""
        os.kill(self.pid, signal.SIGKILL)


def run_command(words: Sequence[str]) -> int:
    """The exit status of `kvfold WORDS`, run here."""
    sys.argv = ["kvfold", *words]
    try:
        command()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


class Pairs(Kills):
    """As Kills, of two processes.

    Args:
        alone: of one process, whose model and artifacts these take.
        scratch: a folder.
    """

    def __init__(self, alone: Kills, scratch: Path) -> None:
        self.old, self.wanted, self.before = alone.old, alone.wanted, alone.before
        self.scratch, self.mark = scratch, scratch / "killed"
        scratch.mkdir(exist_ok=True)
        recipe = alone.text.with_name("recipe.yaml")
        self.words = ["compress", str(alone.model), "--budget=4.0", f"--calib={alone.text}",
                      f"--recipe={recipe}", "--device=cpu", "--processes=2"]  # fmt: skip
        whole = scratch / "pair" / "tiny"
        killed, self.steps = self.run(whole, False, 0, 0, None)
        assert not killed and sums(whole) == self.wanted
        self.gifts = int((scratch / "gifts").read_text())
        assert self.gifts > 10

    def run(
        self, out: Path, resume: bool, rank: int, number: int, delay: float | None
    ) -> tuple[bool, int]:
        """A run in which process `rank` is killed at its step `number`, or in none for 0.

        Returns:
            Whether that was so, and the steps of process 0 where none was killed.
        """
        self.mark.unlink(missing_ok=True)

        def lead() -> None:
            signal.alarm(LIMIT)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            tempfile.tempdir = str(self.scratch)  # where a killed one leaves the file of local.py
            torch.set_num_threads(2)  # one each
            launch.LEAVING = 1  # of seconds to wait for one that is gone
            Forked.before = staticmethod(lambda: self.count(number * rank, delay))
            names = {"PIPE": subprocess.PIPE, "TimeoutExpired": subprocess.TimeoutExpired}
            local.subprocess = SimpleNamespace(Popen=Forked, **names)  # type: ignore[assignment]
            code = run_command([*self.words, f"--out={out}", *(["--resume"] * resume)])
            lost = self.mark.exists()  # later than that it may have had nothing left to do
            assert not code or lost, "it failed by itself"
            assert code or not lost or delay is not None, "it went on without the other"

        out.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        killed, steps = forked(lead, out.parent, number * (1 - rank), delay)
        assert time.monotonic() - start < LIMIT, "one of two has waited for the other"
        return killed or self.mark.exists(), steps

    def count(self, number: int, delay: float | None) -> None:
        """Has process 1 count what it gives, and kills it the `number`-th time."""
        gather, given = Processes.gather, 0

        def note(processes: Processes, value: object) -> list:
            nonlocal given
            given += 1
            if given == number:
                self.mark.touch()
                if delay is None:
                    die(0.0)
                threading.Thread(target=die, args=(delay,), daemon=True).start()
            if not number:
                (self.scratch / "gifts").write_text(str(given))
            return gather(processes, value)

        Processes.gather = note  # type: ignore[method-assign, assignment]

    def disturb(self, out: Path, resume: bool, rng: Random) -> str:
        rank = rng.randrange(2)
        steps = self.gifts if rank else self.steps
        number, delay = some_step(steps, rng)
        killed, _ = self.run(out, resume, rank, number, delay)
        return told(f"process {rank} ", killed, number, steps, delay)

    def finish(self, out: Path) -> None:
        killed, _ = self.run(out, True, 0, 0, None)
        assert not killed
