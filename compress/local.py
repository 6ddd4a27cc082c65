"""Processes of this machine that `kvfold compress` starts itself on a CPU, so that nobody has to know
of torchrun: two of half the threads each are faster than one, much of whose work is one thread's.

The command is process 0. Each further one is the same command, which is led: it says on its stdout
when it is ready, and ends when its stdin does, as it does however process 0 ends.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from kvfold.errors import KvfoldError
from kvfold.memory import memory_left

USUAL = 2  # processes; each reads the model's weights
# bytes of weights, below which another process takes longer to begin than it saves
LEAST_NBYTES = 64 << 20
LEAST_LEFT = 8 << 30  # bytes of memory; and as many times the weights' files as there are here
TIMES = 8  # two copies in float32, of files in 16 bits, in half of the memory
LED = "KVFOLD_LED"  # set for a process that another has started
READY = b"ready"
LEAVING = 10  # seconds that a process that was led may take to end


def count_of(asked: int | None, model: str, device: str) -> int:
    """How many processes are to compress a model, this one included.

    Args:
        asked: --processes; None for a number that is fit.
        model, device: as in `kvfold compress`.
    Raises:
        KvfoldError: several are asked for where they can't be started.
    """
    launched = os.environ.get("WORLD_SIZE", "1") != "1"
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if asked is None:
        fit = on_cpu and not launched and torch.get_num_threads() >= USUAL and _is_worth(model)
        return USUAL if fit else 1
    if asked > 1 and launched:
        raise KvfoldError(
            f"--processes {asked} starts processes, but WORLD_SIZE is '{os.environ['WORLD_SIZE']}': this one was "
            "started with others already; leave --processes out."
        )
    if asked > 1 and not on_cpu:
        raise KvfoldError(
            f"--processes {asked} is for a CPU, but the device is '{device}'; start one process a GPU by torchrun."
        )
    return asked


def _is_worth(model: str) -> bool:
    """Whether a model's weights are worth a second process, and there is room for both; of what is
    not on this disk the size is unknown.

    --max-memory is not asked: how many processes there are decides how many threads each has, and
    so the artifact's last bits.
    """
    path, left = Path(model), memory_left()
    try:
        files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.bin")]
        nbytes = sum(file.stat().st_size for file in files)
        known = path.exists()
    except OSError:
        return False
    room = left is None or left[0] >= max(LEAST_LEFT, TIMES * nbytes)
    return room and (not known or nbytes >= LEAST_NBYTES)


@contextlib.contextmanager
def started(count: int, words: Sequence[str]) -> Iterator[None]:
    """A context in which `launch.join` finds this process and those that are started here.

    Where one can't be started, this process goes on alone.

    Args:
        count: processes, this one included.
        words: the command's, for the others.
    """
    if os.environ.get(LED):
        _follow()
    if count == 1:
        yield
        return
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        try:
            own = _start(stack, count, words, max(1, threads // count))
        except OSError:
            own = None
        if own is None:
            stack.close()
            yield
            return
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        torch.set_num_threads(max(1, threads // count))
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _start(
    stack: contextlib.ExitStack, count: int, words: Sequence[str], threads: int
) -> dict[str, str] | None:
    """Starts the others; `launch.join`'s variables of this process, None if one does not begin."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    if sys.platform == "linux":  # else gloo asks for the address of the host's name
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    led = []
    for rank in range(1, count):
        own = {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": threads, LED: 1}
        led.append(stack.enter_context(_led({**shared, **own}, words)))
    for process in led:
        assert process.stdout
        if process.stdout.read(len(READY)) != READY:
            return None
    return {name: str(value) for name, value in {**shared, "RANK": 0, "LOCAL_RANK": 0}.items()}


@contextlib.contextmanager
def _led(variables: dict[str, object], words: Sequence[str]) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that ends with the context."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kvfold", *words],
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


def _follow() -> None:
    """Says that this process is ready, and has it end with the one that leads it."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    os.write(1, READY)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    threading.Thread(target=watch, daemon=True).start()
