"""The process of kernels.compile.build that compiles: it forks one process for each kernel, and
ends all of them when its caller is gone."""

import gc
import importlib
import os
import selectors
import shutil
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, compile
from triton.runtime.cache import triton_key

from kvfold.kernels.compile import kernel_cache
from kvfold.kernels.compile.launch import settle

CACHE = -1  # in place of a job's number: the message is about the cache folder
SEPARATOR = b"\0"


def compile_job(job: tuple) -> None:
    """Compiles one kernel, given as a kernels.compile.build.Job's fields, and its launcher where
    Triton needs a compiler for that too."""
    module, name, signature, constants, attrs, options, target, _ = job
    function = getattr(importlib.import_module(module), name)
    found = compile(
        ASTSource(function, signature, constants, attrs), target=GPUTarget(*target), options=options
    )
    build_launcher(found)


def build_launcher(kernel: Any) -> None:
    """Up to 3.6 Triton compiles a C function for each signature when it is first launched, half a
    second each; it needs CUDA's library."""
    try:
        backends["nvidia"].driver().launcher_cls(kernel.src, kernel.metadata)
    # no such library here, where kernels are compiled for another machine: it is done at the first
    # launch
    except BaseException:
        return


class Server:
    """Jobs that wait, and those that run, one process each.

    Args:
        limit: processes at a time.
        jobs: fields of kernels.compile.build.Job.
        reply: is told (number of a job, why it failed or "").
    """

    def __init__(
        self, limit: int, jobs: list[tuple], reply: Callable[[tuple[int, str]], None]
    ) -> None:
        self.limit, self.jobs, self.reply = limit, jobs, reply
        self.waiting = list(range(len(jobs) - 1, -1, -1))
        self.running: dict[int, tuple[int, int]] = {}  # pipe → number of the job, process

    def fill(self, watched: selectors.BaseSelector) -> None:
        """Starts as many as may run."""
        while self.waiting and len(self.running) < self.limit:
            number = self.waiting.pop()
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                _run(self.jobs[number], writer)
            os.close(writer)
            self.running[reader] = number, pid
            watched.register(reader, selectors.EVENT_READ)

    def collect(self, reader: int, watched: selectors.BaseSelector) -> None:
        """Reads what one that has ended left."""
        watched.unregister(reader)
        with os.fdopen(reader, "rb") as file:
            told = file.read()
        number, pid = self.running.pop(reader)
        _, status = os.waitpid(pid, 0)
        message, _, fault = told.partition(SEPARATOR)
        if fault:
            self.reply((CACHE, fault.decode(errors="replace")))
        if status and not message:
            code = os.waitstatus_to_exitcode(status)
            message = f"the compiler ended with {signal.Signals(-code).name if code < 0 else code}".encode()
        self.reply((number, message.decode(errors="replace")))


def _run(job: tuple, writer: int) -> None:
    """A fork's whole life."""
    faults: list[str] = []
    kernel_cache.report = faults.append
    message = ""
    try:
        compile_job(job)
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        message = f"{type(error).__name__}: {lines[-1]}".strip()
    os.write(
        writer, message.encode()[:2048] + (SEPARATOR + faults[0].encode()[:512] if faults else b"")
    )
    os._exit(1 if message else 0)


def main() -> None:
    """Reads (limit, jobs) from stdin once, replies on stdout, and lives until stdin ends; then
    nothing of its session is left."""
    requests, replies = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 0)
    os.dup2(2, 1)  # what compilers print is no reply
    kernel_cache.install()
    triton_key()  # a hash of all of Triton, once instead of once a fork
    try:
        limit, jobs = requests.recv()
        for module, name in {job[:2] for job in jobs}:
            settle(getattr(importlib.import_module(module), name))
        gc.freeze()
        server = Server(limit, jobs, replies.send)
        with selectors.DefaultSelector() as watched:
            watched.register(requests, selectors.EVENT_READ)
            while True:
                server.fill(watched)
                for key, _ in watched.select():
                    if key.fd == requests.fileno():
                        raise EOFError
                    server.collect(key.fd, watched)
    except (EOFError, OSError):
        pass
    finally:  # the caller is gone: it would else have ended this process first
        shutil.rmtree(os.environ.get(kernel_cache.SPARE, ""), ignore_errors=True)
        if os.getpgid(0) == os.getpid():  # never the group of somebody who runs this by hand
            os.killpg(0, signal.SIGKILL)
        sys.exit(0)
