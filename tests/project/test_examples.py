"""The examples on a tiny model, as a user runs them; and the notebook's code, without Jupyter."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import matplotlib
import pytest
from hub_artifact import files_on

from kvfold import KVBudgetExceeded
from kvfold.exports.reader import read_metadata

pytest_plugins = ("hub_client",)
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quickstart_generates_and_says_what_the_cache_takes(tiny_artifact, capsys):
    load("quickstart").main(
        [str(tiny_artifact), "--prompt", "the cache of a long sequence", "--max-new-tokens", "40"]
    )
    shown = capsys.readouterr().out
    assert shown.replace(" ", "").startswith(
        "thecacheofalongsequence"
    )  # the tokenizer is one of characters
    assert (
        "67 tokens take" in shown and "15 pages are packed" in shown
    )  # 5 a layer; the last token is never read
    account = read_metadata(tiny_artifact).account
    assert shown.splitlines()[-1].startswith(
        f"{account.at} tokens would take {account.bytes:,} bytes"
    )


def test_quickstart_compresses_where_nothing_is_named_and_nothing_there(
    monkeypatch, tmp_path, tiny_artifact
):
    asked = []

    def run(command, check):
        asked.append((command, check))
        (tmp_path / "artifacts").mkdir()
        (tmp_path / "artifacts" / "smollm2-135m-2.5").symlink_to(tiny_artifact)

    monkeypatch.chdir(tmp_path)
    quickstart = load("quickstart")
    monkeypatch.setattr(quickstart.subprocess, "run", run)
    quickstart.main(["--max-new-tokens", "2"])
    quickstart.main(["--max-new-tokens", "2"])
    [(command, check)] = asked  # once: the second time it is there
    assert check and command[:5] == [sys.executable, "-m", "kvfold", "compress", "smollm2-135m"]
    assert command[-2:] == ["--out", "artifacts/smollm2-135m-2.5"]


def test_long_document_is_lowered_as_the_budget_fills_and_never_passes_it(
    tiny_artifact, text_file, tmp_path, capsys
):
    document = tmp_path / "document.txt"
    document.write_text(text_file.read_text()[:1500])
    options = ["--chunk", "250", "--max-new-tokens", "20", "--question", "what is read"]
    load("long_document").main([str(tiny_artifact), str(document), "--budget", "220KiB", *options])
    *rows, answer = capsys.readouterr().out.splitlines()
    held = [int(row.split("tokens, ")[1].split(" of ")[0].replace(",", "")) for row in rows]
    assert len(rows) == 7 and len(answer) > 10
    assert max(held) <= 220 << 10 and "of 225,280 bytes" in rows[0]
    assert rows[0].endswith(" in 16 bits") and "," not in rows[0].split("bytes: ")[1]
    assert " in 16 bits" not in rows[-1] and " in 8 or 4 bits" in rows[-1]
    with pytest.raises(KVBudgetExceeded):
        load("long_document").main(
            [str(tiny_artifact), str(document), "--budget", "80KiB", *options]
        )


def test_compress_and_push_publishes_what_it_measured(
    client, hub, tmp_path, tiny_folder, text_file, recipe_file
):
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    out = tmp_path / "small"
    options = [
        "--budget",
        "4.0",
        "--out",
        out,
        "--calib",
        text_file,
        "--recipe",
        recipe_file,
        "--windows",
        "1",
    ]
    options += ["--seq-len", "256", "--i-know", "--private"]
    script = str(EXAMPLES / "compress_and_push.py")
    code = f"import runpy; runpy.run_path({script!r}, run_name='__main__')"
    returned, printed, err = client(tiny_folder, "someone/small", *options, code=code)
    assert returned == 0, err
    assert "loaded someone/small again: 3 layers" in printed
    measured = json.loads((tmp_path / "small.eval.json").read_text())
    files = files_on(hub)
    assert (
        hub.repos["someone/small"].private and {"kv_cache.json", "model.safetensors"} < files.keys()
    )
    assert f"{measured['kl']:.4f}" in files["README.md"].decode()


def cells(name: str) -> list[tuple[str, list[str]]]:
    """A notebook's code cells: source and tags."""
    notebook = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in code]


def test_notebook_runs_from_top_to_bottom(tiny_artifact, text_file, capsys):
    """Cells are executed in one namespace; what a tagged cell sets is set to a tiny model's."""
    drawn = matplotlib.figure.Figure
    names: dict[str, object] = {"__name__": "notebook", "display": print}
    for source, tags in cells("quality.ipynb"):
        exec(compile(source, "quality.ipynb", "exec"), names)
        if "parameters" in tags:
            names |= {
                "ARTIFACT": str(tiny_artifact),
                "TEXT": str(text_file),
                "TOKENS": 300,
                "STEP": 50,
            }
    figures = [value for value in names.values() if isinstance(value, drawn)]
    assert len(figures) == 3
    assert read_metadata(tiny_artifact).provenance.model in capsys.readouterr().out
    kl = names["kl"]
    assert (
        len(kl) == 299 and kl[:24].max() < 1e-3 < kl[60:].mean()
    )  # the window is not packed, what is behind it is


def test_notebook_keeps_small_outputs():
    assert (EXAMPLES / "quality.ipynb").stat().st_size < 300_000
    notebook = json.loads((EXAMPLES / "quality.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    shown = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3
    assert not [output for output in shown if output["output_type"] == "error"]
