"""A damaged artifact is refused in one sentence, by `kvfold validate` and by load_pretrained
alike."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from damaged import artifact, both_refuse, rehash, restate  # noqa: F401  (fixtures)
from safetensors.torch import load_file, save_file

from kvfold import KvfoldError
from kvfold.exports.reader import file_sha256, read_artifact, read_metadata
from kvfold.exports.schema import METADATA_NAME, TENSORS_NAME


def flip(file: Path, position: int, mask: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= mask
    file.write_bytes(content)


def test_the_copy_itself_is_good(artifact):
    assert read_artifact(artifact).metadata == read_metadata(artifact)
    restate(artifact)  # nor does rewriting it the way that these tests do break it
    read_artifact(artifact)


@pytest.mark.parametrize("place", [0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize(
    "name", ["model.safetensors", TENSORS_NAME, "config.json", "tokenizer.json", "recipe.yaml"]
)
def test_flipped_byte(artifact, both_refuse, name, place):
    size = (artifact / name).stat().st_size
    flip(artifact / name, int(size * place))
    both_refuse(name, "sha256")


def test_flipped_byte_in_the_metadata(artifact, tiny_artifact):
    """Bytes all over kv_cache.json in turn: each is refused, unless the content stays the same to
    the last bit (1e-05 that became 1E-05, or the last of 17 digits, which a double may not tell
    apart)."""
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
def test_flipped_byte_in_a_value(artifact, both_refuse, field):
    content = (artifact / METADATA_NAME).read_bytes()
    flip(artifact / METADATA_NAME, content.rindex(field.encode()) + len(field))
    both_refuse(METADATA_NAME)


@pytest.mark.parametrize("mask", [1, 128])
def test_flipped_first_byte_of_the_metadata(artifact, both_refuse, mask):
    flip(artifact / METADATA_NAME, 0, mask)
    both_refuse(METADATA_NAME)


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", "{"])
def test_metadata_that_is_none(artifact, both_refuse, content):
    (artifact / METADATA_NAME).write_text(content)
    both_refuse(METADATA_NAME)


@pytest.mark.parametrize("version", [2, 0, "1", None, True, 1.0])
def test_unknown_format_version(artifact, both_refuse, version):
    data = json.loads((artifact / METADATA_NAME).read_text())
    (artifact / METADATA_NAME).write_text(json.dumps({**data, "format_version": version}))
    both_refuse("format_version")


@pytest.mark.parametrize(
    "name", ["model.safetensors", TENSORS_NAME, "config.json", "tokenizer_config.json"]
)
def test_missing_file(artifact, both_refuse, name):
    (artifact / name).unlink()
    both_refuse(name)


@pytest.mark.parametrize("name", ["config.json", TENSORS_NAME])
def test_missing_file_that_is_not_listed_either(artifact, both_refuse, name):
    (artifact / name).unlink()
    files = dict(read_metadata(artifact).files)
    del files[name]
    restate(artifact, files=files)
    both_refuse(name)


def test_missing_metadata(artifact, both_refuse):
    (artifact / METADATA_NAME).unlink()
    both_refuse(METADATA_NAME, "not an artifact")


def test_no_artifact_at_all(tmp_path, both_refuse, tiny_folder):
    both_refuse("not an artifact", artifact=tiny_folder)


def test_wrong_hash(artifact, both_refuse):
    files = read_metadata(artifact).files
    restate(artifact, files={**files, "model.safetensors": "0" * 64})
    both_refuse("model.safetensors", "sha256")


def test_file_outside_the_folder(artifact, both_refuse, tmp_path):
    (tmp_path / "outside").write_text("secret")
    files = read_metadata(artifact).files
    restate(artifact, files={**files, "../outside": file_sha256(tmp_path / "outside")})
    both_refuse("../outside")


def test_extra_weights(artifact, both_refuse):
    save_file({"a": torch.zeros(1)}, artifact / "model-00002-of-00002.safetensors")
    both_refuse("model-00002-of-00002.safetensors")


def first_matrix(tensors: dict) -> str:
    return next(name for name in sorted(tensors) if name.endswith("matrix"))


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "dtype", "nan"])
def test_tensors_that_do_not_fit_under_a_hash_that_does(artifact, both_refuse, fault):
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
    both_refuse(TENSORS_NAME, name)


def test_tensor_file_that_is_none_under_a_hash_that_fits(artifact, both_refuse):
    (artifact / TENSORS_NAME).write_bytes(b"not tensors")
    rehash(artifact, TENSORS_NAME)
    both_refuse(TENSORS_NAME)


@pytest.mark.parametrize(
    "change", [{"num_key_value_heads": 4}, {"num_hidden_layers": 2}, {"head_dim": 24}]
)
def test_config_of_another_shape(artifact, both_refuse, change):
    config = CONFIGS["llama"]()
    config.update(change)
    config.save_pretrained(artifact)
    rehash(artifact, "config.json")
    both_refuse("config.json", METADATA_NAME)


def test_account_that_is_wrong(artifact, both_refuse):
    account = read_metadata(artifact).account
    restate(artifact, account=account.model_copy(update={"bytes": account.bytes - 1}))
    both_refuse(str(account.bytes - 1))


def test_unknown_field(artifact, both_refuse):
    data = json.loads((artifact / METADATA_NAME).read_text())
    (artifact / METADATA_NAME).write_text(json.dumps({**data, "surprise": 1}))
    both_refuse("surprise")


@pytest.mark.parametrize(
    "fault",
    ["tiny", "huge", "rank 1", "rows alike", "one row of nothing", "one row of almost nothing"],
)
def test_a_matrix_that_only_float64_can_undo(artifact, both_refuse, fault):
    """Its logits would be NaN, in the last layer without a word, or noise."""
    tensors = load_file(artifact / TENSORS_NAME)
    name = next(n for n in sorted(tensors) if n.endswith("matrix"))
    matrix = tensors[name]
    eye = torch.eye(matrix.shape[-1]).expand_as(matrix)
    tensors[name] = {
        "tiny": 1e-40 * eye,
        "huge": matrix.sign() * 3e38,
        "rank 1": matrix[..., :1].expand_as(matrix).contiguous(),
        "rows alike": torch.cat((matrix[:, 1:2] * (1 + 1e-7), matrix[:, 1:]), 1),
        "one row of nothing": torch.cat((eye[:, :1] * 0, eye[:, 1:]), 1),
        "one row of almost nothing": torch.cat((eye[:, :1] * 1e-20, eye[:, 1:]), 1),
    }[fault].contiguous()
    save_file(tensors, artifact / TENSORS_NAME, metadata={"format": "pt"})
    rehash(artifact, TENSORS_NAME)
    both_refuse(name, "singular")


def test_a_matrix_that_is_only_badly_scaled_is_read(artifact):
    tensors = load_file(artifact / TENSORS_NAME)
    name = next(n for n in sorted(tensors) if n.endswith("matrix"))
    scales = torch.logspace(-2, 2, tensors[name].shape[-1])
    for factor in (1.0, 1e-6, 1e6):
        tensors[name] = (torch.diag(scales) * factor).expand_as(tensors[name]).contiguous()
        save_file(tensors, artifact / TENSORS_NAME, metadata={"format": "pt"})
        rehash(artifact, TENSORS_NAME)
        read_artifact(artifact)


def test_a_mean_that_overflows(artifact, both_refuse):
    tensors = load_file(artifact / TENSORS_NAME)
    name = next(n for n in sorted(tensors) if n.endswith("offset"))
    tensors[name].view(-1)[3] = -3e38
    save_file(tensors, artifact / TENSORS_NAME, metadata={"format": "pt"})
    rehash(artifact, TENSORS_NAME)
    both_refuse(name, "2^64")


@pytest.mark.parametrize("field", ["sinks", "layers", "digest"])
def test_a_field_that_is_stated_twice(artifact, both_refuse, field):
    """Two readers could take it for two caches."""
    file = artifact / METADATA_NAME
    text = file.read_text()
    value = json.dumps({**json.loads(text), **json.loads(text)["cache"]}[field])
    place = text.index(f'"{field}"')
    file.write_text(f'{text[:place]}"{field}": {value}, {text[place:]}')
    json.loads(file.read_text())
    both_refuse(f"'{field}' twice")
