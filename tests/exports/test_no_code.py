"""Python that a model or an artifact carries never runs, whatever is answered to a prompt; what
doesn't need it loads all the same."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvfold import KvfoldError, runtime
from kvfold.compress.cli import main
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.exports.reader import file_sha256, read_metadata
from kvfold.exports.schema import dump_metadata
from kvfold.pretrained import (
    config_from_pretrained,
    stock_from_pretrained,
    tokenizer_from_pretrained,
)


@pytest.fixture(autouse=True)
def ran(tmp_path, monkeypatch) -> Iterator[Path]:
    """A file that the code in a folder would write. Whoever asks is told yes, but nobody may
    ask."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(*prompt) or "y")
    yield tmp_path / "ran"
    assert not asked and not (tmp_path / "ran").exists()


def edit(file: Path, **fields) -> None:
    stated = json.loads(file.read_text())
    file.write_text(json.dumps({**stated, **fields}))


def ask_for_code(folder: Path, kind: str) -> Path:
    """Makes a folder ask for the classes of its own.py."""
    if kind == "tokenizer":
        edit(
            folder / "tokenizer_config.json",
            tokenizer_class="C",
            auto_map={"AutoTokenizer": ["own.C", None]},
        )
        return folder
    edit(folder / "config.json", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"})
    if kind == "model":
        edit(folder / "config.json", model_type="own")
    return folder


def add_code(folder: Path, ran: Path) -> Path:
    """The code itself, which leaves a trace."""
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    return folder


def seal(folder: Path) -> Path:
    """Lists an artifact's files as they are, without asking whether they may be."""
    metadata = read_metadata(folder)
    files = {name: file_sha256(folder / name) for name in metadata.files}
    (folder / "kv_cache.json").write_text(
        dump_metadata(metadata.model_copy(update={"files": files}))
    )
    return folder


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_what_needs_code_is_refused(tmp_path, tiny_folder, ran, kind):
    folder = add_code(ask_for_code(shutil.copytree(tiny_folder, tmp_path / "model"), kind), ran)
    loads = (
        (config_from_pretrained, stock_from_pretrained)
        if kind == "model"
        else (tokenizer_from_pretrained,)
    )
    for load in loads:
        with pytest.raises(
            KvfoldError, match=r"Python code of its own .* never runs; give"
        ) as error:
            load(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_what_does_not_need_it_loads(tmp_path, tiny_folder, ran):
    folder = add_code(
        ask_for_code(shutil.copytree(tiny_folder, tmp_path / "model"), "known family"), ran
    )
    assert config_from_pretrained(folder).model_type == "llama"
    assert type(stock_from_pretrained(folder)).__name__ == "LlamaForCausalLM"
    assert tokenizer_from_pretrained(folder)("ab").input_ids == [97, 98]


COMMANDS = {
    "validate": ["validate", "FOLDER"],
    "validate --update": ["validate", "FOLDER", "--update"],
    "inspect": ["inspect", "FOLDER", "--live"],
    "generate": ["generate", "FOLDER", "--prompt=a"],
    "eval": ["eval", "FOLDER"],
    "tasks": ["eval", "FOLDER", "--tasks=needle"],
    "compress": ["compress", "FOLDER", "--out=OUT", "--budget=4"],
    "export": ["export", "modelopt", "FOLDER", "OUT"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_no_command_runs_it(tmp_path, tiny_folder, tiny_artifact, ran, capsys, command, kind):
    source = tiny_folder if command == "compress" else tiny_artifact
    folder = ask_for_code(shutil.copytree(source, tmp_path / "model"), kind)
    add_code(folder, ran) if command == "compress" else seal(
        folder
    )  # beside an artifact the file alone is refused
    with pytest.raises(SystemExit) as stop:
        main(
            [
                word.replace("FOLDER", str(folder)).replace("OUT", str(tmp_path / "out"))
                for word in COMMANDS[command]
            ]
        )
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    wanted = (
        "'own' is not in the table"
        if (command, kind) == ("compress", "model")
        else "Python code of its own"
    )
    assert last.startswith("kvfold: ") and wanted in last


LOADERS = {
    "load_pretrained": runtime.load_pretrained,
    "from_pretrained": lambda *a, **b: AutoModelForCausalLM.from_pretrained(*a, **b),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("trust", [None, False, True])
def test_no_loader_runs_it(tmp_path, tiny_artifact, ran, load, trust, registered):
    folder = seal(ask_for_code(shutil.copytree(tiny_artifact, tmp_path / "known"), "known family"))
    with torch.no_grad():  # as with a stock model, the family's own class
        assert load(folder, trust_remote_code=trust)(torch.tensor([[1, 2]])).logits.shape[1] == 2
    add_code(folder, ran)
    with pytest.raises(KvfoldError, match=r"own\.py.* does not list; remove it\.$"):
        load(folder, trust_remote_code=trust)
    folder = seal(ask_for_code(shutil.copytree(tiny_artifact, tmp_path / "unknown"), "model"))
    with pytest.raises(KvfoldError, match="Python code of its own"):
        load(folder, trust_remote_code=trust)


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]
)
def test_a_kernel_of_the_hub_is_code_too(tmp_path, tiny_folder, key):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    edit(folder / "config.json", **{key: "someone/flash-attention"})
    for load in (config_from_pretrained, stock_from_pretrained):
        with pytest.raises(KvfoldError, match="'someone/flash-attention'"):
            load(folder)


def test_an_artifact_names_no_code(tmp_path, tiny_folder, ran, text_file, recipe_file):
    folder = add_code(
        ask_for_code(shutil.copytree(tiny_folder, tmp_path / "model"), "known family"), ran
    )
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.C", None]})
    out = compress(
        str(folder), "4.0", tmp_path / "out", calib=str(text_file), recipe=load_recipe(recipe_file)
    ).path
    assert not any("auto_map" in file.read_text() for file in out.glob("*.json")) and not list(
        out.glob("*.py")
    )
