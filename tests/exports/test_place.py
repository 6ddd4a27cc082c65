"""OUT and what lies beside it: links, mount points, two runs at once, and nothing that is lost at
the last moment."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import NIGHTLY
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kvfold import KvfoldError
from kvfold.compress import pipeline
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.compress.work import model_fingerprint, work_folder
from kvfold.exports import place
from kvfold.exports.place import full_disk, is_mount, new_folder, put_in_place, resolve_output
from kvfold.exports.reader import is_artifact, read_artifact


@pytest.fixture
def run(tiny_folder, text_file, recipe_file):
    """Compresses the tiny model into a folder."""

    def call(out: Path, model: Path = tiny_folder, **options):
        return compress(
            str(model), "4.0", out, calib=str(text_file), recipe=load_recipe(recipe_file), **options
        )

    return call


@pytest.fixture
def interrupted(monkeypatch, run):
    """A run that was interrupted when all was found, and before anything was written."""

    def call(out: Path, **options) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(
                pipeline, "export", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            with pytest.raises(KeyboardInterrupt):
                run(out, **options)
        return out.with_name(out.name + ".work")

    return call


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


# -- links


@pytest.mark.parametrize("there", ["nothing", "empty folder", "artifact"])
def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path, tiny_artifact, run, there):
    disk = tmp_path / "bigger" / "disk"
    if there == "empty folder":
        disk.mkdir(parents=True)
    elif there == "artifact":
        shutil.copytree(tiny_artifact, disk)
        (disk / "README.md").write_text("old")
    (tmp_path / "out").symlink_to("bigger/disk")
    assert run(tmp_path / "out").path == disk
    assert names(tmp_path) == ["bigger", "out"] and (tmp_path / "out").is_symlink()
    assert names(tmp_path / "bigger") == ["disk"]
    assert digest(tmp_path / "out").keys() == digest(tiny_artifact).keys()
    assert (disk / "README.md").read_text() != "old"


def test_a_link_to_what_is_not_ours_or_to_itself(tmp_path, run):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("irreplaceable")
    (tmp_path / "out").symlink_to("mine")
    with pytest.raises(KvfoldError, match="is not an artifact; choose another --out"):
        run(tmp_path / "out")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(KvfoldError, match=r"'.*a' is a link that leads to itself"):
        run(tmp_path / "a")
    with pytest.raises(KvfoldError, match="more than 240 bytes"):
        run(tmp_path / ("é" * 121))
    assert names(tmp_path) == ["a", "b", "mine", "out"] and names(tmp_path / "mine") == [
        "thesis.tex"
    ]


def test_a_link_that_is_turned_while_the_run_lasts_moves_nothing(tmp_path, run, monkeypatch):
    (tmp_path / "out").symlink_to("first")
    real = pipeline.export

    def turn(*args):
        (tmp_path / "out").unlink()
        (tmp_path / "out").symlink_to("second")
        return real(*args)

    monkeypatch.setattr(pipeline, "export", turn)
    run(tmp_path / "out")
    assert names(tmp_path) == ["first", "out"] and is_artifact(tmp_path / "first")


# -- mount points


def test_a_mount_point_is_refused_before_the_model_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(place, "is_mount", lambda path: path == tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    for out in (tmp_path / "out", tmp_path / "link"):
        with pytest.raises(KvfoldError, match=f"'{out}' is a mount point.*'{out}/artifact'"):
            compress("no such model", "4.0", out)
        with pytest.raises(KvfoldError, match="is a mount point"), new_folder(out):
            pass
    assert names(tmp_path) == ["link"]


def test_what_is_a_mount_point(tmp_path):
    assert is_mount(Path("/")) and not is_mount(tmp_path) and not is_mount(tmp_path / "nothing")
    if Path("/proc/self/mountinfo").exists():
        assert is_mount(Path("/proc"))
    inner = tmp_path / "with space"
    inner.mkdir()
    if subprocess.run(["mount", "--bind", inner, inner], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    try:
        assert is_mount(inner) and not os.path.ismount(
            inner
        )  # of the same disk, as docker's -v may be
        with pytest.raises(KvfoldError, match="mount point"):
            resolve_output(inner)
        assert resolve_output(inner / "artifact") == inner / "artifact"
    finally:
        subprocess.run(["umount", inner], check=True)


# -- the rename


def test_an_artifact_that_cannot_be_replaced_comes_back(tmp_path, tiny_artifact, monkeypatch):
    out = shutil.copytree(tiny_artifact, tmp_path / "out")
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "thesis.tex").write_text("irreplaceable")
    made = shutil.copytree(tiny_artifact, tmp_path / "out.partial")
    real = os.replace

    def fail(source, target):
        if Path(source) == made:
            raise OSError(errno.EBUSY, "busy")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="busy"):
            put_in_place(made, out)
    assert names(tmp_path) == ["out", "out.old", "out.partial"] and digest(out) == digest(
        tiny_artifact
    )
    put_in_place(made, out)
    assert names(tmp_path) == ["out", "out.old"] and names(tmp_path / "out.old") == ["thesis.tex"]


def test_what_came_there_meanwhile_stays_and_so_does_what_was_found(
    tmp_path, tiny_artifact, run, monkeypatch
):
    out = tmp_path / "tiny"  # the card states it
    real = pipeline.export

    def come(*args):
        out.mkdir()
        (out / "thesis.tex").write_text("irreplaceable")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "export", come)
        with pytest.raises(
            KvfoldError,
            match=r"is not an artifact.*tiny\.work': run the same command again with --resume",
        ):
            run(out)
    assert names(tmp_path) == ["tiny", "tiny.work"] and names(out) == ["thesis.tex"]
    shutil.rmtree(out)
    monkeypatch.setattr(
        "kvfold.compress.search.fisher.directions", None
    )  # nothing is measured again
    run(out, resume=True)
    assert digest(out) == digest(tiny_artifact) and names(tmp_path) == ["tiny"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_way_to_be_full(tmp_path, number):
    for error in (
        OSError(number, "x"),
        SafetensorError(f"I/O error: x (os error {number})"),
        Exception(f"x (os error {number})"),
    ):
        words = full_disk(error)
        assert words
        with pytest.raises(KvfoldError, match=words.split()[0]), new_folder(tmp_path / "out"):
            raise error
        with (
            pytest.raises(KvfoldError, match=words.split()[0]),
            work_folder(tmp_path / "new" / "out", "key", False),
        ):
            raise error
    assert full_disk(OSError(errno.EACCES, "x")) is None and full_disk(SafetensorError("x")) is None
    assert names(tmp_path) == []


# -- two runs


def test_one_run_at_a_time(tmp_path):
    out = tmp_path / "out"
    with work_folder(out, "one", False) as work:
        (work / "found").write_text("mine")
        for resume in (False, True):
            with (
                pytest.raises(KvfoldError, match=r"Another run is writing '.*out'"),
                work_folder(out, "two", resume),
            ):
                pytest.fail("two runs at once")
        assert (work / "found").read_text() == "mine"
        with work_folder(tmp_path / "other", "two", False):
            pass
    assert names(tmp_path) == []
    with work_folder(out, "two", False):
        pass


def test_an_interrupted_run_leaves_no_lock(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), work_folder(out, "key", False) as work:
        (work / "found").write_text("mine")
        raise KeyboardInterrupt
    with work_folder(out, "key", True) as work:
        assert (work / "found").read_text() == "mine"
    assert names(tmp_path) == []


# -- what --resume may go on with


def touch_back(file: Path, change) -> None:
    """Changes a file, but not its size and time."""
    before = file.stat()
    change(file)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def other_weight(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, file, metadata={"format": "pt"})


def other_theta(file: Path) -> None:
    config = json.loads(file.read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    file.write_text(json.dumps(config, indent=2))


@pytest.mark.parametrize("changed", ["weights", "config", "generation config", "chat template"])
def test_a_changed_model_is_not_gone_on_with(tmp_path, tiny_folder, run, interrupted, changed):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    work = interrupted(tmp_path / "out", model=model)
    before = digest(work)
    if changed == "weights":
        touch_back(model / "model.safetensors", other_weight)
    elif changed == "config":
        other_theta(model / "config.json")
    elif changed == "generation config":
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    else:
        (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(KvfoldError, match=r"belongs to a run with another model.*drop --resume"):
        run(tmp_path / "out", model=model, resume=True)
    assert digest(work) == before


def test_a_model_that_was_only_copied_is_the_same(
    tmp_path, tiny_folder, tiny_artifact, run, interrupted
):
    shutil.copytree(tiny_folder, tmp_path / "a" / "tiny-llama")
    interrupted(tmp_path / "tiny", model=tmp_path / "a" / "tiny-llama")
    shutil.move(tmp_path / "a", tmp_path / "b")
    for file in (tmp_path / "b" / "tiny-llama").iterdir():
        os.utime(file)
    run(tmp_path / "tiny", model=tmp_path / "b" / "tiny-llama", resume=True)
    assert digest(tmp_path / "tiny") == digest(tiny_artifact)
    assert model_fingerprint(tmp_path / "b" / "tiny-llama") == model_fingerprint(tiny_folder)


@pytest.mark.parametrize("damage", [b"", b"not this", None, "folder"])
def test_what_is_damaged_is_computed_again(tmp_path, tiny_artifact, run, interrupted, damage):
    begun = shutil.copytree(interrupted(tmp_path / "tiny"), tmp_path / "kept")
    shutil.rmtree(tmp_path / "tiny.work")
    every = ("stats_001.safetensors", "fisher.json", "hidden.json", "stats_000.safetensors")
    for names_of in [(name,) for name in every] if NIGHTLY else (every[::2], every[1::2]):
        work = shutil.copytree(begun, tmp_path / "tiny.work")
        for name in names_of:
            file = work / name
            if damage is None:
                file.unlink()
            elif damage == "folder":
                file.unlink()
                file.mkdir()
            else:
                file.write_bytes(damage)
        run(tmp_path / "tiny", resume=True)
        assert digest(tmp_path / "tiny") == digest(tiny_artifact), names_of
        assert names(tmp_path) == ["kept", "tiny"]
        shutil.rmtree(tmp_path / "tiny")


def test_a_damaged_mark_is_named(tmp_path, run, interrupted):
    work = interrupted(tmp_path / "out")
    (work / "run.json").write_text("{")
    with pytest.raises(KvfoldError, match=r"run\.json' is damaged.*drop --resume"):
        run(tmp_path / "out", resume=True)
    run(tmp_path / "out")
    assert read_artifact(tmp_path / "out") and names(tmp_path) == ["out"]
