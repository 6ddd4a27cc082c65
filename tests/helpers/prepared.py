"""Processes of their own that begin with what a test needs already imported: PyTorch and
transformers take seconds to import, and another second to be taken apart at the end.

A process of each kind imports once for all workers of a run, and forks for each piece of code
(prepared_server.py). What is tested must not be an import, what is read when something is imported
(HF_HUB_OFFLINE, for all but the kind "torch", and the like), or how an interpreter ends: such code
gets a process of Python's own.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

# what transformers imports of others: neither it nor huggingface_hub is among that
TORCH = (
    "import torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor, torch.export\n"
    "import numpy, scipy.optimize, scipy.stats, sys\n"
    "assert not {'huggingface_hub', 'transformers'} & set(sys.modules)\n"
)
MODELS = (
    "import torch\nfrom transformers import AutoModelForCausalLM, LlamaForCausalLM, DynamicCache\n"
)
OURS = (
    MODELS + "import kvfold.compress.cli, kvfold.compress.evaluate, kvfold.compress.pipeline\n"
    "import kvfold.exports.page.plots, kvfold.runtime\n"
)
# what each has imported, and the kind that it goes on from or the variables of a process of its own
KINDS: dict[str, dict[str, Any]] = {
    "torch": {"prepare": TORCH, "after": "", "env": {}},
    "transformers": {"prepare": MODELS, "after": "torch", "env": {}},
    "kvfold": {"prepare": OURS, "after": "transformers", "env": {}},
    "compiler": {
        "prepare": OURS + "import compile_ahead, compile_kernels\n", "after": "",
        "env": {"TRITON_INTERPRET": "0"},
    },
}  # fmt: skip
_leases: dict[str, socket.socket] = {}


class Process:
    """A job that runs, with what subprocess.Popen has of it.

    Attributes:
        stdin, stdout, stderr: where asked for; text.
    """

    def __init__(self, connection: socket.socket, ends: dict[str, IO[str] | None]) -> None:
        self.told = connection.makefile("r")
        self.connection = connection
        self.pid = int(self.told.readline())
        self.returncode: int | None = None
        self.stdin, self.stdout, self.stderr = (ends[x] for x in ("stdin", "stdout", "stderr"))

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            self.returncode = int(self.told.readline())
            self.told.close()
            self.connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *args: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


def start(
    kind: str,
    code: str,
    *args: object,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    session: bool = False,
    **streams: int | IO[Any],
) -> Process:
    """What `python -c code args…` is, in a process that has imported what KINDS has for `kind`.

    Args:
        env: variables beside this process's own; None takes one away.
        session: whether it is to have one of its own.
        streams: stdin, stdout, stderr: a file, or subprocess.PIPE; default: nothing.
    """
    folder = _hold(kind)
    given: list[int] = []
    ours: list[int] = []
    ends: dict[str, IO[str] | None] = {}
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream, ends[name] = streams.get(name, subprocess.DEVNULL), None
        if stream == subprocess.PIPE:
            pair = os.pipe()
            own, mode = (pair[1], "w") if number == 0 else (pair[0], "r")
            given.append(pair[0] if number == 0 else pair[1])
            ends[name] = open(own, mode)  # noqa: SIM115 - the process's
            ours.append(given[-1])
        elif stream == subprocess.DEVNULL:
            given.append(os.open(os.devnull, os.O_RDWR))
            ours.append(given[-1])
        else:
            given.append(stream if isinstance(stream, int) else stream.fileno())
    variables = {**_environment(kind), **(env or {})}
    job = {
        "code": code, "args": [*map(str, args)], "cwd": str(cwd or Path.cwd()), "session": session,
        "env": {name: value for name, value in variables.items() if value is not None},
    }  # fmt: skip
    connection = _connect(folder / kind)
    data = json.dumps(job).encode() + b"\n"
    sent = socket.send_fds(connection, [data], given)
    connection.sendall(data[sent:])
    for fd in ours:
        os.close(fd)
    return Process(connection, ends)


def python(
    kind: str,
    code: str,
    *args: object,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """What `python -c code args…` gives, as `start` runs it."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        found = start(kind, code, *args, env=env, cwd=cwd, stdout=out, stderr=err).wait()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess([kind, *args], found, out.read(), err.read())


def alone(code: str) -> str:
    """Code for an interpreter of its own that imports much, without the look for garbage among that
    and without taking it apart at the end."""
    end = "import os, sys; sys.stdout.flush(); sys.stderr.flush(); os._exit(0)"
    return f"import gc; gc.disable()\n{code}\n{end}\n"


def command(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """What `kvfold args…` gives."""
    return python("kvfold", "from kvfold.__main__ import main; main()", *args, **options)


def _environment(kind: str) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **KINDS[kind]["env"]}
    return {**os.environ, **own}


def only(variables: Mapping[str, str]) -> dict[str, str | None]:
    """`env` of a process that has these variables and no others of this one."""
    return {**dict.fromkeys(os.environ), **variables}


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


@cache
def _folder() -> Path:
    """Of the run's sockets, whose paths may hardly have a hundred letters."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return Path(tempfile.mkdtemp(prefix="kvfold-tests-"))
    folder = Path(tempfile.gettempdir()) / f"kvfold-tests-{run[:12]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _hold(kind: str) -> Path:
    """The folder of sockets, among them that of `kind`, which stays until this process ends."""
    folder = _folder()
    if kind in _leases:
        return folder
    with FileLock(folder / f"{kind}.lock"):
        try:
            lease = _connect(folder / kind)
        except OSError:
            _begin(folder, kind)
            lease = _connect(folder / kind)
        lease.sendall(b'{"lease": 1}\n')
        assert lease.recv(5) == b"held\n", kind
    _leases[kind] = lease
    return folder


def _begin(folder: Path, kind: str) -> None:
    """Starts the process of a kind."""
    (folder / kind).unlink(missing_ok=True)
    after = KINDS[kind]["after"]
    if after:
        with _connect(_hold(after) / after) as connection:
            connection.sendall(json.dumps({"fork": kind}).encode() + b"\n")
            assert connection.makefile().readline() == "ready\n", kind
        return
    kinds = folder / f"{kind}.json"  # its own: two may begin at once
    kinds.write_text(json.dumps(KINDS))
    program = Path(__file__).with_name("prepared_server.py")
    server = subprocess.Popen(
        [sys.executable, str(program), str(folder), kind, str(kinds)],
        env=_environment(kind),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout and server.stdout.readline() == "ready\n", kind
    atexit.register(_end, server)


@atexit.register
def _release() -> None:
    for lease in _leases.values():
        lease.close()


def _end(server: subprocess.Popen) -> None:
    """Waits for the end of a process that other workers may still hold, so that its time is counted
    as this one's."""
    _release()
    with suppress(subprocess.TimeoutExpired):
        server.wait(60)
