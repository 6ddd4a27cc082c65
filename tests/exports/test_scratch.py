"""What kvfold removes and replaces: its own, and nothing that somebody else has put beside or into
OUT."""

import json
import os
import shutil
import signal
from pathlib import Path

import prepared
import pytest

from kvfold import KvfoldError, runtime
from kvfold.compress.work import work_folder
from kvfold.exports import scratch
from kvfold.exports.page.report import write_report
from kvfold.exports.place import check_free, new_folder, put_in_place
from kvfold.exports.reader import read_artifact, read_metadata
from kvfold.exports.scratch import MARK, NEW, OLD, remove_leftovers, scratch_folder, write_whole
from kvfold.exports.writer import install

# killed at a named moment while an artifact (argv 1) is written again to argv 2
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from kvfold.exports import place, writer
from kvfold.exports.reader import read_metadata
source, out, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def die(*args, **options): os.kill(os.getpid(), signal.SIGKILL)
def fill(folder):
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "kv_cache.json").unlink()
    if moment == "filling": die()
real = os.replace
def replace(a, b):
    if moment == "between" and Path(a).name == "new": die()
    real(a, b)
    if moment == "after" and Path(a).name == "new": die()
os.replace = replace
writer.install(out, read_metadata(source), fill)
"""


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def write_again(source: Path, out: Path) -> None:
    """Writes a copy of an artifact, as `kvfold compress` writes one."""

    def fill(folder: Path) -> None:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        (folder / "kv_cache.json").unlink()

    install(out, read_metadata(source), fill)


def killed(source: Path, out: Path, moment: str) -> None:
    done = prepared.python("kvfold", KILLED, source, out, moment)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def neighbours(tmp_path):
    """Folders of somebody's beside `out`, whose names kvfold might have thought of; gives a check
    that they are as they were."""
    fitting = json.dumps({"made_by": "kvfold", "for": "other"})
    for name, mark in {
        "out.partial": None,
        "out.old": None,
        "out.part-abcdefgh": None,
        "out.part-": "{}",
        "out.part-01234567": fitting,
        "output.part-01234567": json.dumps({"made_by": "kvfold", "for": "output"}),
    }.items():
        for inner in (".", NEW, OLD):
            (tmp_path / name / inner).mkdir(parents=True, exist_ok=True)
            (tmp_path / name / inner / "thesis.tex").write_text("irreplaceable")
        if mark is not None:
            (tmp_path / name / MARK).write_text(mark)
    (tmp_path / "out.part-link0000").symlink_to("out.old")
    (tmp_path / "out.part-file0000").write_text("irreplaceable")
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def check() -> None:
        assert {
            p: (tmp_path / p).read_bytes() for p in before if (tmp_path / p).is_file()
        } == before
        assert (tmp_path / "out.part-link0000").is_symlink()

    return check


@pytest.mark.parametrize("there", [False, True])
def test_a_neighbour_of_the_same_name_stays(tmp_path, tiny_artifact, neighbours, there):
    before = names(tmp_path)
    if there:
        shutil.copytree(tiny_artifact, tmp_path / "out")
    write_again(tiny_artifact, tmp_path / "out")
    assert read_artifact(tmp_path / "out") and names(tmp_path) == sorted([*before, "out"])
    shutil.rmtree(tmp_path / "out")
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("b")
    assert names(tmp_path) == sorted([*before, "out"]) and names(tmp_path / "out") == ["a"]
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out"):
        1 / 0  # noqa: B018
    neighbours()


@pytest.mark.skipif(scratch.fcntl is None, reason="no locks here")
@pytest.mark.parametrize("moment", ["filling", "between", "after"])
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path, tiny_artifact, neighbours, moment):
    before = names(tmp_path)
    out = shutil.copytree(tiny_artifact, tmp_path / "out")
    killed(tiny_artifact, out, moment)
    left = set(names(tmp_path)) - {*before, "out"}
    assert left and all(name.startswith("out.part-") for name in left)
    assert out.exists() == (moment != "between")
    if (
        moment == "between"
    ):  # nothing is lost: it is the older artifact again, even if the next run does not get far
        remove_leftovers(out)
        assert read_artifact(out)
    write_again(tiny_artifact, out)
    assert read_artifact(out)
    left = set(names(tmp_path)) - {*before, "out"}
    if (
        moment == "after"
    ):  # the moment between two renames: the older artifact is kept rather than guessed about
        [kept] = left
        assert read_artifact(tmp_path / kept / OLD)
    else:
        assert not left
    neighbours()


@pytest.mark.skipif(scratch.fcntl is None, reason="no locks here")
def test_what_is_in_use_or_holds_something_foreign_stays(tmp_path):
    with scratch_folder(tmp_path / "out") as folder:
        (folder / NEW).mkdir()
        remove_leftovers(tmp_path / "out")
        assert names(folder) == [MARK, NEW]
        (folder / "thesis.tex").write_text("irreplaceable")
    assert names(folder) == ["thesis.tex"]
    remove_leftovers(tmp_path / "out")
    assert names(folder) == ["thesis.tex"]


def test_two_at_once_have_folders_of_their_own(tmp_path):
    with scratch_folder(tmp_path / "out") as a, scratch_folder(tmp_path / "out") as b:
        assert a != b and a.parent == b.parent == tmp_path
    assert names(tmp_path) == []
    with scratch_folder(tmp_path / ("é" * 120)) as longest:
        assert longest.is_dir()


def test_an_older_artifact_that_cannot_come_back_is_kept(tmp_path, tiny_artifact, monkeypatch):
    out, new = (
        shutil.copytree(tiny_artifact, tmp_path / "out"),
        shutil.copytree(tiny_artifact, tmp_path / "made"),
    )
    real = os.replace

    def replace(a, b):
        if Path(b) == out:
            raise OSError("no")
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="no"):
            put_in_place(new, out)
    assert not out.exists()
    remove_leftovers(out)
    assert read_artifact(out) and names(tmp_path) == ["made", "out"]


# -- into OUT


def test_an_artifact_that_holds_something_foreign_is_not_replaced(tmp_path, tiny_artifact):
    out = shutil.copytree(tiny_artifact, tmp_path / "out")
    check_free(out, out)
    (out / "README.md").write_text("edited")
    (out / "kv_cache.json.abcd_123.part").write_text("of a killed `kvfold validate --update`")
    check_free(out, out)
    for name in ("thesis.tex", ".git/config", "kv_cache.json.part"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("irreplaceable")
        with pytest.raises(
            KvfoldError, match=f"'{out}'.*holds '{name.split('/')[0]}', which kvfold did not write"
        ):
            write_again(tiny_artifact, out)
        assert (out / name).read_text() == "irreplaceable" and names(tmp_path) == ["out"]
        (out / name).unlink()
        if "/" in name:
            (out / name).parent.rmdir()
    (out / "kv_cache.json").write_text("{}")  # of another tool, or damaged
    with pytest.raises(
        KvfoldError,
        match=r"which of its files are an artifact's can't be told.*choose another --out",
    ):
        check_free(out, out)


def test_save_pretrained_keeps_what_somebody_put_into_the_artifact(tmp_path, tiny_artifact):
    out = shutil.copytree(tiny_artifact, tmp_path / "out")
    (out / "thesis.tex").write_text("irreplaceable")
    model = runtime.load_pretrained(tiny_artifact, device="cpu")
    model.save_pretrained(out)
    assert (out / "thesis.tex").read_text() == "irreplaceable" and read_artifact(out)
    assert names(tmp_path) == ["out"]


# -- one file


def test_a_file_appears_whole_and_leaves_its_neighbours_alone(tmp_path, tiny_artifact):
    out = shutil.copytree(tiny_artifact, tmp_path / "out")
    for name in ("report.html.part", "kv_cache.json.part"):
        (out / name).write_text("irreplaceable")
    (out / "report.html").chmod(0o604)
    write_report(out)
    assert (out / "report.html").stat().st_mode & 0o777 == 0o604
    assert all(
        (out / name).read_text() == "irreplaceable"
        for name in ("report.html.part", "kv_cache.json.part")
    )
    before = names(out)

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_whole(out / "report.html", fail)
    assert names(out) == before and (out / "report.html").read_text() != "half"
    (out / "plain").write_text("")
    write_whole(out / "new", lambda path: path.write_text("x"))
    assert (out / "new").stat().st_mode == (out / "plain").stat().st_mode


# -- the work folder


@pytest.mark.parametrize("mark", ["", "{}", '{"key": "0123"}', "started 10:45", "link", "folder"])
def test_a_work_folder_with_somebody_elses_mark_is_refused(tmp_path, mark):
    work = tmp_path / "out.work"
    work.mkdir()
    (work / "thesis.tex").write_text("irreplaceable")
    if mark == "link":
        (tmp_path / "mark").write_text('{"made_by": "kvfold", "key": "key"}')
        (work / "run.json").symlink_to(tmp_path / "mark")
    elif mark == "folder":
        (work / "run.json").mkdir()
    else:
        (work / "run.json").write_text(mark)
    for resume in (False, True):
        with (
            pytest.raises(KvfoldError, match="was not made by kvfold"),
            work_folder(tmp_path / "out", "key", resume),
        ):
            pass
    assert (work / "thesis.tex").read_text() == "irreplaceable"


@pytest.mark.parametrize("mark", ["", "{", '{"made_by"', '{"made_by": "kvfold", "ke'])
def test_a_mark_that_a_crash_cut_short_is_ours(tmp_path, mark):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "run.json").write_text(mark)
    with work_folder(tmp_path / "out", "key", False):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "beside", "goes"),
    [(b"", False, True), (b'{"made_by": "kv', False, True), (b"mine", False, False), (b"", True, False)],
)  # fmt: skip
def test_a_run_that_was_killed_before_it_began_leaves_nothing(tmp_path, text, beside, goes):
    """Its mark was not there yet, but under a name that is kvfold's."""
    folder = tmp_path / "out.part-abcd_123"
    folder.mkdir()
    (folder / "kvfold-scratch.json.part").write_bytes(text)
    if beside:
        (folder / "notes").touch()
    remove_leftovers(tmp_path / "out")
    assert folder.exists() != goes
