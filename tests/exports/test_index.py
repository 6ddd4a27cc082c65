"""The index of weights: engines that take every safetensors file for weights where there is none
read what it names."""

import json
import os
import shutil

import pytest
from safetensors import safe_open

from kvfold.compress.cli import main
from kvfold.errors import KvfoldError
from kvfold.exports.files import INDEX, WEIGHTS, file_sha256
from kvfold.exports.reader import fix_artifact, read_artifact, read_metadata, update_artifact


@pytest.fixture
def old(tmp_path, tiny_artifact):
    """An artifact as it was written before: a single file of weights and no index."""
    shutil.copytree(tiny_artifact, tmp_path / "old")
    (tmp_path / "old" / INDEX).unlink()
    assert update_artifact(tmp_path / "old") == [INDEX]
    return tmp_path / "old"


def test_an_artifact_has_one(tiny_artifact):
    index = json.loads((tiny_artifact / INDEX).read_text())
    with safe_open(tiny_artifact / WEIGHTS, framework="pt") as stored:
        tensors = {
            name: stored.get_tensor(name)
            for name in stored.keys()  # noqa: SIM118 - no dictionary
        }
    assert index["weight_map"] == dict.fromkeys(sorted(tensors), WEIGHTS)
    assert index["metadata"] == {
        "total_parameters": sum(x.numel() for x in tensors.values()),
        "total_size": sum(x.nbytes for x in tensors.values()),
    }
    assert read_metadata(tiny_artifact).files[INDEX] == file_sha256(tiny_artifact / INDEX)


def validate(*words):
    with pytest.raises(SystemExit) as end:
        main(["validate", *map(str, words)])
    assert end.value.code in (0, None)


def test_an_older_one_loads_and_gets_it(old, tiny_artifact, capsys):
    read_artifact(old)
    validate(old, "--fix")
    assert f"wrote {INDEX}" in capsys.readouterr().out
    for file in tiny_artifact.iterdir():
        assert (old / file.name).read_bytes() == file.read_bytes(), file.name
    validate(old, "--fix")
    assert "nothing was missing" in capsys.readouterr().out


def test_a_damaged_one_is_not_mended(old):
    (old / "recipe.yaml").write_text("other")
    with pytest.raises(KvfoldError, match=r"recipe\.yaml"):
        fix_artifact(old)
    assert not (old / INDEX).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_is_said(old):
    old.chmod(0o555)
    with pytest.raises(KvfoldError, match="fix a copy"):
        fix_artifact(old)


def test_an_index_beside_a_single_file_is_compared_with_it(tmp_path, tiny_artifact):
    shutil.copytree(tiny_artifact, tmp_path / "x")
    index = json.loads((tmp_path / "x" / INDEX).read_text())
    index["weight_map"]["model.more.weight"] = WEIGHTS
    (tmp_path / "x" / INDEX).write_text(json.dumps(index))
    with pytest.raises(KvfoldError, match=r"lacks model\.more\.weight"):
        update_artifact(tmp_path / "x")
