"""Runs code that a model wrote: a process of its own, with limits and a folder that is gone afterwards."""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvfold.compress.tasks.guard import EXITED, PASSED

TIMEOUT = 5.0  # seconds of wall clock
NBYTES = 1 << 30  # of address space
FILE_NBYTES = 16 << 20  # of any file written, what is printed included


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and if not, why in a few words."""

    passed: bool
    how: str


def run_program(program: str, timeout: float = TIMEOUT, nbytes: int = NBYTES) -> Outcome:
    """Runs Python source with `python -I` in an empty folder, without input, environment or inherited files.

    Args:
        program: source; it passes if it ends without an exception and does not exit by itself.
        timeout: seconds of wall clock; CPU time is limited to the next whole second above.
        nbytes: of address space.
    """
    with tempfile.TemporaryDirectory(prefix="kvfold-", ignore_cleanup_errors=True) as folder:
        path, errors = Path(folder) / "program.py", Path(folder) / "stderr"
        path.write_text(program, encoding="utf-8", errors="replace")
        command = [sys.executable, "-I", str(Path(__file__).with_name("guard.py")), str(path)]
        command += [str(nbytes), str(int(timeout) + 1), str(FILE_NBYTES)]
        # BLAS libraries reserve address space for every core's thread
        environment = {"HOME": folder, "TMPDIR": folder, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        return Outcome(code == PASSED, _describe(code, errors, timeout))


def _end(process: subprocess.Popen) -> None:
    """Ends the process and whatever it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _describe(code: int | None, errors: Path, timeout: float) -> str:
    if code is None:
        return f"timed out after {timeout:g} s"
    if code == PASSED:
        return "passed"
    if code == EXITED:
        return "exited"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = errors.read_bytes()[-4096:].decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:200] if lines else f"exit code {code}"
