"""Every file that a loader reads is listed, hashed, whole and inside the folder; after an edit an
artifact can be signed again."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, examples
from damaged import artifact, both_refuse, rehash, restate  # noqa: F401  (fixtures)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvfold import KvfoldError, runtime
from kvfold.compress.cli import main
from kvfold.exports.cache_model import MOST_PAGE_TOKENS, MOST_TOKENS
from kvfold.exports.files import is_read
from kvfold.exports.reader import (
    MOST_NBYTES,
    file_sha256,
    read_artifact,
    read_metadata,
    update_artifact,
)
from kvfold.exports.schema import METADATA_NAME, dump_metadata

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def drop(artifact: Path, *names: str) -> None:
    files = {
        name: digest for name, digest in read_metadata(artifact).files.items() if name not in names
    }
    restate(artifact, files=files)


def add(artifact: Path, *names: str) -> None:
    files = read_metadata(artifact).files
    restate(artifact, files={**files, **{name: file_sha256(artifact / name) for name in names}})


def shard(artifact: Path) -> dict[str, str]:
    """Cuts the weights into two shards with an index; returns tensor → shard. Nothing is signed."""
    tensors = load_file(artifact / WEIGHTS)
    (artifact / WEIGHTS).unlink()
    where = {
        name: f"model-0000{1 + i % 2}-of-00002.safetensors"
        for i, name in enumerate(sorted(tensors))
    }
    for file in set(where.values()):
        save_file(
            {n: tensors[n] for n in tensors if where[n] == file},
            artifact / file,
            metadata={"format": "pt"},
        )
    write_index(artifact, where)
    return where


def write_index(artifact: Path, where: dict[str, str]) -> None:
    (artifact / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


# -- weights


@pytest.mark.parametrize("content", ["empty", "cut", "one byte less", "header only", "not tensors"])
def test_weights_that_are_not_whole_under_a_hash_that_fits(artifact, both_refuse, content):
    whole = (artifact / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    sizes = {
        "empty": 0,
        "cut": len(whole) // 2,
        "one byte less": len(whole) - 1,
        "header only": header,
    }
    (artifact / WEIGHTS).write_bytes(
        whole[: sizes[content]] if content in sizes else b"not tensors at all"
    )
    rehash(artifact, WEIGHTS)
    both_refuse(WEIGHTS, "not a whole safetensors file")


def test_no_weights_at_all(artifact, both_refuse):
    drop(artifact, WEIGHTS)
    both_refuse(WEIGHTS, "does not list")
    (artifact / WEIGHTS).unlink()
    both_refuse(WEIGHTS, INDEX, "names the shard", "does not list")
    drop(artifact, INDEX)
    (artifact / INDEX).unlink()
    both_refuse(WEIGHTS, "neither", INDEX)


def test_shards_are_opened_too(artifact, both_refuse):
    where = shard(artifact)
    update_artifact(artifact)
    assert read_artifact(artifact).metadata.files.keys() >= {INDEX, *where.values()}
    first = artifact / min(where.values())
    first.write_bytes(first.read_bytes()[:-1])
    rehash(artifact, first.name)
    both_refuse(first.name, "not a whole safetensors file")


def test_shards_that_the_index_should_not_name(artifact, both_refuse, tmp_path):
    where = shard(artifact)
    update_artifact(artifact)
    name, file = next(iter(where.items()))
    shutil.copy(artifact / file, tmp_path / "outside.safetensors")
    for stray in (
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "model-00003-of-00003.safetensors",
    ):
        write_index(artifact, {**where, name: stray})
        rehash(artifact, INDEX)
        both_refuse(INDEX, stray)
    write_index(artifact, {**where, "model.none": file})
    rehash(artifact, INDEX)
    both_refuse(file, "model.none", INDEX)
    (artifact / INDEX).write_text('{"weight_map": [1]}')
    rehash(artifact, INDEX)
    both_refuse(INDEX, "not a readable index")


UNSIGNED = ["pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5.index.json", "adapter_config.json",
            "adapter_model.safetensors", "modeling_own.py",
            "chat_template.jinja", "special_tokens_map.json", "model.gguf"]  # fmt: skip


@pytest.mark.parametrize("name", UNSIGNED)
def test_what_a_loader_would_read_and_nobody_signed(artifact, both_refuse, name):
    assert is_read(name)
    (artifact / name).write_text("{}")
    both_refuse(name, "does not list; remove it")


@pytest.mark.parametrize("name", ["additional_chat_templates", "custom_generate"])
def test_folders_that_a_loader_would_read(artifact, both_refuse, name):
    (artifact / name).mkdir()
    both_refuse(name, "remove it.")


def test_other_files_may_lie_there(artifact):
    for name in ("notes.txt", ".gitattributes", "results.json", "plot.svg"):
        (artifact / name).write_text("mine")
    (artifact / ".git").mkdir()
    read_artifact(artifact)


@pytest.mark.parametrize("name", ["own.py", "pytorch_model.bin", "weights.pkl"])
def test_code_and_pickles_are_no_part_even_if_listed(artifact, both_refuse, name):
    (artifact / name).write_text("{}")
    add(artifact, name)
    both_refuse(name, "no code and no pickle")


@pytest.mark.parametrize(
    "name", ["a/../b", "..", "a\\b", "n" * 300, "\x1b[31m", "new\nline", "/etc/passwd", "", "."]
)
def test_names_that_are_none(artifact, both_refuse, name):
    restate(artifact, files={**read_metadata(artifact).files, name: "0" * 64})
    both_refuse(METADATA_NAME)


def test_a_file_that_is_no_regular_one(artifact, both_refuse):
    (artifact / "generation_config.json").unlink()
    (artifact / "generation_config.json").mkdir()
    both_refuse("generation_config.json", "no regular file")


def test_links_are_what_they_lead_to(artifact, tmp_path):
    """The Hub's cache keeps contents apart and links to them."""
    for file in list(artifact.iterdir()):
        shutil.move(file, tmp_path / f"blob-{file.name}")
        file.symlink_to(Path("..") / f"blob-{file.name}")
    read_artifact(artifact)


# -- kv_cache.json


def raw(artifact: Path, **account) -> None:
    """States other fields whatever the schema says."""
    text = (artifact / METADATA_NAME).read_text()
    data = json.loads(text)
    data["account"].update(account)
    (artifact / METADATA_NAME).write_text(json.dumps(data))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"format_version": 3, "a": ' + "9" * 5000 + "}",
        '{"format_version": "\\ud800"}',
        '{"format_version": 3, "\\ud800": 1}',
    ],
    ids=["lists", "objects", "digits", "surrogate", "surrogate key"],
)
def test_json_that_breaks_readers(artifact, both_refuse, text):
    (artifact / METADATA_NAME).write_text(text)
    both_refuse(METADATA_NAME)


def test_json_without_end(artifact, both_refuse):
    with open(artifact / METADATA_NAME, "r+b") as stream:
        stream.truncate(MOST_NBYTES + 1)
    both_refuse(METADATA_NAME, "MiB")


@pytest.mark.parametrize(
    "account",
    [
        {"bytes_at": {"9" * 5000: 1}},
        {"bytes_at": {"0": 1}},
        {"at": 10**400},
        {"bytes": 1 << 63},
        {"bytes_at": {str(n): 1 for n in range(1, 100)}},
    ],
)
def test_numbers_beyond_reason(artifact, both_refuse, account):
    raw(artifact, **account)
    both_refuse(METADATA_NAME)


@pytest.mark.parametrize(
    ("field", "most"),
    [("sinks", MOST_TOKENS), ("window", MOST_TOKENS), ("page_tokens", MOST_PAGE_TOKENS)],
)
def test_regions_that_nobody_could_allocate(artifact, both_refuse, field, most):
    for value in (2 * most, 10**12, 2**70):
        data = json.loads((artifact / METADATA_NAME).read_text())
        data["cache"][field] = value
        (artifact / METADATA_NAME).write_text(json.dumps(data))
        both_refuse(f"cache.{field}", str(most))


# -- config.json


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        "\x00",
        '{"model_type": "llama", "num_hidden_layers": 1e400}',
    ],
)
def test_config_that_is_none(artifact, both_refuse, content):
    (artifact / "config.json").write_text(content)
    rehash(artifact, "config.json")
    both_refuse("config.json")


@pytest.mark.parametrize("labels", [10**7, 2**70])
def test_labels_without_end(artifact, both_refuse, labels):
    config = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps({**config, "num_labels": labels}))
    rehash(artifact, "config.json")
    both_refuse("config.json", f"num_labels {labels}")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"intermediate_size": 50}, ["down_proj.weight", "shape"]), ({"vocab_size": 100}, ["lm_head.weight", "shape"]),
     ({"hidden_act": "nope"}, ["make no model", "nope"]), ({"mlp_bias": True}, ["lacks the weight", "bias"])],
)  # fmt: skip
def test_config_that_does_not_fit_the_weights(artifact, both_refuse, change, words, registered):
    config = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps({**config, **change}))
    rehash(artifact, "config.json")
    both_refuse(*words)
    with pytest.raises(KvfoldError):
        AutoModelForCausalLM.from_pretrained(artifact)


FIELDS = json.loads(CONFIGS["llama"]().to_json_string(use_diff=False))
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**12), st.just(float("1e308")), st.just(-0.5), st.text(max_size=5),
    st.lists(st.integers(0, 9), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2),
)  # fmt: skip


@settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(field=st.sampled_from(sorted(FIELDS)), value=ODD, gone=st.booleans())
def test_a_config_of_any_content_is_read_or_refused_in_a_sentence(artifact, field, value, gone):
    original = FIELDS if not gone else {k: v for k, v in FIELDS.items() if k != field}
    (artifact / "config.json").write_text(
        json.dumps(original if gone else {**original, field: value})
    )
    rehash(artifact, "config.json")
    for read in (read_artifact, runtime.load_pretrained):
        try:
            read(artifact)
        except KvfoldError as error:
            assert "Traceback" not in str(error)
            break


# -- signing


def validate(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["kvfold", "validate", *map(str, args)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, *capsys.readouterr()


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "recipe.yaml", "config.json"]
)
def test_an_edit_says_how_to_sign_and_is_signed(artifact, both_refuse, monkeypatch, capsys, name):
    with open(artifact / name, "a") as stream:
        stream.write("\n")
    both_refuse(name, "if you changed it, sign it with `kvfold validate --update", str(artifact))
    assert validate(monkeypatch, capsys, artifact, "--update")[:2] == (
        0, f"{artifact}: signed {name} anew.\n{artifact} is a valid artifact of tiny-llama, format_version 5.\n",
    )  # fmt: skip
    assert validate(monkeypatch, capsys, artifact)[0] == 0
    assert validate(monkeypatch, capsys, artifact, "--update")[1].startswith(
        f"{artifact}: nothing has changed.\n"
    )
    runtime.load_pretrained(artifact)


def test_files_that_came_or_went(artifact, tiny_artifact):
    (artifact / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (artifact / "generation_config.json").unlink()
    (artifact / "notes.txt").write_text("mine")
    assert update_artifact(artifact) == ["chat_template.jinja", "generation_config.json"]
    files = read_artifact(artifact).metadata.files
    assert (
        "chat_template.jinja" in files
        and not {"generation_config.json", "notes.txt"} & files.keys()
    )
    assert {*files} - {"chat_template.jinja"} < read_metadata(tiny_artifact).files.keys()


@torch.no_grad()
def test_weights_that_were_changed_on_purpose(artifact):
    tensors = load_file(artifact / WEIGHTS)
    save_file(
        {name: tensor * 2 for name, tensor in tensors.items()},
        artifact / WEIGHTS,
        metadata={"format": "pt"},
    )
    assert update_artifact(artifact) == [WEIGHTS]
    assert torch.equal(
        runtime.load_pretrained(artifact, dtype="auto").lm_head.weight,
        tensors["lm_head.weight"] * 2,
    )


def test_what_would_not_be_valid_is_not_signed(artifact, monkeypatch, capsys):
    before = (artifact / METADATA_NAME).read_bytes()
    good = {file.name: file.read_bytes() for file in artifact.iterdir()}
    for name, content in (
        ("config.json", b"{}"),
        (WEIGHTS, b"cut"),
        ("kv_cache.safetensors", b""),
        ("own.py", b""),
        ("pytorch_model.bin", b""),
    ):
        (artifact / name).write_bytes(content)
        code, out, err = validate(monkeypatch, capsys, artifact, "--update")
        assert (code, out) == (2, "") and name in err and "Traceback" not in err
        (artifact / name).unlink()
        if name in good:
            (artifact / name).write_bytes(good[name])
    (artifact / "config.json").unlink()
    assert validate(monkeypatch, capsys, artifact, "--update")[0] == 2
    assert (artifact / METADATA_NAME).read_bytes() == before
    (artifact / METADATA_NAME).write_bytes(before.replace(b'"tiny-llama"', b'"other-model"'))
    code, _, err = validate(
        monkeypatch, capsys, artifact, "--update"
    )  # it is no file of theirs to edit
    assert code == 2 and "its own digest" in err


def test_an_artifact_that_cannot_be_written(artifact, monkeypatch):
    (artifact / "recipe.yaml").write_text("seed: 1\n")
    before = sorted(artifact.iterdir())

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(KvfoldError, match=r"cannot be written.*Permission denied"):
        update_artifact(artifact)
    assert sorted(artifact.iterdir()) == before


def test_signing_changes_nothing_else(artifact):
    before = read_metadata(artifact)
    (artifact / "recipe.yaml").write_text("seed: 1\n")
    update_artifact(artifact)
    after = read_metadata(artifact)
    assert after.model_copy(update={"files": before.files}) == before
    assert (artifact / METADATA_NAME).read_text() == dump_metadata(after)
