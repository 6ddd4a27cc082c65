"""Runs one program under limits, as a process of its own: `python -I guard.py PROGRAM NBYTES SECONDS FILE_NBYTES`.

Exit code 42: the program ran to its end. It must not import anything of the package: nothing but this file and the
standard library is there. The limits stop accidents (loops, memory, stray files, processes, connections); they are no wall
against a program that means harm.
"""

import os
import runpy
import sys

PASSED = 42  # not 0, so that a program that leaves early with os._exit(0) has not passed
EXITED = 3
BLOCKED = {
    "os.chmod", "os.chown", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.link", "os.mkdir", "os.posix_spawn", "os.remove",
    "os.rename", "os.rmdir", "os.spawn", "os.symlink", "os.system", "os.truncate", "shutil.rmtree", "signal.pthread_kill", "socket.bind",
    "socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen",
}  # fmt: skip


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


def watch(folder: str) -> None:
    """Refuses, from now on, what a pure function has no use for: processes, connections, writing outside `folder`."""
    inside = os.path.realpath(folder) + os.sep

    def hook(event: str, args: tuple) -> None:
        if event in BLOCKED:
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and isinstance(args[0], str | bytes):
            writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and not (os.path.realpath(os.fsdecode(args[0])) + os.sep).startswith(inside):
                raise PermissionError(f"writing {args[0]!r} is not allowed here")

    sys.addaudithook(hook)


def main() -> None:
    """Runs the program and ends the process."""
    program, *numbers = sys.argv[1:]
    sys.dont_write_bytecode = True
    sys.argv = [program]
    limit(*map(int, numbers))
    watch(os.path.dirname(program))
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit:
        os._exit(EXITED)
    os._exit(PASSED)  # at once: threads that the program left behind don't count


if __name__ == "__main__":
    main()
