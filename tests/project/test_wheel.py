"""The wheel: all of the product, nothing else, and commands that run from it without the source
tree."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from prepared import alone

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("compress", "exports", "kernels", "runtime")
OPTIMUM_CLI = (sys.executable, "-m", "optimum.commands.optimum_cli")


def run(command, *args, **options):
    return subprocess.run([*command, *map(str, args)], capture_output=True, text=True, **options)


def sources(folder: Path) -> set[str]:
    """Paths of a folder's files, caches and what builds leave left out."""
    files = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(folder).as_posix() for p in files}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the tree, so that no build folder is left in it."""
    source, out = tmp_path_factory.mktemp("source") / "kvfold", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skipped)
    done = run((sys.executable, "-m", "pip", "wheel"), source, "--no-deps", "--quiet", "-w", out)
    assert done.returncode == 0, done.stderr
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> dict[str, str]:
    """Environment of a process that has the wheel's content, unpacked elsewhere, in front of this
    checkout."""
    target = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(target)
    return {**os.environ, "PYTHONPATH": str(target)}


def test_wheel_holds_every_file_of_the_product_and_no_other(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    wanted = {f"kvfold/{folder}/{name}" for folder in FOLDERS for name in sources(ROOT / folder)}
    wanted |= {f"kvfold/{p.name}" for p in (ROOT / "src" / "kvfold").glob("*.py")}
    wanted.add(
        "optimum/commands/register/register_kvfold.py"
    )  # a namespace package: no __init__.py
    assert len(wanted) > 150
    assert names == wanted
    assert {n.partition("/")[0] for n in names} == {"kvfold", "optimum"}


def test_wheel_says_what_an_index_shows(wheel):
    [folder] = {
        n.partition("/")[0] for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" in n
    }
    with zipfile.ZipFile(wheel) as content:
        stated = Parser().parsestr(content.read(f"{folder}/METADATA").decode())
        assert content.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        points = content.read(f"{folder}/entry_points.txt").decode()
    assert "kvfold = kvfold.__main__:main" in points
    assert "[vllm.general_plugins]\nkvfold = kvfold.runtime.vllm.register:register" in points
    assert (stated["Name"], stated["Version"]) == ("kvfold", version("kvfold"))
    assert (stated["License-Expression"], stated["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert stated["Description-Content-Type"] == "text/markdown"
    assert stated.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    pythons = {
        c.rpartition(" ")[2]
        for c in stated.get_all("Classifier")
        if c.startswith("Programming Language")
    }
    assert {"3.11", "3.12", "3.13"} <= pythons
    extras = set(stated.get_all("Provides-Extra"))
    assert {"onnx", "engines", "optimum"} <= extras
    needed = [line for line in stated.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [
        line for line in needed if line.startswith(("pytest", "ruff", "mypy", "onnx", "optimum"))
    ]
    [transformers] = [Requirement(line) for line in needed if line.startswith("transformers")]
    assert version("transformers") in transformers.specifier
    assert (
        "99" not in transformers.specifier
    )  # its private hooks are relied on: no version that nobody has run


def test_command_from_the_wheel(installed, tmp_path, tiny_artifact):
    """With the source tree out of sight optimum-cli finds the command, and the code is the
    wheel's."""
    code = (
        "import kvfold.compress.cli as c; print(c.__file__)\n"
        "from kvfold.exports.page.card import quality_section as q; print(q(None, 'x', ()))"
    )
    own = run((sys.executable, "-c", alone(code)), env=installed, cwd=tmp_path)
    where, _, card = own.stdout.partition("\n")
    assert where.startswith(installed["PYTHONPATH"]), own.stderr
    assert "kvfold eval x" in card, own.stderr
    done = run(
        (*OPTIMUM_CLI, "kvfold"), "inspect", tiny_artifact, "--json", env=installed, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "tiny-llama"
