"""Runs one program under limits, as a process of its own: `python -I guard.py PROGRAM NBYTES
SECONDS FILE_NBYTES`.

A token comes in on stdin, and goes out on stdout if the program ran to its end: no way of ending
the process, and nothing that is printed, says so by itself. It must not import anything of the
package: nothing but this folder and the standard library is there.

Three fences, each where the system has it: audit hooks of Python, what Linux refuses a process
(walls.py), and the namespaces that sandbox.py starts this file in. They stop accidents and what a
model writes without thinking. They are
no wall against a program that means harm: it may read what this user may read, and one that looks
for the token through its own interpreter, or redefines its tests, passes.
"""

import os
import runpy
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any, NoReturn

EXITED = 3
BLOCKED = {
    "fcntl.ioctl", "gc.get_objects", "gc.get_referents", "gc.get_referrers", "os.chflags", "os.chmod", "os.chown",
    "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.lchmod", "os.link", "os.mkdir", "os.posix_spawn",
    "os.remove", "os.removexattr", "os.rename", "os.rmdir", "os.setxattr", "os.spawn", "os.startfile", "os.symlink",
    "os.system", "os.truncate", "os.utime", "pty.spawn", "resource.prlimit", "resource.setrlimit", "shutil.rmtree",
    "signal.pthread_kill", "socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyaddr",
    "socket.gethostbyname", "socket.sendmsg", "socket.sendto", "subprocess.Popen", "sys._current_exceptions",
    "sys._current_frames",
}  # fmt: skip
# call C by themselves, past every event; and what makes processes for subprocess and
# multiprocessing
BLOCKED_MODULES = {
    "_cffi_backend",
    "_ctypes",
    "_ctypes_test",
    "_posixsubprocess",
    "_testcapi",
    "_xxsubinterpreters",
    "cffi",
    "ctypes",
}
# raise no event
UNSEEN = (
    "chroot", "mkfifo", "mknod", "pidfd_open", "posix_openpt", "pidfd_send_signal", "sched_setaffinity",
    "sched_setparam", "sched_setscheduler", "setns", "setpgid", "setpgrp", "setpriority", "setsid", "unshare",
)  # fmt: skip


def limit(nbytes: int, seconds: int, file_nbytes: int) -> None:
    """Limits this process's address space, CPU seconds and written files, where the system can."""
    try:
        import resource
    except ImportError:  # Windows: the parent's timeout is what remains
        return
    limits = {"AS": nbytes, "CPU": seconds, "FSIZE": file_nbytes, "CORE": 0}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            try:
                resource.setrlimit(kind, (value, value))
            except (ValueError, OSError):  # macOS refuses some
                continue


def plain(path: Any) -> str:
    """A path as text; of a subclass of str or bytes the text itself, and not what its methods
    say."""
    path = os.fspath(path)
    return (
        str.__getitem__(path, slice(None))
        if isinstance(path, str)
        else os.fsdecode(bytes.__getitem__(path, slice(None)))
    )


def watch(folder: str) -> None:
    """Refuses, from now on, what a pure function has no use for: processes, connections, writing
    outside `folder`."""
    inside = os.path.realpath(folder) + os.sep
    changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    realpath, is_folder, opens = os.path.realpath, os.path.isdir, ("open", "sqlite3.connect")

    def hook(event: str, args: tuple) -> None:
        if event in BLOCKED or event.startswith("ctypes."):
            raise PermissionError(f"{event} is not allowed here")
        if event == "import" and args[0].rpartition(".")[2] in BLOCKED_MODULES:
            raise ImportError(f"import of {args[0]} is not allowed here")
        if event in opens and not isinstance(args[0], int):
            path = realpath(plain(args[0]))
            if event != "open":
                writes = args[0] != ":memory:"
            else:
                writes = args[2] & changes
                if path.startswith("/proc/") and path.endswith("/mem"):
                    raise PermissionError(f"reading {path!r} is not allowed here")
                if args[1] is None and is_folder(
                    path
                ):  # to open files relative to it, which no event would tell
                    raise PermissionError(f"opening the folder {path!r} is not allowed here")
            if writes and not (path + os.sep).startswith(inside):
                raise PermissionError(f"writing {path!r} is not allowed here")

    def refuse(*args: Any, **options: Any) -> NoReturn:
        raise PermissionError("this is not allowed here")

    import signal
    import subprocess  # now, since it can't be imported any more without _posixsubprocess

    for module in (os, sys.modules[os.name], signal, sys.modules["_signal"]):
        for name in UNSEEN:
            if hasattr(module, name):
                setattr(module, name, refuse)
    if hasattr(subprocess, "_fork_exec"):
        subprocess._fork_exec = refuse
    for name in BLOCKED_MODULES:
        sys.modules.pop(name, None)
    sys.addaudithook(hook)


def supervise(child: int) -> NoReturn:
    """Waits for the program's process and ends as it did, or with 128 + its signal: the first
    process of a namespace can't end by one."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def steps(program: str, verdict: int) -> tuple[list[Any], list[dict]]:
    """The program, and what says that it came to its end; each as code and the namespace that it
    runs in."""
    token = b""
    while part := os.read(0, 64):
        token += part
    last: dict[str, Callable[..., Any] | int | bytes] = {
        "write": os.write,
        "exit": os._exit,
        "verdict": verdict,
        "token": token,
    }
    main = ModuleType("__main__")
    main.__file__ = program
    sys.modules["__main__"] = main
    with open(program, "rb") as stream:
        code = compile(stream.read(), program, "exec")
    return [code, "write(verdict, token); exit(0)"], [
        main.__dict__,
        last,
    ]  # at once: threads that are left behind don't count


def main() -> None:
    """Runs the program and ends the process."""
    program, *numbers = sys.argv[1:]
    sys.dont_write_bytecode = True
    sys.argv = [program]
    verdict, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    if hasattr(os, "fork") and (child := os.fork()):
        os.close(verdict)
        supervise(child)
    limit(*map(int, numbers))
    if sys.platform == "linux":
        walls = os.path.join(os.path.dirname(os.path.abspath(__file__)), "walls.py")
        with suppress(ImportError, OSError, AttributeError):  # no ctypes, another libc
            runpy.run_path(walls)["put_up"](os.path.dirname(program))
    run(program, verdict)


def run(program: str, verdict: int) -> None:
    """Runs the program. No name in a frame below it, where it may look, holds the token."""
    try:
        deque(map(exec, *begin(program, verdict)), maxlen=0)
    except SystemExit:
        os._exit(EXITED)


def begin(program: str, verdict: int) -> tuple[list[Any], list[dict]]:
    """`steps`, and then the watch over the first of them."""
    found = steps(program, verdict)
    watch(os.path.dirname(program))
    return found


if __name__ == "__main__":
    main()
