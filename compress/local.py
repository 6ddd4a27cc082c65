"""Processes of this machine that `kvfold compress --processes N` starts itself, so that nobody has to
know of torchrun: on a CPU two of half the threads each are faster than one, much of whose work is one
thread's.

The command is process 0. Each further one is the same command, which is led: it says on its stdout
when it is ready, and ends when its stdin does, as it does however process 0 ends. They find each
other by a file in a folder of their own.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from kvfold.compress.launch import STORE
from kvfold.errors import KvfoldError

LED = "KVFOLD_LED"  # set for a process that another has started: its threads
READY = b"ready"
SAYING = 3  # seconds that a process which has failed may take to say why
LEAVING = 10  # seconds that it may take to end


def check_processes(count: int, device: str, read: Sequence[str | None]) -> None:
    """Refuses processes that can't be started here, or would not read the same.

    Args:
        count: processes, this one included.
        device: as in `kvfold compress`.
        read: files that are named, or None.
    Raises:
        KvfoldError: naming the value.
    """
    if count == 1 or os.environ.get(LED):
        return
    if "WORLD_SIZE" in os.environ:
        raise KvfoldError(
            f"--processes {count} starts processes, but WORLD_SIZE is '{os.environ['WORLD_SIZE']}': a launcher has "
            "started this one; leave --processes out."
        )
    if device != "cpu" and (device != "auto" or torch.cuda.is_available()):
        raise KvfoldError(
            f"--processes {count} is for a CPU, but --device {device} is a GPU; give --device cpu, or start one "
            "process a GPU by torchrun."
        )
    threads = torch.get_num_threads()
    if count > threads:
        raise KvfoldError(
            f"--processes {count} is more than the {threads} threads that PyTorch has here (its cores, or "
            f"OMP_NUM_THREADS); give {threads} at the most."
        )
    for name in read:
        if name and (name.startswith(("/dev/", "/proc/")) or Path(name).is_fifo()):
            raise KvfoldError(
                f"'{name}' can be read once, but --processes {count} reads it {count} times; write it to a file first."
            )


@contextlib.contextmanager
def started(count: int, words: Sequence[str]) -> Iterator[None]:
    """A context in which `launch.join` finds this process and those that are started here.

    Args:
        count: processes, this one included.
        words: the command's, for the others.
    Raises:
        KvfoldError: one does not begin.
    """
    if threads := os.environ.get(LED):
        _follow(int(threads))
        yield
        return
    if count == 1:
        yield
        return
    before, each = torch.get_num_threads(), max(1, torch.get_num_threads() // count)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvfold-processes-"))
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, STORE: Path(folder) / "store"}
        if sys.platform == "linux":  # else gloo asks for the address of the host's name
            shared["GLOO_SOCKET_IFNAME"] = "lo"
        shut = stack.enter_context(_stderr_kept())
        led = [
            stack.enter_context(_led({**shared, "RANK": r, "LOCAL_RANK": r, LED: each}, words))
            for r in range(1, count)
        ]
        for process in led:
            assert process.stdout
            if process.stdout.read(len(READY)) != READY:
                raise KvfoldError(
                    f"One of the {count} processes did not begin; look for what it said, or leave --processes out."
                )
        stack.enter_context(_environment({**shared, "RANK": 0, "LOCAL_RANK": 0}))
        torch.set_num_threads(each)
        try:
            yield
        except BaseException:
            if not shut():
                raise
            for process in led:  # another was the first to fail, and says why
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(SAYING)
            raise SystemExit(max([1, *(p.returncode or 0 for p in led)])) from None
        finally:
            torch.set_num_threads(before)


@contextlib.contextmanager
def _environment(variables: Mapping[str, object]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _stderr_kept() -> Iterator[Callable[[], bool]]:
    """Gives stderr back, which a process that is not the first to fail shuts (launch.py); yields what
    says whether it did."""
    kept = os.dup(2)
    try:
        yield lambda: not os.path.samestat(os.fstat(kept), os.fstat(2))
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _led(
    variables: Mapping[str, object], words: Sequence[str]
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that ends with the context."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "kvfold", *words],
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin and process.stdout
    try:
        yield process
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        try:
            process.wait(LEAVING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _follow(threads: int) -> None:
    """Says that this process is ready, and has it end with the one that leads it."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that leads hears it, and ends both
    torch.set_num_threads(threads)
    os.write(1, READY)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    threading.Thread(target=watch, daemon=True).start()
