"""The processes of prepared.py that have imported something and fork for each job.

usage: python prepared_server.py FOLDER KIND

It listens on FOLDER/KIND, says "ready" once, and ends when the last of its leases is gone, which are
connections without a job. A kind that goes on from another is forked from that one's process.
"""

import atexit
import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

LARGEST = 1 << 20  # bytes of a job


class Server:
    """One process and what it waits for: connections, and the ends of those that it forked.

    Attributes:
        forked: servers of other kinds.
        leases: connections of those who want it to stay.
        jobs: process → the connection that is told how it ended.
    """

    def __init__(self, folder: str, kind: str, begun: str, kinds: dict[str, Any]) -> None:
        self.folder, self.kind, self.kinds = folder, kind, kinds
        exec(kinds[kind]["prepare"], {"__name__": "prepared"})
        assert not begun or self.kinds[kind]["after"] == begun
        gc.collect()
        gc.freeze()
        self.forked: list[int] = []
        self.leases: list[socket.socket] = []
        self.jobs: dict[int, socket.socket] = {}
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(os.path.join(folder, kind))
        self.listening.listen(64)
        self.woken, waking = os.pipe()
        os.set_blocking(waking, False)
        self.waking = waking
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waking)

    def run(self) -> None:
        """Until nobody has a lease any more."""
        had = False
        while not had or self.leases:
            watched = [self.listening.fileno(), self.woken, *(x.fileno() for x in self.leases)]
            for found in select.select(watched, [], [])[0]:
                if found == self.listening.fileno():
                    self.accept()
                elif found == self.woken:
                    os.read(found, 512)
                    self.reap()
                else:  # a lease has nothing to say but that it ends
                    [gone] = [x for x in self.leases if x.fileno() == found]
                    gone.close()
                    self.leases.remove(gone)
            had = had or bool(self.leases)
        for child in self.forked:  # so that their time is counted as this one's
            with suppress(ChildProcessError):
                os.waitpid(child, 0)
        os.unlink(os.path.join(self.folder, self.kind))
        if not any(os.path.exists(os.path.join(self.folder, kind)) for kind in self.kinds):
            shutil.rmtree(self.folder, ignore_errors=True)

    def accept(self) -> None:
        connection, _ = self.listening.accept()
        data, fds, _, _ = socket.recv_fds(connection, LARGEST, 3)
        while data and not data.endswith(b"\n"):
            data += connection.recv(LARGEST)
        if not data:
            connection.close()
            return
        job = json.loads(data)
        if "lease" in job:
            self.leases.append(connection)
            connection.sendall(b"held\n")
            return
        child = os.fork()
        if child == 0:
            self.leave(connection if "fork" in job else None)
            if "fork" in job:
                self.become(job["fork"], connection)
            work(job, fds)
        for fd in fds:
            os.close(fd)
        if "fork" in job:
            connection.close()
            self.forked.append(child)
            return
        self.jobs[child] = connection
        connection.sendall(f"{child}\n".encode())

    def reap(self) -> None:
        """Tells how those have ended that have."""
        while True:
            try:
                child, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if child == 0:
                return
            connection = self.jobs.pop(child, None)
            if connection:
                with connection, suppress(OSError):  # of those for whom nobody waits
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())

    def leave(self, kept: socket.socket | None) -> None:
        """In a fork: what is the server's own is closed."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for x in (self.listening, *self.leases, *self.jobs.values()):
            if x is not kept:
                x.close()
        os.close(self.woken)
        os.close(self.waking)

    def become(self, kind: str, connection: socket.socket) -> NoReturn:
        """In a fork: the server of another kind, which lives as long as whoever holds its leases."""
        gc.disable()
        code = 1
        try:
            server = Server(self.folder, kind, self.kind, self.kinds)
            connection.sendall(b"ready\n")
            connection.close()
            server.run()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)


def work(job: dict[str, Any], fds: list[int]) -> NoReturn:
    """A job's whole life."""
    code = 1
    try:
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            if fd > 2:
                os.close(fd)
        if job["session"]:
            os.setsid()
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["env"])
        gc.enable()
        sys.argv = ["-c", *job["args"]]
        scope = {"__name__": "__main__", "__builtins__": __builtins__}
        exec(compile(job["code"], "<string>", "exec"), scope)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in sys.stdout, sys.stderr:
        stream.flush()
    os._exit(code)  # taking apart what was imported takes a second


def main() -> None:
    gc.disable()
    folder, kind, kinds = sys.argv[1:]
    server = Server(folder, kind, "", json.loads(Path(kinds).read_text()))
    print("ready", flush=True)
    server.run()
    os._exit(0)


if __name__ == "__main__":
    main()
