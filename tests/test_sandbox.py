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
    assert run_program("import math, re, typing, collections\nassert math.gcd(4, 6) == 2") == sandbox.Outcome(
        True, "passed"
    )
    assert len(folders) == 1 and not folders[0].exists()


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError: "),
        ("import sys; sys.exit(0)", "exited"),
        ("import os; os._exit(0)", "exit code 0"),
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
def test_a_process_left_behind_is_ended(folders):
    program = "import ctypes, os, time\nif ctypes.CDLL(None).fork() == 0:\n    time.sleep(60)"
    assert run_program(program).passed
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
    assert run_program("for _ in range(100): print('x' * 10**6)", timeout=10.0).passed  # goes nowhere


@pytest.mark.parametrize(
    "attempt",
    [
        "open(target, 'w')",
        "os.open(target, os.O_CREAT | os.O_WRONLY)",
        "pathlib.Path(target).touch()",
        "os.mkdir(target)",
        "os.rename('program.py', target)",
        "os.symlink('program.py', target)",
        "os.remove(existing)",
        "shutil.rmtree(os.path.dirname(existing))",
        "os.system('touch ' + target)",
        "subprocess.run(['touch', target])",
        "os.fork()",
        "os.kill(os.getppid(), 0)",
        "socket.create_connection(('127.0.0.1', 9))",
    ],
)
def test_what_reaches_outside_is_refused(attempt, tmp_path, folders):
    existing, target = tmp_path / "existing", tmp_path / "target"
    existing.write_text("mine")
    head = f"import os, pathlib, shutil, socket, subprocess\ntarget, existing = {str(target)!r}, {str(existing)!r}\n"
    found = run_program(head + attempt)
    assert not found.passed and found.how.startswith("PermissionError: ") and "not allowed here" in found.how
    assert existing.read_text() == "mine" and not target.exists() and not folders[0].exists()


def test_it_may_write_in_its_own_folder_and_nothing_stays(folders):
    assert run_program("open('a.txt', 'w').write('a'); assert open('a.txt').read() == 'a'").passed
    assert not run_program("open('b', 'wb').write(bytes(17 << 20))").passed  # past the limit of a file
    assert len(folders) == 2 and not any(folder.exists() for folder in folders)


def test_the_guard_needs_nothing_of_the_package():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import guard; print('kvfold' in sys.modules, guard.PASSED)"
    folder = os.path.dirname(sandbox.__file__)
    done = subprocess.run([sys.executable, "-I", "-c", code, folder], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "42"]
