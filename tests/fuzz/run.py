"""Runs cases: each within limits of time and memory, and counts what became of them."""

import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from shutil import rmtree
from typing import Any, Protocol

from kvfold import KvfoldError

MOST_SECONDS = 5.0  # of a case on a machine with other work; a second on one without
MOST_NBYTES = 256 << 20  # that a case may take more than there was


class Target(Protocol):
    """One kind of input."""

    name: str

    def make(self, folder: Path, rng: Random) -> tuple[str, Any]: ...

    def check(self, folder: Path, made: Any, rng: Random) -> str: ...


class TooLong(BaseException):
    """A case has not ended in time; nothing that expects errors takes it for one."""


@dataclass
class Report:
    """What became of cases: how often each outcome came, and a line for each that failed."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TooLong in the block when it has lasted so long."""

    def stop(number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_nbytes(restart: bool = False) -> int:
    """The most memory that this process has held since the last restart; 0 where the system doesn't
    say."""
    try:
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0
    )


def run_case(
    target: Target,
    seed: int,
    number: int,
    scratch: Path,
    report: Report,
    slow: float = MOST_SECONDS,
) -> None:
    """Makes case `number` of a seed in a folder of its own and reads it."""
    rng = Random(f"{seed}.{number}.{target.name}")
    folder = scratch / f"{target.name}-{number}"
    folder.mkdir(parents=True)
    what, fault, outcome = "", "", ""
    before, start = peak_nbytes(restart=True), time.perf_counter()
    try:
        what, made = target.make(folder, rng)
        before, start = peak_nbytes(restart=True), time.perf_counter()
        with limited(slow):
            outcome = target.check(folder, made, rng)
    except KvfoldError as error:
        outcome, text = "refused", str(error)
        if "\n" in text or not text.endswith((".", ")", "'")):
            fault = f"no sentence: {text!a}"
    except TooLong:
        fault = f"not ended in {slow:.0f} s"
    except Exception as error:
        frames = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if "site-packages" not in f.filename
        ]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-3:]))
        fault = f"{type(error).__name__}: {str(error)[:160]!a} at {where}"
    seconds, nbytes = time.perf_counter() - start, peak_nbytes() - before
    if not fault and nbytes > MOST_NBYTES:
        fault = f"took {nbytes >> 20} MiB"
    report.outcomes["failed" if fault else outcome] += 1
    report.slowest = max(report.slowest, (seconds, f"{target.name} {number}: {what}"))
    if fault:
        report.failures.append(f"{target.name} {number} ({what}): {fault}")
    rmtree(folder, ignore_errors=True)


def pick(targets: Sequence[Target], shares: Sequence[int], seed: int, number: int) -> Target:
    """The target of a case."""
    return Random(f"{seed}.{number}").choices(targets, shares)[0]
