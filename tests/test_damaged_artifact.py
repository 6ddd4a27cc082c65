"""A damaged artifact is refused in one sentence, by `kvfold validate` and by load_pretrained alike."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from damaged import rehash, restate
from safetensors.torch import load_file, save_file

from kvfold import KvfoldError
from kvfold.exports.reader import file_sha256, read_artifact, read_metadata
from kvfold.exports.schema import METADATA_NAME, TENSORS_NAME

pytest_plugins = ["damaged"]


def flip(file: Path, position: int, mask: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= mask
    file.write_bytes(content)


def test_the_copy_itself_is_good(artifact):
    assert read_artifact(artifact).metadata == read_metadata(artifact)
    restate(artifact)  # nor does rewriting it the way that these tests do break it
    read_artifact(artifact)


@pytest.mark.parametrize("place", [0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("name", ["model.safetensors", TENSORS_NAME, "config.json", "tokenizer.json", "recipe.yaml"])
def test_flipped_byte(artifact, refused, name, place):
    size = (artifact / name).stat().st_size
    flip(artifact / name, int(size * place))
    refused(name, "sha256")


def test_flipped_byte_in_the_metadata(artifact, tiny_artifact):
    """Bytes all over kv_cache.json in turn: each is refused, unless the content stays the same to the last bit
    (1e-05 that became 1E-05, or the last of 17 digits, which a double may not tell apart)."""
    file = artifact / METADATA_NAME
    content = file.read_bytes()
    wanted = read_metadata(tiny_artifact)
    harmless = []
    for position in range(0, len(content), 3):
        mask = (1, 2, 4, 8, 16, 32, 64, 128)[position % 8]
        flip(file, position, mask)
        try:
            assert read_metadata(artifact) == wanted
            harmless.append(chr(content[position]))
        except KvfoldError as error:
            assert "\n" not in str(error)
        file.write_bytes(content)
    assert set(harmless) <= set("e0123456789") and len(harmless) < 10


@pytest.mark.parametrize(
    "field", ['"head_dim": ', '"predicted_loss": ', '"bytes": ', '"seed": ', '"digest": "', '": "']
)
def test_flipped_byte_in_a_value(artifact, refused, field):
    content = (artifact / METADATA_NAME).read_bytes()
    flip(artifact / METADATA_NAME, content.rindex(field.encode()) + len(field))
    refused(METADATA_NAME)


@pytest.mark.parametrize("mask", [1, 128])
def test_flipped_first_byte_of_the_metadata(artifact, refused, mask):
    flip(artifact / METADATA_NAME, 0, mask)
    refused(METADATA_NAME)


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", "{"])
def test_metadata_that_is_none(artifact, refused, content):
    (artifact / METADATA_NAME).write_text(content)
    refused(METADATA_NAME)


@pytest.mark.parametrize("version", [2, 0, "1", None, True, 1.0])
def test_unknown_format_version(artifact, refused, version):
    data = json.loads((artifact / METADATA_NAME).read_text())
    (artifact / METADATA_NAME).write_text(json.dumps({**data, "format_version": version}))
    refused("format_version")


@pytest.mark.parametrize("name", ["model.safetensors", TENSORS_NAME, "config.json", "tokenizer_config.json"])
def test_missing_file(artifact, refused, name):
    (artifact / name).unlink()
    refused(name)


@pytest.mark.parametrize("name", ["config.json", TENSORS_NAME])
def test_missing_file_that_is_not_listed_either(artifact, refused, name):
    (artifact / name).unlink()
    files = dict(read_metadata(artifact).files)
    del files[name]
    restate(artifact, files=files)
    refused(name)


def test_missing_metadata(artifact, refused):
    (artifact / METADATA_NAME).unlink()
    refused(METADATA_NAME, "not an artifact")


def test_no_artifact_at_all(tmp_path, refused, tiny_folder):
    refused("not an artifact", artifact=tiny_folder)


def test_wrong_hash(artifact, refused):
    files = read_metadata(artifact).files
    restate(artifact, files={**files, "model.safetensors": "0" * 64})
    refused("model.safetensors", "sha256")


def test_file_outside_the_folder(artifact, refused, tmp_path):
    (tmp_path / "outside").write_text("secret")
    files = read_metadata(artifact).files
    restate(artifact, files={**files, "../outside": file_sha256(tmp_path / "outside")})
    refused("../outside")


def test_extra_weights(artifact, refused):
    save_file({"a": torch.zeros(1)}, artifact / "model-00002-of-00002.safetensors")
    refused("model-00002-of-00002.safetensors")


def first_matrix(tensors: dict) -> str:
    return next(name for name in sorted(tensors) if name.endswith("matrix"))


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "dtype", "nan"])
def test_tensors_that_do_not_fit_under_a_hash_that_does(artifact, refused, fault):
    tensors = load_file(artifact / TENSORS_NAME)
    name = first_matrix(tensors)
    match fault:
        case "missing":
            del tensors[name]
        case "extra":
            name = "layers.9.key.matrix"
            tensors[name] = torch.zeros(2, 16, 16)
        case "shape":
            tensors[name] = tensors[name][:1].contiguous()
        case "dtype":
            tensors[name] = tensors[name].double()
        case "nan":
            tensors[name][0, 0, 0] = float("nan")
    save_file(tensors, artifact / TENSORS_NAME)
    rehash(artifact, TENSORS_NAME)
    refused(TENSORS_NAME, name)


def test_tensor_file_that_is_none_under_a_hash_that_fits(artifact, refused):
    (artifact / TENSORS_NAME).write_bytes(b"not tensors")
    rehash(artifact, TENSORS_NAME)
    refused(TENSORS_NAME)


@pytest.mark.parametrize("change", [{"num_key_value_heads": 4}, {"num_hidden_layers": 2}, {"head_dim": 24}])
def test_config_of_another_shape(artifact, refused, change):
    config = CONFIGS["llama"]()
    config.update(change)
    config.save_pretrained(artifact)
    rehash(artifact, "config.json")
    refused("config.json", METADATA_NAME)


def test_account_that_is_wrong(artifact, refused):
    account = read_metadata(artifact).account
    restate(artifact, account=account.model_copy(update={"bytes": account.bytes - 1}))
    refused(str(account.bytes - 1))


def test_unknown_field(artifact, refused):
    data = json.loads((artifact / METADATA_NAME).read_text())
    (artifact / METADATA_NAME).write_text(json.dumps({**data, "surprise": 1}))
    refused("surprise")
