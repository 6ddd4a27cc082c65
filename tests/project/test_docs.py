"""The documentation against the product: links lead somewhere, commands and options exist, the
README's Python runs."""

import re
import shlex
from pathlib import Path

import pytest

from kvfold.compress.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "exports").glob("*.md")]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as code hosts make them."""
    headings = re.findall(
        r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_begins_with_what_to_do():
    lines = README.splitlines()
    assert len(lines) < 120 and max(map(len, lines)) <= 120
    first = "\n".join(lines[:30])
    assert (
        "make compress " in first and "make test" in first and "pip install dist/kvfold-" in first
    )
    [code] = [block for language, block in FENCE.findall(README) if language == "python"]
    assert (
        len(code.split("\n\n")) == 2 and len(code.strip().replace("\n\n", "\n").splitlines()) == 6
    )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(file), f"{target} names no heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_scripts_that_pages_name_exist(page):
    text = page.read_text(encoding="utf-8")
    for script in set(re.findall(r"(?:python|pytest) ([\w/]+\.py)", text)) | set(
        re.findall(r"benchmarks/\w+\.py", text)
    ):
        assert (ROOT / script).is_file() or (ROOT / "examples" / script).is_file(), script


def commands() -> dict[str, set[str]]:
    """The README's commands, each with the options that its row, or the line where it stands,
    names."""
    found: dict[str, set[str]] = {}
    rows = [line for line in README.splitlines() if line.startswith("| `kvfold ")]
    lines = [
        line.partition("#")[0] for _, block in FENCE.findall(README) for line in block.splitlines()
    ]
    for line in [*rows, *(line for line in lines if line.startswith("kvfold "))]:
        words = shlex.split(line.split("`")[1] if line.startswith("|") else line)[1:]
        command = [word for word in words[:2] if word.islower() and not word.startswith("-")]
        found.setdefault(" ".join(command), set()).update(re.findall(r"--[a-z][a-z-]+", line))
    return found


def test_the_readme_names_commands():
    assert {
        "compress",
        "eval",
        "push",
        "export onnx",
        "kernels build",
        "bench quality",
    } <= commands().keys()


@pytest.mark.parametrize("command", commands())
def test_commands_and_options_of_the_readme_exist(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert not [option for option in commands()[command] if option not in shown]


def test_the_readmes_python_runs(tiny_artifact, capsys):
    [code] = [block for language, block in FENCE.findall(README) if language == "python"]
    path = "artifacts/smollm2-135m-2.5"
    assert path in code and path in README[: README.index("## Use")]
    exec(compile(code.replace(path, str(tiny_artifact)), "README.md", "exec"), {})
    text = capsys.readouterr().out.replace(" ", "")  # the tokenizer is one of characters
    assert text.startswith("Thekey-valuecache") and len(text) > 60
