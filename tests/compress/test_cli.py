"""The commands: what they print, where, and in what form."""

import errno
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import yaml

from kvfold import KvfoldError
from kvfold.compress.cli import main
from kvfold.compress.cli.table import describe
from kvfold.compress.progress import print_anything
from kvfold.exports.reader import read_artifact, read_metadata
from kvfold.exports.schema import dump_metadata

SIDE = {"format", "payload_bits", "transforms"}
INSPECT = {"format_version", "at", "bytes", "effective_bits", "payload_bits", "layers"}
EVAL = {
    "model", "artifact", "text", "windows", "seq_len", "effective_bits", "payload_bits", "nll_16bit", "nll", "dnll",
    "dnll_se", "kl", "top1_agreement",
}  # fmt: skip


@pytest.fixture
def kvfold(monkeypatch, capsys):
    """Runs a command that must succeed: (stdout, stderr)."""

    def run(*args) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["kvfold", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert stop.value.code == 0, err
        return out, err

    return run


def check_inspect(info: dict) -> None:
    """The contract's keys, and figures that agree with each other."""
    assert info.keys() >= INSPECT
    assert [layer["layer"] for layer in info["layers"]] == [0, 1, 2]
    for layer in info["layers"]:
        for side in ("key", "value"):
            assert layer[side].keys() >= SIDE
            assert isinstance(layer[side]["transforms"], list)
    elements = 2 * 3 * 2 * 16 * info["at"]
    assert info["effective_bits"] == pytest.approx(8 * info["bytes"] / elements)
    mean = (
        sum(layer[side]["payload_bits"] for layer in info["layers"] for side in ("key", "value"))
        / 6
    )
    assert info["payload_bits"] == pytest.approx(mean)
    pairs = {(layer["key"]["format"], layer["value"]["format"]) for layer in info["layers"]}
    sides = [{pair[i] for pair in pairs} for i in (0, 1)]
    assert info["kernels"] == {
        "pairs": len(pairs),
        "key_formats": len(sides[0]),
        "value_formats": len(sides[1]),
    }


@pytest.mark.parametrize("args", [[], ["--help"], ["compress", "--help"]])
def test_help(kvfold, args):
    out, err = kvfold(*args)
    assert "Usage: kvfold" in out
    assert ("--budget" if "compress" in args else "inspect") in out
    assert err == ""


def test_inspect_json_equals_the_account(kvfold, tiny_artifact):
    out, _ = kvfold("inspect", tiny_artifact, "--json")
    info = json.loads(out)
    check_inspect(info)
    account = json.loads((tiny_artifact / "kv_cache.json").read_text())["account"]
    for name in ("at", "bytes", "effective_bits", "payload_bits"):
        assert info[name] == account[name]
    assert info["at"] == 2048  # the model's maximum
    assert info["effective_bits"] <= 4.0


@pytest.mark.parametrize("at", [1, 27, 28, 35, 700, 100_000])
def test_inspect_at(kvfold, tiny_artifact, at):
    out, _ = kvfold("inspect", tiny_artifact, "--at", at, "--json")
    info = json.loads(out)
    check_inspect(info)
    assert info["at"] == at


def test_bytes_grow_with_length_and_bits_fall(tiny_artifact):
    infos = [describe(read_metadata(tiny_artifact), at) for at in (64, 512, 4096, 32768)]
    assert [i["bytes"] for i in infos] == sorted({i["bytes"] for i in infos})
    assert [-i["effective_bits"] for i in infos] == sorted({-i["effective_bits"] for i in infos})
    assert infos[-1]["effective_bits"] == pytest.approx(infos[-1]["payload_bits"], rel=0.05)
    with pytest.raises(KvfoldError, match="--at 0"):
        describe(read_metadata(tiny_artifact), 0)


def test_inspect_table(kvfold, tiny_artifact):
    out, _ = kvfold("inspect", tiny_artifact)
    metadata = read_metadata(tiny_artifact)
    assert f"{metadata.account.bytes} bytes" in out
    assert f"{metadata.account.effective_bits:.3f} effective bits" in out
    for k, v in metadata.formats:
        assert str(k) in out and str(v) in out
    for (k, v), layers in Counter(metadata.formats).items():
        assert f"  {k} / {v} × {layers}\n" in out
    assert f"Kernels: {len(set(metadata.formats))} pairs of formats" in out


def test_validate(kvfold, tiny_artifact):
    out, err = kvfold("validate", tiny_artifact)
    assert out.startswith(f"{tiny_artifact} is a valid artifact of tiny-llama, format_version 5")
    assert (out.count("\n"), err) == (1, "")


@pytest.mark.parametrize("budget", ["5", "200KiB@1024"])
def test_compress_ends_with_the_path(kvfold, tmp_path, tiny_folder, text_file, recipe_file, budget):
    out_dir = tmp_path / "deep" / "out"
    args = ["--budget", budget, "--out", out_dir, "--calib", text_file, "--recipe", recipe_file]
    out, err = kvfold("compress", tiny_folder, *args)
    assert out.splitlines()[-1] == str(out_dir)
    assert len(out.splitlines()) > 3 + 3  # a table with a row a layer stands above
    assert "kvfold: " in err and "kvfold: " not in out
    account = read_artifact(out_dir).metadata.account
    assert (
        account.effective_bits <= 5
        if budget == "5"
        else (account.at, account.bytes <= 200 * 1024) == (1024, True)
    )
    assert [p.name for p in out_dir.parent.iterdir()] == ["out"]


def test_compress_json_is_one_object(kvfold, tmp_path, tiny_folder, text_file, recipe_file):
    args = [
        "--budget",
        "6",
        "--calib",
        text_file,
        "--recipe",
        recipe_file,
        "--seed",
        7,
        "--context",
        1024,
    ]
    out, _ = kvfold("compress", tiny_folder, *args, "--out", tmp_path / "out", "--json")
    info = json.loads(out)
    check_inspect(info)
    assert info.pop("artifact") == str(tmp_path / "out")
    assert info == describe(read_metadata(tmp_path / "out"))
    assert info["at"] == 1024
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["seed"] == 7


def test_default_output_is_named_after_model_and_budget(
    kvfold, tmp_path, monkeypatch, tiny_folder, text_file, recipe_file
):
    monkeypatch.chdir(tmp_path)
    out, _ = kvfold(
        "compress",
        tiny_folder,
        "--budget",
        "200KiB@1024",
        "--calib",
        text_file,
        "--recipe",
        recipe_file,
    )
    assert out.splitlines()[-1] == "artifacts/tiny-llama-200KiB-at-1024"
    read_artifact(tmp_path / out.splitlines()[-1])


def test_eval_json(kvfold, tmp_path, tiny_artifact, tiny_folder, text_file):
    file = tmp_path / "eval.json"
    args = ["--text", text_file, "--windows", 2, "--seq-len", 256, "--json", file]
    out, _ = kvfold("eval", tiny_artifact, *args)
    found = json.loads(file.read_text())
    assert found.keys() >= EVAL
    assert (found["model"], found["artifact"], found["text"]) == ("tiny-llama", "tiny", "text.txt")
    assert (found["windows"], found["seq_len"]) == (2, 256)
    assert found["dnll"] == pytest.approx(found["nll"] - found["nll_16bit"], abs=1e-9)
    assert found["effective_bits"] == pytest.approx(
        describe(read_metadata(tiny_artifact), 256)["effective_bits"]
    )
    assert 0 < found["kl"] < 1
    assert 0.3 < found["top1_agreement"] < 1
    assert all(math.isfinite(v) for v in found.values() if isinstance(v, float))
    assert f"{found['kl']:.4f}" in out
    kvfold("eval", tiny_artifact, *args, "--against", tiny_folder)
    against = json.loads(file.read_text())
    assert against["nll"] == found["nll"]
    assert against["nll_16bit"] == pytest.approx(
        found["nll_16bit"], abs=0.05
    )  # the same model before its weights were rounded again


def test_one_window_has_no_standard_error(kvfold, tmp_path, tiny_artifact, text_file):
    file = tmp_path / "eval.json"
    out, err = kvfold(
        "eval", tiny_artifact, "--text", text_file, "--windows", 1, "--seq-len", 256, "--json", file
    )
    found = json.loads(file.read_text())
    assert found["dnll_se"] is found["kl_se"] is None
    assert "±" not in out and "UserWarning" not in err


def test_eval_refuses_a_file_that_cannot_be_written_before_it_measures(
    monkeypatch, capsys, tmp_path, tiny_artifact
):
    file = tmp_path / "missing" / "eval.json"
    monkeypatch.setattr(sys, "argv", ["kvfold", "eval", str(tiny_artifact), "--json", str(file)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"kvfold: --json '{file}'")


def test_generate(kvfold, tiny_artifact):
    prompt = "the cache of a long sequence holds keys and values"
    out, err = kvfold("generate", tiny_artifact, "--prompt", prompt, "--max-new-tokens", 24)
    assert len(out.strip()) > 0 and prompt not in out
    assert f"{len(prompt) + 24 - 1} tokens in a cache of" in err
    assert kvfold("generate", tiny_artifact, "--prompt", prompt, "--max-new-tokens", 24)[0] == out
    warm = ["--max-new-tokens", 24, "--temperature", 2, "--seed"]
    sampled = [
        kvfold("generate", tiny_artifact, "--prompt", prompt, *warm, seed)[0] for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def renamed(folder, model: str):
    """An artifact that states another model's name."""
    metadata = read_metadata(folder)
    provenance = metadata.provenance.model_copy(update={"model": model})
    (folder / "kv_cache.json").write_text(
        dump_metadata(metadata.model_copy(update={"provenance": provenance}))
    )
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "a [/bold] b",
        "[v2] [red]x[/red]",
        "\x1b[31mred\x1b[0m",
        "two\nlines",
        "\u202eright to left",
        "模型 é",
    ],
)
def test_names_are_printed_as_they_are(kvfold, tmp_path, tiny_artifact, name):
    """No markup is read out of them, and nothing reaches the terminal that would move its cursor or
    change its colours."""
    folder = renamed(shutil.copytree(tiny_artifact, tmp_path / "artifact"), name)
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    assert kvfold("inspect", folder)[0].splitlines()[0].startswith(f"{shown}: one sequence of ")
    assert f"a valid artifact of {shown}, " in kvfold("validate", folder)[0]
    assert json.loads(kvfold("inspect", folder, "--json")[0])["model"] == name


def test_sentences_move_no_cursor(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["validate", "no\x1b[2Jsuch"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "\x1b" not in err and r"'no\x1b[2Jsuch'" in err


def test_stdout_that_is_closed(monkeypatch, tiny_artifact):
    for args in (["inspect", str(tiny_artifact)], ["validate", str(tiny_artifact)]):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "stdout", None)
            main(args)
        assert not stop.value.code


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_stdout_that_is_full(monkeypatch, capsys, tiny_artifact, number):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(number, "full")

    calls: list[tuple] = []
    monkeypatch.setattr(os, "dup2", lambda *args: calls.append(args))
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(SystemExit) as stop:
        main(["validate", str(tiny_artifact)])
    assert stop.value.code == 1 and calls
    assert (
        capsys.readouterr().err == "kvfold: what was to be printed could not be written (full).\n"
    )


# a fork for each way, which ends as an interpreter ends
LATE = """
import json, os, sys
from kvfold.compress import cli
from kvfold.compress.exit_codes import exit_code
found = {}
for how in sys.argv[1:]:
    ends = [os.pipe(), os.pipe()]  # stdout, stderr
    if how != "a connection":
        os.close(ends[0][0])  # its reader is gone
    child = os.fork()
    if child == 0:
        break
    for _, end in ends:
        os.close(end)
    with open(ends[1][0]) as err:
        said = err.read()
    found[how] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said
else:
    print(json.dumps(found))
    sys.exit()
for number, (_, write) in enumerate(ends, 1):
    os.dup2(write, number)
    os.close(write)
def show():
    if how == "print":
        print("x" * 100_000)
    elif how == "rich":
        cli.console().print("x")
    elif how == "flushed at the end":
        print("x")
    else:
        raise BrokenPipeError("of a connection")
sys.exit(exit_code(show, ["inspect"]))
"""


def test_a_reader_that_has_seen_enough():
    """`kvfold … | head -1` has done all the same; what breaks elsewhere is a failure."""
    ways = ["print", "rich", "flushed at the end", "a connection"]
    done = subprocess.run(
        [sys.executable, "-c", LATE, *ways], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    code, err = found.pop("a connection")
    assert code == 1 and "BrokenPipeError" in err
    assert found == {how: [0, ""] for how in ways[:3]}


def test_figures_are_in_their_file_before_they_are_printed(
    monkeypatch, capsys, tiny_artifact, text_file, tmp_path
):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "dup2", lambda *args: None)
    monkeypatch.setattr(sys, "stdout", Full())
    options = [
        "--text",
        text_file,
        "--windows",
        "1",
        "--first-window",
        "0",
        "--seq-len",
        "128",
        "--json",
        tmp_path / "e.json",
    ]
    with pytest.raises(SystemExit) as stop:
        main(["eval", *map(str, [tiny_artifact, *options])])
    assert stop.value.code == 1 and "could not be written" in capsys.readouterr().err
    assert json.loads((tmp_path / "e.json").read_text())["windows"] == 1


def test_a_locale_that_lacks_the_letters(monkeypatch, tmp_path, tiny_artifact):
    """Figures are shown with escapes, and a path with the bytes that it has."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="surrogateescape", write_through=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        print_anything()
        print("3 × \udcc3\udcb6", end="")
        with pytest.raises(SystemExit) as stop:
            main(["inspect", str(tiny_artifact)])
    assert not stop.value.code and raw.getvalue().startswith(b"3 \\xd7 \xc3\xb6")
    assert b"pairs of formats" in raw.getvalue()
