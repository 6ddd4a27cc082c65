"""`optimum-cli kvfold …`: the same command line; tests/project/test_wheel.py has the one of the
wheel."""

import json
import subprocess
import sys

import prepared
import pytest

OPTIMUM_CLI = (sys.executable, "-m", "optimum.commands.optimum_cli")
MAIN = "from optimum.commands.optimum_cli import main; main()"


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True)


def both(*args) -> tuple[subprocess.CompletedProcess, subprocess.CompletedProcess]:
    return prepared.python("kvfold", MAIN, "kvfold", *args), prepared.command(*args)


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        [],
        ["push", "--help"],
        ["compress", "--bugdet", "2"],
        ["frobnicate"],
        ["validate", "no-folder"],
    ],
)
def test_same_words(args):
    """Help, errors and exit codes are kvfold's, under optimum's name."""
    theirs, ours = both(*args)
    assert theirs.returncode == ours.returncode == (2 if args and "--help" not in args else 0)
    flat = [
        " ".join(text.replace("optimum-cli kvfold", "kvfold").split())
        for text in (theirs.stdout + theirs.stderr, ours.stdout + ours.stderr)
    ]
    assert flat[0] == flat[1] and flat[0]


def test_same_figures(tiny_artifact):
    theirs, ours = both("inspect", tiny_artifact, "--at", 777, "--json")
    assert theirs.returncode == 0, theirs.stderr
    assert json.loads(theirs.stdout) == json.loads(ours.stdout)


def test_optimum_lists_it_and_its_own_commands_stay():
    listed = run(*OPTIMUM_CLI, "--help")
    assert "kvfold" in listed.stdout and "export" in listed.stdout and listed.returncode == 0
    code = (
        "import sys, runpy; sys.argv = ['optimum-cli', 'env', '--help']; "
        f"runpy.run_module({OPTIMUM_CLI[2]!r}, run_name='__main__')"
    )
    probe = (
        "import atexit, sys; "
        f"atexit.register(lambda: print('LOADED', 'kvfold.compress.cli' in sys.modules)); {code}"
    )
    assert (
        "LOADED False" in run(sys.executable, "-c", probe).stdout
    )  # registering loads nothing of ours
