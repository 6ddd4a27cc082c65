"""Bad input gets exit code 2 and one sentence that names the value, and leaves nothing behind."""

import errno
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections import namedtuple

import prepared
import pytest
import torch
from refusals import check_refusal, checkpoint, edit_config, kvfold, refused  # noqa: F401  (fixtures)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, DeepseekV3Config

from kvfold.compress import calibrate
from kvfold.errors import KVBudgetExceeded
from kvfold.exports import writer
from kvfold.exports.reader import read_artifact

# -- model


@pytest.mark.parametrize(
    "model", ["smollm9-1b", "nobody/no-such-model", "./no/such/folder", "/no/such/folder", "a/b/c"]
)
def test_model_that_is_not_there(refused, model):
    refused(f"'{model}'", model=model)


def test_model_that_is_a_file(refused, text_file):
    refused(text_file, "not a checkpoint folder", model=text_file)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_model_folder_without(refused, checkpoint, name):
    (checkpoint / name).unlink()
    refused(checkpoint, f"no {name}", model=checkpoint)


def test_model_that_is_compressed_already(refused, tiny_artifact):
    refused(tiny_artifact, "already compressed", model=tiny_artifact)


@pytest.mark.parametrize("size", [0, 5, 8, 500, -1])
def test_truncated_weights(refused, checkpoint, size):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused("model.safetensors", model=checkpoint)


@pytest.mark.parametrize("header", [b"[]", b"{}", b'{"a": {}}', b'{"a": 1}', b"nonsense"])
def test_weights_with_a_senseless_header(refused, checkpoint, header):
    (checkpoint / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(8)
    )
    refused("model.safetensors", "not a readable safetensors file", model=checkpoint)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": "part-1.safetensors"}}']
)
def test_senseless_index(refused, checkpoint, content):
    (checkpoint / "model.safetensors.index.json").write_text(content)
    refused(
        "part-1.safetensors" if "part" in content else "model.safetensors.index.json",
        model=checkpoint,
    )


@pytest.mark.parametrize("fault", ["not the shape", "lacks"])
def test_weights_that_do_not_fit(refused, checkpoint, fault):
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    if fault == "lacks":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(8, 64, dtype=torch.bfloat16)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    refused("k_proj.weight", fault, model=checkpoint)


@pytest.mark.parametrize(("config", "reason"), [(DeepseekV3Config, "MLA"), (BloomConfig, "ALiBi")])
def test_family_that_is_refused_by_name(refused, tmp_path, config, reason):
    config().save_pretrained(tmp_path / "model")
    refused(f"'{config.model_type}'", reason, "llama", model=tmp_path / "model")


def test_unknown_family(refused, checkpoint):
    refused("'frobnicate'", "llama", model=edit_config(checkpoint, model_type="frobnicate"))


def test_code_in_a_model_folder_is_not_run(refused, checkpoint):
    edit_config(checkpoint, model_type="baichuan", auto_map={"AutoConfig": "configuration.Config"})
    (checkpoint / "configuration.py").write_text("raise SystemExit('ran')")
    refused("'baichuan'", "ALiBi", model=checkpoint)


def test_head_dim_that_cannot_be_packed(refused, checkpoint):
    refused("head_dim 12", "multiple of 8", model=edit_config(checkpoint, head_dim=12))


@pytest.mark.parametrize(
    "fields", [{"hidden_size": "wide"}, {"num_attention_heads": 5}, {"dtype": "nonsense"}]
)
def test_config_that_makes_no_sense(refused, checkpoint, fields):
    refused(checkpoint, *map(str, fields.values()), model=edit_config(checkpoint, **fields))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model_type": 3}', b"\xff\xfe"])
def test_config_that_is_none(refused, checkpoint, content):
    (checkpoint / "config.json").write_bytes(content)
    refused("config.json", checkpoint, model=checkpoint)


# -- budget


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("abc", ["'abc'"]), ("", ["''"]), ("0", ["'0'"]), ("-1", ["'-1'"]), ("nan", ["'nan'"]), ("2,5", ["'2,5'"]),
        ("17", ["'17'", "16"]), ("inf", ["'inf'", "16"]), ("1GiB@512", ["'1GiB@512'", "16"]),
        ("512MiB@x", ["'512MiB@x'", "'x'"]), ("512MiB@0", ["'0'"]), ("512MiB@-5", ["'-5'"]), ("512MiB@²", ["'²'"]),
        ("512QiB@512", ["512QiB"]), ("-1MiB@512", ["-1MiB"]), ("512MiB@4096", ["4096", "2048"]), ("0.01", ["'0.01'"]),
    ],
)  # fmt: skip
def test_budget(refused, budget, words):
    refused(*words, budget=budget)


@pytest.mark.parametrize("context", [0, -1, "x", 4096])
def test_context(refused, context):
    refused(4096 if context == 4096 else "--context", context=context)


@pytest.mark.parametrize("key", ["{}", "{transform: none}", "{transform: reorder, group_size: 8}"])
def test_smallest_budget_named_is_the_smallest_that_works(
    refused, kvfold, tmp_path, tiny_folder, text_file, key
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "{window: 24, page_tokens: 8, sinks: 3, calibration: {num_sequences: 1, seq_len: 256}, "
        f"sensitivity: {{num_sequences: 1, seq_len: 64}}, key: {key}}}"
    )
    last = refused("'1KiB@512'", "out of reach", budget="1KiB@512", recipe=recipe)
    bits, nbytes = re.search(r"at least ([\d.]+) bits or (\d+)B@512", last).groups()  # type: ignore[union-attr]
    refused("out of reach", budget=f"{int(nbytes) - 1}B@512", recipe=recipe)
    refused("out of reach", budget=f"{float(bits) - 0.002:.3f}", context=512, recipe=recipe)
    for i, budget in enumerate((f"{bits}", f"{nbytes}B@512")):
        out = tmp_path / f"least-{i}"
        options = [
            "--context=512",
            f"--out={out}",
            f"--calib={text_file}",
            f"--recipe={recipe}",
            "--accept-loss",
        ]
        assert kvfold("compress", tiny_folder, f"--budget={budget}", *options)[0] == 0
        assert read_artifact(out).metadata.account.bytes == int(nbytes)


# -- text, recipe, device


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"x" * 255, "255 tokens"),
        (b"\xff\xfe\x00" * 999, "UTF-8"),
    ],
)
def test_text(refused, tmp_path, content, word):
    (tmp_path / "some.txt").write_bytes(content)
    refused("some.txt", word, calib=tmp_path / "some.txt")


@pytest.mark.parametrize(
    "calib", ["missing.txt", "/no/such/file", "nobody/no-such-dataset:main:train"]
)
def test_text_that_is_not_there(refused, calib):
    refused(f"'{calib}'", calib=calib)


@pytest.mark.parametrize(
    ("content", "word"),
    [("windw: 3", "windw"), ("key: {bit: [1]}", "key.bit"), ("page_tokens: 12", "page_tokens"), ("sinks: -1", "sinks"),
     ("windw: 3", "did you mean 'window'?"), ("sensitivity: {probe: 3}", "'probes'"),
     ("calibration: {xyzzy: 3}", "seq_len"),
     ("sinks: true", "true"), ("sinks: '3'", "without quotes"), ("window: '24'", "without quotes"),
     ("sinks: 1:30", "1:30"), ("key: {levels: [4, '16']}", "'16'"), ("key: {clip: 'yes'}", "key.clip"),
     ("sinks: 3\nsinks: 4", "'sinks' is there twice"), ("[]", "mapping"),
     ("[" * 5000, "YAML"), ("sensitivity: {probes: 1000000000}", "probes"), (f"seed: {10**29}", "seed"),
     (f"sinks: {10**12}", "sinks"),
     (f"calibration: {{spread: {10**24}}}", "spread"), ("page_tokens: 10000", "page_tokens"),
     ("tied: 1", "neither true nor false"),
     ("a: [", "YAML"), ("- 1", "mapping"), ("key: {transform: magic}", "key.transform"), (None, "cannot be read")],
)  # fmt: skip
def test_recipe(refused, tmp_path, content, word):
    path = tmp_path / "some.yaml"
    if content:
        path.write_text(content)
    refused("some.yaml", word, recipe=path)


@pytest.mark.parametrize("device", ["nonsense", "cuda:77", ""])
def test_device(refused, device):
    refused(f"'{device}'", device=device)


# -- output


def test_output_that_is_not_ours(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("irreplaceable")
    refused(tmp_path / "out", "not an artifact")


def test_output_that_is_a_file(refused, tmp_path):
    (tmp_path / "out").write_text("irreplaceable")
    refused(tmp_path / "out", "is a file")
    refused(tmp_path / "out", "is a file", out=tmp_path / "out" / "deeper")


def test_work_folder_that_is_not_ours(refused, tmp_path):
    (tmp_path / "out.work").write_text("irreplaceable")
    refused(tmp_path / "out.work")
    (tmp_path / "out.work").unlink()
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.tex").write_text("irreplaceable")
    refused(tmp_path / "out.work")


@pytest.mark.parametrize("out", [".", ".."])
def test_output_without_a_name(refused, tmp_path, monkeypatch, out):
    (tmp_path / "empty" / "empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / ("empty" if out == "." else ""))
    refused(f"'{out}'", out=out)


def test_output_in_a_read_only_folder(refused, tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "locked")
    refused("read-only", out=tmp_path / "locked" / "out")


def test_no_disk_space(refused, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused("1000 B", "disk space")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), SafetensorError("I/O error: full (os error 28)")]
)
def test_disk_that_fills_up(refused, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(writer, "save_file", fail)
    refused("filled up", "out")


# -- usage


@pytest.mark.parametrize(
    ("args", "word"),
    [(["compress"], "model"), (["compress", "m", "--bugdet=2"], "--bugdet"), (["compress", "m", "--seed=x"], "--seed"),
     (["compress", "m", "--seed=-1"], "--seed"), (["compress", "m", "n"], "(n)"), (["frobnicate"], "frobnicate"),
     (["compress", "m", "--budget"], "--budget"), (["eval", "a", "--windows=0"], "--windows"),
     (["generate", "a"], "--prompt"),
     (["inspect", "no-such-folder"], "no-such-folder"), (["validate", "no-such-folder"], "no-such-folder"),
     (["eval", "no/such/folder"], "no/such/folder"), (["generate", "no/such/folder", "--prompt=a"], "no/such/folder")],
)  # fmt: skip
def test_usage(kvfold, args, word):
    check_refusal(*kvfold(*args), word)


def test_as_a_process(tmp_path):
    args = ["compress", "smollm9-1b"]
    done = subprocess.run(
        [sys.executable, "-m", "kvfold.compress.cli", *args],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    check_refusal(done.returncode, done.stdout, done.stderr, args[1])
    args = ["compress", "--frobnicate"]
    done = prepared.command(*args, cwd=tmp_path)
    check_refusal(done.returncode, done.stdout, done.stderr, args[1])
    assert not list(tmp_path.iterdir())


def test_folder_without_tokenizer(refused, tiny_folder, tmp_path):
    folder = tmp_path / "mute"
    shutil.copytree(tiny_folder, folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(str(folder), "tokenizer", model=folder)


def test_disk_that_fills_up_while_calibrating(refused, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(calibrate, "save_file", fail)
    refused("filled up", "out")


def test_parents_that_were_made_go_too(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(
        writer, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    refused("filled up", out=tmp_path / "new" / "er" / "out")


def test_a_length_that_no_budget_reaches(refused):
    assert "16-bit sinks" in refused("'16'", "longer context", budget="16", context="16")


def test_device_without_memory(refused):
    refused("'meta'", device="meta")


def test_a_message_is_one_line_whatever_it_quotes():
    quoted = ValueError(
        "Class validation error for 'architecture':\n    ValueError: 64 is not\r\n a multiple of 3."
    )
    error = KVBudgetExceeded(f"'two  spaces' cannot be read ({quoted}); give another file.")
    assert str(error) == (
        "'two  spaces' cannot be read (Class validation error for 'architecture': ValueError: 64 is not "
        "a multiple of 3.); give another file."
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
