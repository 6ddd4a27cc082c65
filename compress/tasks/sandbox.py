"""Runs code that a model wrote: a process of its own, with limits and a folder that is gone
afterwards."""

import functools
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvfold.compress.tasks.guard import EXITED

GUARD = Path(__file__).with_name("guard.py")
TIMEOUT = 5.0  # seconds of wall clock
NBYTES = 1 << 30  # of address space
ENDING = 2.0  # seconds for killed processes to be gone
FILE_NBYTES = 16 << 20  # of any file written, what is printed included
# no network, other users, other processes; what is left when the first process ends is ended by the
# kernel
NAMESPACES = (
    "--user",
    "--map-root-user",
    "--net",
    "--ipc",
    "--uts",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and if not, why in a few words."""

    passed: bool
    how: str


@functools.cache
def namespaces() -> tuple[str, ...]:
    """The command (util-linux' `unshare`) that starts another one in namespaces of its own; empty
    where this system has or allows none."""
    command = shutil.which("unshare") if sys.platform == "linux" else None
    if command is None:
        return ()
    with suppress(OSError, subprocess.TimeoutExpired):
        tried = subprocess.run(
            [command, *NAMESPACES, sys.executable, "-I", "-S", "-c", ""],
            capture_output=True,
            timeout=30,
        )
        if tried.returncode == 0:
            return (command, *NAMESPACES)
    return ()


def run_program(program: str, timeout: float = TIMEOUT, nbytes: int = NBYTES) -> Outcome:
    """Runs Python source with `python -I` in an empty folder, without input, environment or
    inherited files.

    Args:
        program: source; it passes if it ends without an exception and does not exit by itself. What
            says so is a token that nobody can guess, so neither an exit code nor anything that is
            printed does.
        timeout: seconds of wall clock; CPU time is limited to the next whole second above.
        nbytes: of address space.
    """
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory(prefix="kvfold-", ignore_cleanup_errors=True) as folder:
        path, errors = Path(folder) / "program.py", Path(folder) / "stderr"
        path.write_text(program, encoding="utf-8", errors="replace")
        command = [*namespaces(), sys.executable, "-I", str(GUARD), str(path)]
        command += [str(nbytes), str(int(timeout) + 1), str(FILE_NBYTES)]
        # BLAS libraries reserve address space for every core's thread
        environment = {
            "HOME": folder,
            "TMPDIR": folder,
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
            try:
                verdict = _wait(process, token, timeout)
                code: int | None = process.returncode
            finally:
                _end(process)
        passed = verdict == token
        return Outcome(passed, "passed" if passed else _describe(code, errors, timeout))


def _wait(process: subprocess.Popen, token: bytes, timeout: float) -> bytes:
    """Hands the token over and waits; returns what came out, at most one byte more than a token."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(token)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout)
        os.set_blocking(
            process.stdout.fileno(), False
        )  # something that was left behind may hold the other end
        return process.stdout.read(len(token) + 1) or b""
    return b""


def _end(process: subprocess.Popen) -> None:
    """Ends the process and whatever it started, and waits until none of them holds the other end of
    its output."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    assert process.stdout is not None
    with process.stdout as stream, suppress(OSError):
        last = time.monotonic() + ENDING
        while select.select([stream], [], [], max(0.0, last - time.monotonic()))[0] and os.read(
            stream.fileno(), 1 << 16
        ):
            pass


def _describe(code: int | None, errors: Path, timeout: float) -> str:
    if code is None:
        return f"timed out after {timeout:g} s"
    if code == EXITED:
        return "exited"
    code = -code if code < 0 else code - 128  # of this process, of the program's
    if code > 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(code).name}"
    lines = errors.read_bytes()[-4096:].decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:200] if lines else f"exit code {code + 128}"
