"""Programs of a model: passing, failing, endless, greedy, prying."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from kvfold.compress.tasks import sandbox
from kvfold.compress.tasks.sandbox import run_program


@pytest.fixture
def folders(monkeypatch) -> list[Path]:
    """The folders that programs ran in."""
    made: list[Path] = []
    real = sandbox.tempfile.TemporaryDirectory

    def recorded(**options):
        folder = real(**options)
        made.append(Path(folder.name))
        return folder

    monkeypatch.setattr(sandbox.tempfile, "TemporaryDirectory", recorded)
    return made


def command_lines() -> str:
    """Of every process that runs."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            lines.append(file.read_text(errors="replace"))
    return "\n".join(lines)


def test_a_program_passes_if_it_ends_by_itself(folders):
    assert run_program(
        "import math, re, typing, collections\nassert math.gcd(4, 6) == 2"
    ) == sandbox.Outcome(True, "passed")
    assert len(folders) == 1 and not folders[0].exists()


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError: "),
        ("import sys; sys.exit(0)", "exited"),
        ("import os; os._exit(0)", "exit code 0"),
        ("import os; os._exit(42)", "exit code 42"),  # no code says that a program has passed
        ("import os; os.closerange(3, 64)", "OSError: [Errno 9]"),
        ("raise SystemExit", "exited"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("f = lambda n: f(n + 1)\nf(0)", "RecursionError: "),
        ("input()", "EOFError: "),
        ("import kvfold.errors as e; open(e.__file__, 'a')", "PermissionError: "),
        ("import os; assert 'PATH' in os.environ, sorted(os.environ)", "AssertionError: "),
        ("\ud800", "SyntaxError: "),
    ],
)
def test_programs_that_fail(program, how, folders):
    found = run_program(program)
    if "kvfold" in program:  # the package may not be importable at all where -I hides it
        assert not found.passed and found.how.startswith(("PermissionError", "ModuleNotFoundError"))
    else:
        assert not found.passed and found.how.startswith(how), found
    assert not folders[0].exists()


def test_an_endless_loop_is_stopped_and_leaves_no_process(folders):
    begun = time.monotonic()
    found = run_program("while True: pass", timeout=1.0)
    assert found == sandbox.Outcome(False, "timed out after 1 s") and time.monotonic() - begun < 20
    assert not folders[0].exists()
    assert str(folders[0]) not in command_lines()


@pytest.mark.skipif(sys.platform != "linux", reason="forks behind Python's back")
@pytest.mark.parametrize("spaces", [True, False])
def test_a_process_left_behind_is_ended(folders, tmp_path, monkeypatch, spaces):
    """Here the fences that would not let it come to that are left out."""
    if spaces and not sandbox.namespaces():
        pytest.skip("no namespaces here")
    guard = tmp_path / "guard.py"
    guard.write_text(
        f"import os, sys, time\nif os.fork() == 0:\n    {'os.setsid()' if spaces else ''}\n    time.sleep(60)\n"
        "os.write(1, sys.stdin.buffer.read())"
    )
    if not spaces:
        monkeypatch.setattr(sandbox, "namespaces", lambda: ())
    monkeypatch.setattr(sandbox, "GUARD", guard)
    assert run_program("").passed
    time.sleep(0.2)
    assert str(folders[0]) not in command_lines()


def test_sleeping_is_no_way_around_the_limit_of_cpu_time():
    assert run_program("import time; time.sleep(60)", timeout=0.5).how == "timed out after 0.5 s"


def test_memory_is_limited():
    found = run_program("x = bytearray(10**9)\nx = [0] * 10**9", nbytes=600 << 20)
    assert (found.passed, found.how) == (False, "MemoryError")
    assert run_program("x = bytearray(10**8)", nbytes=600 << 20).passed


def test_printing_without_end_fills_nothing(folders):
    found = run_program("import sys\nwhile True: sys.stderr.write('x' * 10**6)", timeout=10.0)
    assert not found.passed and found.how != "timed out after 10 s"
    assert run_program(
        "for _ in range(100): print('x' * 10**6)", timeout=10.0
    ).passed  # goes nowhere


@pytest.mark.parametrize(
    "attempt",
    [
        "open(target, 'w')",
        "os.open(target, os.O_CREAT | os.O_WRONLY)",
        "pathlib.Path(target).touch()",
        "io.FileIO(pathlib.Path(target), 'w')",
        "io.FileIO(os.fsencode(target), 'w')",
        "os.open(pathlib.Path(target), os.O_CREAT | os.O_WRONLY)",
        "open(type('Lie', (str,), {'startswith': lambda *_: True, '__str__': lambda _: 'a'})(target), 'w')",
        (
            "os.open(os.path.basename(target), os.O_CREAT | os.O_WRONLY, "
            "dir_fd=os.open(os.path.dirname(target), os.O_RDONLY))"
        ),
        "sqlite3.connect(target).execute('create table t(x)')",
        "os.mkfifo(target)",
        "os.utime(existing, (0, 0))",
        "os.chmod(existing, 0)",
        "os.mkdir(target)",
        "os.rename('program.py', target)",
        "os.symlink('program.py', target)",
        "os.remove(existing)",
        "shutil.rmtree(os.path.dirname(existing))",
        "os.system('touch ' + target)",
        "subprocess.run(['touch', target])",
        "subprocess._fork_exec(*range(23))",
        "os.posix_spawn('/usr/bin/touch', ['touch', target], {})",
        "os.execv('/usr/bin/touch', ['touch', target])",
        "os.fork()",
        "os.forkpty()",
        "os.setsid()",
        "multiprocessing.get_context('fork').Process(target=print).start()",
        "os.kill(os.getppid(), 0)",
        "os.killpg(0, 0)",
        "os.sched_setaffinity(os.getppid(), {0})",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        "open('/proc/self/mem', 'rb')",
        "open(f'/proc/{os.getppid()}/mem', 'rb')",
        "gc.get_objects()",
        "sys._current_frames()",
        "socket.create_connection(('127.0.0.1', 9))",
    ],
)
def test_what_reaches_outside_is_refused(attempt, tmp_path, folders):
    existing, target = tmp_path / "existing", tmp_path / "target"
    existing.write_text("mine")
    head = "import gc, io, multiprocessing, os, pathlib, resource, shutil, socket, sqlite3, subprocess, sys\n"
    head += f"target, existing = {str(target)!r}, {str(existing)!r}\n"
    found = run_program(head + attempt)
    assert (
        not found.passed
        and found.how.startswith("PermissionError: ")
        and "not allowed here" in found.how
    )
    assert existing.read_text() == "mine" and not target.exists() and not folders[0].exists()


@pytest.mark.parametrize(
    "name",
    [
        "ctypes",
        "_ctypes",
        "cffi",
        "_cffi_backend",
        "_posixsubprocess",
        "multiprocessing.popen_spawn_posix",
    ],
)
def test_modules_that_call_c_or_make_processes_are_not_imported(name):
    attempts = [f"import {name}", f"import sys\nsys.modules.pop({name!r}, None)\nimport {name}"]
    for attempt in (
        attempts
        if "multi" not in name
        else ["import multiprocessing as m\nm.get_context('spawn').Process().start()"]
    ):
        found = run_program(attempt)
        assert not found.passed and found.how.startswith(
            ("ImportError: import of", "ModuleNotFoundError")
        ), found


# What is known of the protocol is tried: nothing that a program can write, print or find by name
# says that it passed.
FAKES = {
    "prints": "print('passed'); print(0)",
    "every descriptor": "for fd in range(64):\n    try: os.write(fd, b'0' * 32)\n    except OSError: pass",
    "what it can read": """
for fd in range(64):
    try:
        os.set_blocking(fd, False)
        read = os.read(fd, 99)
    except OSError:
        continue
    for out in range(64):
        try: os.write(out, read or b'x')
        except OSError: pass
""",
    "what frames below hold": """
frame, found = sys._getframe(), []
while frame:
    found += [v for space in (frame.f_locals, frame.f_globals) for v in [*space.values(), *frame.f_code.co_consts]]
    frame = frame.f_back
found += [vars(v) for v in found if hasattr(v, '__dict__')]
for v in [w for v in found for w in (v.values() if isinstance(v, dict) else [v])]:
    if isinstance(v, (bytes, str)) and len(v) == 32:
        for out in range(64):
            try: os.write(out, os.fsencode(v))
            except OSError: pass
""",
    "its command line and surroundings": """
for name in ('cmdline', 'environ'):
    for part in open(f'/proc/self/{name}', 'rb').read().replace(b'=', b'\0').split(b'\0'):
        for out in range(64):
            try: os.write(out, part)
            except OSError: pass
""",
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("fake", FAKES)
@pytest.mark.parametrize(
    "end",
    [
        "os._exit(0)",
        "os._exit(42)",
        "sys.exit(0)",
        "1 / 0",
        "os.kill(os.getpid(), 9)",
        "os.abort()",
    ],
)
def test_a_verdict_is_not_faked(fake, end):
    assert not run_program(f"import os, sys\n{FAKES[fake]}\n{end}").passed


@pytest.mark.parametrize(
    "program",
    [
        "",
        "import atexit, os; atexit.register(os._exit, 1)",
        "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()",
        "import numpy; assert numpy.zeros(3).sum() == 0",
        "import pickle\nclass A: pass\nassert pickle.loads(pickle.dumps(A()))",
        "import asyncio\nasync def f(): return 1\nassert asyncio.run(f()) == 1",
        "import __main__; assert __name__ == '__main__' and __main__.__file__.endswith('program.py')",
    ],
)
def test_what_a_program_may_do(program):
    assert run_program(program) == sandbox.Outcome(True, "passed")


# Past the audit hooks, as native code is: what is left are the fences of the system.
BEHIND = """
import ctypes, errno, os, runpy, socket, sys
folder, walls, target, parent = sys.argv[1], sys.argv[2], sys.argv[3], os.getppid()
runpy.run_path(walls)["put_up"](folder)
libc = ctypes.CDLL(None, use_errno=True)
def tried(name, call):
    ctypes.set_errno(0)
    try: number = 0 if call() != -1 else ctypes.get_errno()
    except OSError as error: number = error.errno
    print(name, errno.errorcode.get(number, number))
tried("write inside", lambda: os.close(os.open(folder + "/a", os.O_CREAT | os.O_WRONLY)))
tried("rename inside", lambda: os.rename(folder + "/a", folder + "/b"))
def thread():
    one = __import__("threading").Thread(target=print, args=("in a thread",))
    one.start()
    one.join()  # before the next line is printed: lines of two threads may mix
tried("thread", thread)
tried("signal to itself", lambda: os.kill(os.getpid(), 0))
tried("fork", lambda: libc.fork())
tried("vfork", lambda: libc.syscall(58 if os.uname().machine == "x86_64" else 1 << 19))
def shell():
    if libc.system(b"touch " + target.encode()): raise PermissionError(errno.EPERM, "no shell")
tried("system", shell)
tried("exec", lambda: os.execv(sys.executable, [sys.executable, "-c", ""]))
tried("socket", lambda: socket.socket())
tried("kill parent", lambda: libc.kill(parent, 0))
tried("kill group", lambda: libc.kill(0, 0))
tried("session", lambda: libc.setsid())
tried("parent's memory", lambda: os.open(f"/proc/{parent}/mem", os.O_RDONLY))
tried("parent's limits", lambda: __import__("resource").prlimit(parent, 0, (1, 1)))
tried("own memory", lambda: os.open("/proc/self/mem", os.O_RDWR))
tried("write outside", lambda: os.open(target, os.O_CREAT | os.O_WRONLY))
tried("append outside", lambda: os.open(sys.argv[4], os.O_APPEND | os.O_WRONLY))
tried("truncate outside", lambda: os.truncate(sys.argv[4], 0))
tried("remove outside", lambda: os.remove(sys.argv[4]))
tried("pipe outside", lambda: os.mkfifo(target))
tried("rename out", lambda: os.rename(folder + "/b", target))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux'")
def test_what_the_system_refuses_whatever_runs(tmp_path):
    existing, target, folder = tmp_path / "existing", tmp_path / "target", tmp_path / "folder"
    existing.write_text("mine")
    folder.mkdir()
    walls = Path(sandbox.__file__).with_name("walls.py")
    done = subprocess.run(
        [sys.executable, "-c", BEHIND, folder, walls, target, existing],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    for name in ("write inside", "rename inside", "thread", "signal to itself"):
        assert found.pop(name) == "0", name
    assert found.pop("in a") == "thread"
    if found["socket"] == "0" or found["write outside"] == "0":
        pytest.skip("this kernel has not both")
    assert all(number in ("EPERM", "EACCES", "EXDEV") for number in found.values()), found
    assert existing.read_text() == "mine" and not target.exists()


@pytest.mark.parametrize("column", [0, 1])
def test_the_filter_lets_through_what_it_should(column):
    """Run by hand: a filter is a small program."""
    from kvfold.compress.tasks import walls

    arch = next(arch for c, arch in walls.MACHINES.values() if c == column)
    code = walls.filter_code(column, arch, pid=77)

    def verdict(number: int, argument: int = 0, architecture: int = arch) -> int:
        data, value, at = {0: number, 4: architecture, 16: argument}, 0, 0
        while True:
            operation, yes, no, operand = code[at]
            if operation == 0x06:
                return operand
            if operation == 0x20:
                value, jump = data[operand], 0
            else:
                jump = (
                    yes
                    if {
                        0x15: value == operand,
                        0x35: value >= operand,
                        0x45: bool(value & operand),
                    }[operation]
                    else no
                )
            at += 1 + jump

    calls = {name: numbers[column] for name, numbers in walls.CALLS.items()}
    for name, number in calls.items():
        assert verdict(number) == {
            "clone3": walls.ABSENT,
            "prlimit64": walls.ALLOW,
            "sched_setaffinity": walls.ALLOW,
        }.get(name, walls.DENY)
        assert verdict(number, architecture=arch ^ 1) == walls.DENY
    assert verdict(calls["kill"], 77) == verdict(calls["tgkill"], 77) == walls.ALLOW
    assert verdict(calls["clone"], 0x3D0F00) == walls.ALLOW  # pthread_create's flags
    assert verdict(calls["clone"], 0x1200011) == walls.DENY  # fork's
    assert verdict(1 << 30) == walls.DENY
    assert all(verdict(number) == walls.ALLOW for number in set(range(500)) - set(calls.values()))
    assert max(max(code[at][1], code[at][2]) for at in range(len(code))) < 256


def test_it_may_write_in_its_own_folder_and_nothing_stays(folders):
    assert run_program("open('a.txt', 'w').write('a'); assert open('a.txt').read() == 'a'").passed
    assert not run_program(
        "open('b', 'wb').write(bytes(17 << 20))"
    ).passed  # past the limit of a file
    assert len(folders) == 2 and not any(folder.exists() for folder in folders)


def test_the_guard_needs_nothing_of_the_package():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import guard, walls; "
        "print('kvfold' in sys.modules, guard.EXITED)"
    )
    folder = os.path.dirname(sandbox.__file__)
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, folder], capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "3"]
