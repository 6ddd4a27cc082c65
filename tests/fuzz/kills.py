"""Runs killed at random moments, over an older artifact too: what stands there then is whole, and
--resume ends with the same bytes. `make kills` tries 40 points, each fourth of them with two processes
(pairs.py).

A moment is counted in what the run does to files: the child that is forked for a run gets SIGKILL
when it begins its n-th such step, or a random part of a hundredth of a second later, in the middle
of whatever it does then.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from conftest import TINY_RECIPE, save_tiny

from fuzz.works import CHAT, WORDS, sums
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.exports.reader import read_artifact
from kvfold.exports.scratch import OLD

STEPS = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.truncate",
    "shutil.rmtree",
}
REMOVALS = {"os.remove", "os.rmdir"}  # of whole folders: by names inside them
DELAY = 0.01  # seconds


def forked(
    run: Callable[[], None], folder: Path, number: int, delay: float | None
) -> tuple[bool, int]:
    """Calls `run` in a child that is killed at step `number` in `folder`, or `delay` seconds behind
    it.

    Returns:
        Whether it was killed, and, if not, the steps that there were.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        code = 1
        try:
            place, count, own = str(folder), 0, os.getpid()

            def note(event: str, args: tuple) -> None:
                nonlocal count
                if event not in STEPS or not (
                    str(args[0]).startswith(place) or (event in REMOVALS and args[-1] != -1)
                ):
                    return
                if os.getpid() != own:  # a process that it has started
                    return
                count += 1
                if count == number and delay is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                elif count == number:
                    threading.Thread(target=die, args=(delay,), daemon=True).start()

            sys.addaudithook(note)
            torch.set_num_threads(1)  # the parent's pool of threads is none of the child's
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            run()
            os.write(write, str(count).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with open(read, "rb") as stream:
        steps = stream.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True, 0
    assert os.WEXITSTATUS(status) == 0, "the run failed by itself"
    return False, int(steps)


def die(delay: float) -> None:
    """Kills this process, `delay` seconds later."""
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


def some_step(steps: int, rng: Random) -> tuple[int, float | None]:
    """A step, from 1 on, and seconds behind it or None."""
    return rng.randrange(1, steps + 1), rng.choice((None, rng.random() * DELAY))


def told(who: str, killed: bool, number: int, steps: int, delay: float | None) -> str:
    """What has been done, in words."""
    said = f", {who}{'killed' if killed else 'ended'} at step {number} of {steps}"
    return said + ("" if delay is None else f" + {1000 * delay:.1f} ms")


class Kills:
    """A model to compress, what becomes of it undisturbed, and an older artifact of fewer bits."""

    def __init__(self, scratch: Path) -> None:
        self.model, self.text, recipe = (
            save_tiny(scratch / "model"),
            scratch / "text.txt",
            scratch / "recipe.yaml",
        )
        (self.model / "chat_template.jinja").write_text(CHAT)
        self.text.write_text("".join(WORDS[i % 40 :] for i in range(60)))
        recipe.write_text(TINY_RECIPE)
        self.recipe: Any = load_recipe(recipe)
        self.old = scratch / "older"
        self.compress(self.old, budget="6.0")
        whole = scratch / "whole" / "tiny"
        killed, self.steps = forked(lambda: self.compress(whole), whole.parent, 0, None)
        assert not killed and self.steps > 50
        self.wanted, self.before = sums(whole), sums(self.old)

    def compress(self, out: Path, resume: bool = False, budget: str = "4.0") -> None:
        compress(
            str(self.model), budget, out, calib=str(self.text), recipe=self.recipe, resume=resume
        )

    def disturb(self, out: Path, resume: bool, rng: Random) -> str:
        """Kills a run at a random step, and says at which."""
        number, delay = some_step(self.steps, rng)
        killed, _ = forked(lambda: self.compress(out, resume), out.parent, number, delay)
        return told("", killed, number, self.steps, delay)

    def finish(self, out: Path) -> None:
        """Resumes, undisturbed."""
        self.compress(out, resume=True)

    def point(self, folder: Path, rng: Random) -> str:
        """Kills a run, and at times the one that resumes it, and lets the next one finish.

        Returns:
            Where that was.
        """
        out, over = folder / "tiny", rng.random() < 0.5
        folder.mkdir(parents=True)
        if over:
            shutil.copytree(self.old, out)
        said = "over an artifact" if over else "into nothing"
        for resume in (False, True)[: rng.choice((1, 1, 2))]:
            said += self.disturb(out, resume, rng)
            kept = [path / OLD for path in folder.iterdir() if (path / OLD).is_dir()]
            if out.exists() or over:  # the older one, moved away, or the new one
                assert sums(out if out.exists() else kept[0]) in (self.before, self.wanted), said
        self.finish(out)
        read_artifact(out)
        assert sums(out) == self.wanted, said
        for left in (
            folder.iterdir()
        ):  # an older artifact that was moved away is kept rather than guessed about
            assert left == out or left.name.startswith("tiny.part-"), said
            # and so is an empty folder, which nothing says who made
            if left != out and any(left.iterdir()):
                assert sums(left / OLD) == self.before, said
        return said


def main() -> int:
    """The command line."""
    from fuzz.pairs import Pairs  # which is made of this module

    parser = argparse.ArgumentParser(prog="make kills", description=__doc__)
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvfold-kills-") as folder:
        scratch = Path(folder)
        kills = Kills(scratch / "made")
        pairs = Pairs(kills, scratch / "pairs")
        for number in range(options.points):
            print(
                number,
                (pairs if number % 4 == 3 else kills).point(
                    scratch / str(number), Random(f"{options.seed}.{number}")
                ),
                flush=True,
            )
    print(f"seed {options.seed}: {options.points} of {options.points} resumed to the same bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
