"""A config.json whose hash fits and whose numbers would fill the memory or the day is refused
first, within a second; what no reader needs to read whole isn't read."""

import json
import os
import time

import pytest
from damaged import artifact, both_refuse, rehash  # noqa: F401  (fixtures)
from fuzz.run import peak_nbytes
from refusals import checkpoint, edit_config, kvfold, refused  # noqa: F401  (fixtures)

from kvfold.exports import files
from kvfold.exports.reader import read_artifact
from kvfold.exports.schema import TENSORS_NAME

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
SLOW = 5.0  # seconds; a tenth of one on a machine without other work


@pytest.fixture
def quickly(artifact, both_refuse):
    """Checks that both readers refuse the artifact soon, and with little memory."""
    read_artifact(artifact)  # imports what it needs

    def check(*words: str) -> None:
        before, start = peak_nbytes(restart=True), time.process_time()
        both_refuse(*words)
        assert time.process_time() - start < SLOW and peak_nbytes() - before < 64 << 20

    return check


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_labels": 10_001}, ["num_labels 10001", "10000 at the most"]),
        ({"num_hidden_layers": 10**7}, ["num_hidden_layers 10000000", "1000 at the most"]),
        ({"text_config": {"num_hidden_layers": 10**7}}, ["num_hidden_layers 10000000"]),
        ({"vocab_size": 10**8}, ["lm_head.weight", "shape"]),
        ({"intermediate_size": 2**31}, ["down_proj.weight", "shape"]),
        ({"intermediate_size": 2**62}, ["make no model"]),
        ({"attention_bias": True}, ["lacks the weight", "bias"]),
        ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 1e8}}, ["tables of"]),
        ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, ["make no model"]),
        ({"quantization_config": {}}, ["quantization_config"]),
        ({"text_config": 3}, ["config.json"]),
        ({"hidden_act": "nope"}, ["make no model", "nope"]),
    ],
)
def test_numbers_that_ask_for_more_than_there_is(artifact, quickly, fields, words):
    edit_config(artifact, **fields)
    rehash(artifact, "config.json")
    quickly(*words)


def test_more_layers_than_the_weights_have_tensors_for(artifact, quickly):
    from damaged import restate

    from kvfold.exports.account import cache_nbytes
    from kvfold.exports.reader import read_metadata

    metadata = read_metadata(artifact)
    layers = metadata.layers[:1] * 900
    cache = metadata.cache.model_copy(update={"num_layers": 900})
    whole = metadata.model_copy(update={"layers": layers, "cache": cache})
    at = metadata.account.at
    account = metadata.account.model_copy(
        update={"bytes": cache_nbytes(whole.geometry, whole.formats, at), "bytes_at": {}}
    )
    edit_config(artifact, num_hidden_layers=900)
    restate(artifact, layers=layers, cache=cache, account=account)
    rehash(artifact, "config.json")
    quickly("too few for the 900 layers")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "bits.png", "model.safetensors", TENSORS_NAME]
)
def test_a_file_of_two_gibibytes_of_nothing(artifact, quickly, monkeypatch, name):
    hashed = files.file_sha256
    monkeypatch.setattr(
        files, "file_sha256", lambda path: hashed(path) if path.stat().st_size < 1 << 30 else "?"
    )
    os.truncate(artifact / name, 2 << 30)
    quickly(name)


@pytest.mark.parametrize(
    "fields", [{"vocab_size": 10**8}, {"intermediate_size": 2**40}, {"mlp_bias": True}]
)
def test_a_checkpoint_is_asked_the_same_before_it_is_loaded(
    refused, checkpoint, monkeypatch, fields
):
    monkeypatch.setattr("kvfold.compress.models.stock_from_pretrained", None)
    refused(str(checkpoint), model=edit_config(checkpoint, **fields))


def test_a_config_of_many_megabytes(refused, checkpoint):
    stated = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**stated, "x": "A" * (17 << 20)}))
    refused("config.json", "16 MiB", model=checkpoint)
