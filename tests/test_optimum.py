"""`optimum-cli kvfold …`: the same command line, from the source tree and from the wheel."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIMUM_CLI = (sys.executable, "-m", "optimum.commands.optimum_cli")
KVFOLD = (sys.executable, "-m", "kvfold.compress.cli")


def run(command, *args, **options):
    return subprocess.run([*command, *map(str, args)], capture_output=True, text=True, **options)


def both(*args) -> tuple[subprocess.CompletedProcess, subprocess.CompletedProcess]:
    return run((*OPTIMUM_CLI, "kvfold"), *args), run(KVFOLD, *args)


@pytest.mark.parametrize(
    "args",
    [["--help"], [], ["push", "--help"], ["compress", "--bugdet", "2"], ["frobnicate"], ["validate", "no-folder"]],
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
    listed = run(OPTIMUM_CLI, "--help")
    assert "kvfold" in listed.stdout and "export" in listed.stdout and listed.returncode == 0
    code = f"import sys, runpy; sys.argv = ['optimum-cli', 'env', '--help']; runpy.run_module({OPTIMUM_CLI[2]!r}, run_name='__main__')"
    probe = (
        f"import atexit, sys; atexit.register(lambda: print('LOADED', 'kvfold.compress.cli' in sys.modules)); {code}"
    )
    assert "LOADED False" in run((sys.executable, "-c", probe)).stdout  # registering loads nothing of ours


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the tree, so that no build folder is left in it."""
    source, out = tmp_path_factory.mktemp("source") / "kvfold", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "compress", "exports", "kernels", "runtime"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skipped)
    done = run((sys.executable, "-m", "pip", "wheel"), source, "--no-deps", "--quiet", "-w", out)
    assert done.returncode == 0, done.stderr
    [built] = out.glob("*.whl")
    return built


def test_wheel_holds_everything(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        p.relative_to(ROOT)
        for folder in ("compress", "exports", "kernels", "runtime")
        for p in (ROOT / folder).rglob("*")
    }
    wanted = {p for p in wanted if p.suffix in (".py", ".jinja", ".txt") and "__pycache__" not in p.parts}
    assert names >= {f"kvfold/{p.as_posix()}" for p in wanted}
    assert "optimum/commands/register/register_kvfold.py" in names
    assert not [n for n in names if n.startswith("optimum/") and n.endswith("__init__.py")]
    assert {n.partition("/")[0] for n in names if ".dist-info" not in n} == {"kvfold", "optimum"}


def test_command_from_the_wheel(wheel, tmp_path, tiny_artifact):
    """Unpacked elsewhere, with the source tree out of sight: optimum-cli finds the command, and the code is the wheel's."""
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    where = run(
        (sys.executable, "-c", "import kvfold.compress.cli as c; print(c.__file__)"), env=environment, cwd=tmp_path
    )
    assert where.stdout.startswith(str(target)), where.stderr
    done = run((*OPTIMUM_CLI, "kvfold"), "inspect", tiny_artifact, "--json", env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "tiny-llama"
    card = run(
        (sys.executable, "-c", "from kvfold.exports.page.card import quality_section as q; print(q(None, 'x', ()))"),
        env=environment,
        cwd=tmp_path,
    )
    assert "kvfold eval x" in card.stdout, card.stderr
