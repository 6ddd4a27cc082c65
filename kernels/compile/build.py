"""Compiles kernels that were noted down (launch.py) ahead of their first launch: in parallel
processes, each kernel once, under the very key that Triton looks it up by. Needs no GPU. Knows no
kernel by name."""

import hashlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, get_cache_key, make_backend
from triton.runtime import JITFunction, driver
from triton.runtime.cache import get_cache_manager

from kvfold.kernels.compile import kernel_cache
from kvfold.kernels.compile.launch import Launch

try:
    from triton._C.libtriton import get_cache_invalidating_env_vars
except ImportError:  # other releases have it elsewhere
    from triton.compiler.compiler import get_cache_invalidating_env_vars

log = logging.getLogger("kvfold")
START = "import sys; sys.path[:] = sys.argv[1:]; from kvfold.kernels.compile.build_server import main; main()"
TICK = 1.0  # seconds between two looks at the clock
CAPABILITIES = {"sm_80": 80, "sm_86": 86, "sm_89": 89, "sm_90": 90, "sm_100": 100, "sm_120": 120}
MULTIPROCESSORS = {
    80: 108,
    86: 84,
    89: 128,
    90: 132,
    100: 148,
    120: 170,
}  # of the largest device, where none is there to ask


class Job(NamedTuple):
    """A kernel to be compiled, in pieces that another process can put together."""

    module: str
    name: str
    signature: dict[str, Any]
    constants: dict[tuple, Any]
    attrs: dict[tuple, Any]
    options: dict[str, Any]
    target: tuple[str, int, int]
    hash: str  # of Triton's cache

    @property
    def label(self) -> str:
        """The kernel's name, and what tells it from others of that name: short constants, and the
        hash's beginning."""
        function = function_of(self)
        constants = {
            function.arg_names[path[0]]: value
            for path, value in self.constants.items()
            if len(path) == 1
        }
        short = ", ".join(f"{k}={v}" for k, v in constants.items() if len(str(v)) < 12)
        return f"{self.name}[{self.hash[:8]}]({short})"

    @property
    def weight(self) -> int:
        """How long it may take to compile, in no unit: formats are constants, and the code of each
        is unrolled."""
        return sum(len(str(value)) for value in self.constants.values())


class _Target:
    """What JITFunction.run asks of a driver up to the point where it would compile: a driver of a
    device that may not be there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"ahead:{self.target.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0


def target_of(device: torch.device | str) -> GPUTarget:
    """The compiler's target: of a CUDA device, or of an architecture's name.

    Raises:
        KeyError: no such architecture.
    """
    if isinstance(device, str):
        return GPUTarget("cuda", CAPABILITIES[device], 32)
    major, minor = torch.cuda.get_device_capability(device)
    return GPUTarget("cuda", major * 10 + minor, 32)


def jobs_of(launches: Iterable[Launch], target: GPUTarget) -> list[Job]:
    """The distinct kernels of launches, as Triton tells them apart, those that may take longest
    first.

    Each launch goes through JITFunction.run, so that signature, alignments, constants and key are
    Triton's own, and is caught where the compiler would begin. Launches of Triton's interpreter
    compile to nothing.
    """
    backend = make_backend(target)
    env = get_cache_invalidating_env_vars()
    found: dict[str, Job] = {}
    caught: list[tuple] = []
    seen: set[JITFunction] = set()
    before = driver._active
    driver.set_active(_Target(target))
    try:
        for launch in launches:
            kernel = launch.kernel
            if not isinstance(kernel, JITFunction):
                continue
            kernel._do_compile = lambda *args, **kwargs: caught.append(args)
            try:
                kernel.run(*launch.args, grid=(1,), warmup=True, **launch.options)
            finally:
                del kernel._do_compile
            seen.add(kernel)
            for _, signature, _, constants, options, attrs, *_ in caught:
                source = ASTSource(kernel, signature, constants, attrs)
                digest = hashlib.sha256(
                    get_cache_key(source, backend, options, env).encode()
                ).hexdigest()
                found.setdefault(
                    digest,
                    Job(
                        kernel.__module__, kernel.__name__, dict(signature), dict(source.constants), dict(source.attrs),
                        dict(options.__dict__), (target.backend, int(target.arch), target.warp_size), digest,
                    ),
                )  # fmt: skip
            caught.clear()
    finally:
        driver.set_active(before)
        for kernel in seen:
            kernel.device_caches.pop(f"ahead:{target.arch}", None)
    return sorted(found.values(), key=lambda job: -job.weight)


def function_of(job: Job) -> Any:
    """The kernel itself, of a module that this process has imported."""
    return getattr(sys.modules[job.module], job.name)


def is_built(job: Job) -> bool:
    """Whether the kernel is in the cache folder, whole."""
    return bool(get_cache_manager(job.hash).get_group(f"{job.name[:150]}.json"))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Builder:
    """Processes that compile kernels while the caller does something else. A context manager: when
    it is left, none of them is alive.

    One process is started, which forks one for each kernel: a fork of a process without threads,
    device or data, so that starting costs milliseconds and a compiler that crashes takes nothing
    with it. They are a session of their own, so that Ctrl-C reaches the caller alone, which ends
    them; if it is killed, the end of its pipe tells the first process to end all.

    Args:
        jobs: processes that compile at a time; default: one a core.
    """

    def __init__(self, jobs: int | None = None) -> None:
        kernel_cache.install()
        self.limit = jobs or cores()
        self.failed: list[tuple[Job, str]] = []  # and why
        self.compiled = 0
        self.count = self.lost = 0
        self.server: subprocess.Popen | None = None
        self.thread: threading.Thread | None = None
        self.begun = time.monotonic()

    def start(self) -> None:
        """Starts the first process, which takes a moment to import the compiler, before it is known
        what to compile."""
        if self.server is not None:
            return
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the processes
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env[kernel_cache.SPARE] = kernel_cache.spare()
        self.server = subprocess.Popen(
            [sys.executable, "-c", START, *(path or os.getcwd() for path in sys.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=env, start_new_session=True,
        )  # fmt: skip
        assert self.server.stdin is not None and self.server.stdout is not None
        self.requests = Connection(os.dup(self.server.stdin.fileno()), readable=False)
        self.replies = Connection(os.dup(self.server.stdout.fileno()), writable=False)
        self.server.stdin.close()
        self.server.stdout.close()

    def build(self, jobs: Sequence[Job]) -> None:
        """Begins to compile those that the cache folder lacks; returns at once. To be called
        once."""
        self.count = len(jobs)
        missing = [job for job in jobs if knobs.compilation.always_compile or not is_built(job)]
        if not missing:
            self.stop()
            return
        kernel_cache.check_folder()
        self.start()
        self.lost = len(missing)
        self.thread = threading.Thread(target=self._follow, args=(missing,), daemon=True)
        with suppress(OSError):  # it ended: `_follow` says so
            self.requests.send((min(self.limit, len(missing)), [tuple(job) for job in missing]))
        self.thread.start()

    def _follow(self, missing: list[Job]) -> None:
        """Reads what the processes report, and shows it."""
        done = self.count - len(missing)
        log.info(
            "kernels: %d of %d to be compiled by %d processes",
            len(missing),
            self.count,
            min(self.limit, len(missing)),
        )
        form = "kernels: {n_fmt} of {total_fmt} compiled, {elapsed_s:.0f} s"
        left = dict(enumerate(missing))
        with tqdm(total=self.count, initial=done, bar_format=form, disable=None) as bar:
            bar.start_t = time.time() - (time.monotonic() - self.begun)
            while left:
                try:
                    if not self.replies.poll(TICK):
                        bar.refresh()
                        continue
                    number, message = self.replies.recv()
                except (EOFError, OSError):
                    break
                if number < 0:
                    kernel_cache.report(message)
                    continue
                job = left.pop(number)
                if message:
                    self.failed.append((job, message))
                else:
                    self.compiled += 1
                    bar.update()
        self.lost = len(left)
        log.info("kernels: %d compiled in %.1f s", self.compiled, time.monotonic() - self.begun)

    def wait(self) -> None:
        """Returns when all is compiled, or has failed (`failed`)."""
        while self.thread is not None and self.thread.is_alive():
            self.thread.join(TICK)  # in pieces, so that Ctrl-C gets through
        if self.thread is not None and self.lost:
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").strip().splitlines() or [
                "no message"
            ]
            log.warning(
                "%d kernels are compiled at their first use: the compilers ended (%s)",
                self.lost,
                lines[-1],
            )
        self.stop()

    def stop(self) -> None:
        """Ends all processes, whatever they are at."""
        server, self.server = self.server, None
        if server is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        if self.thread is not None:
            self.thread.join()
        self.requests.close()
        self.replies.close()
        self.errors.close()

    def __enter__(self) -> "Builder":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.stop()


def preload(launches: Iterable[Launch]) -> None:
    """Reads the compiled kernels of launches into this process, for the current device: what is
    then launched is looked up nowhere."""
    for launch in launches:
        if isinstance(launch.kernel, JITFunction):
            launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.options)
