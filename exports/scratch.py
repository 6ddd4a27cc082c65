"""Folders and files in the making: beside what they become, under names that nobody has,
and removed only where kvfold made them.

    OUT.part-XXXXXXXX/ kvfold-scratch.json    says what made the folder, and for which OUT; locked
        as long as that process lives new/ old/ spent/       what is to become OUT; what OUT was,
        while the two are exchanged; the same, to be removed

A process that is killed leaves its folder; the next that writes the same OUT removes it,
if it bears that mark and no lock.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]

NEW, OLD, SPENT = "new", "old", "spent"
MARK = "kvfold-scratch.json"
PART = ".part-"
LONGEST_ENDING = len(PART) + 8  # bytes that are added to OUT's name


def _mark(place: Path) -> bytes:
    return json.dumps({"made_by": "kvfold", "for": place.name}).encode()


@contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, in which NEW, OLD and SPENT may be made. It goes when the block
    ends, with NEW and SPENT in it; OLD stays and keeps it, and so does what somebody else has put
    there.

    Args:
        place: what is in the making, absolute and without links.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    folder, lock = _begin(place)
    try:
        yield folder
    finally:
        os.close(lock)
        _remove(folder)


def _begin(place: Path) -> tuple[Path, int]:
    """A new folder with its mark, and the mark's lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=place.name + PART, dir=place.parent))
        begun, lock = folder / f"{MARK}.part", -1
        try:
            lock = os.open(begun, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            if fcntl is not None:
                with suppress(OSError):  # no locks here: then nobody takes it for a leftover either
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(lock, _mark(place))
            os.replace(begun, folder / MARK)  # it appears locked
            return folder, lock
        except BaseException as error:
            if lock >= 0:
                os.close(lock)
            _remove(folder)
            # else another run has taken it for a leftover, in the moment before it was locked
            if not isinstance(error, FileNotFoundError) or not place.parent.is_dir():
                raise


def remove_leftovers(place: Path) -> None:
    """Removes scratch folders of runs that were killed while they made `place`. Where one was
    killed between moving an older `place` away and the new one in, the older one comes back."""
    if fcntl is None or not place.parent.is_dir():
        return
    for folder in sorted(place.parent.iterdir()):
        if (
            folder.name.startswith(place.name + PART)
            and not folder.is_symlink()
            and folder.is_dir()
        ):
            with suppress(OSError):
                _remove_leftover(folder, place)


def _remove_leftover(folder: Path, place: Path) -> None:
    begun = f"{MARK}.part"  # all that is there of a process that was killed before it began
    alone = [path.name for path in folder.iterdir()] == [begun]
    lock = os.open(folder / (begun if alone else MARK), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else somebody is at work there
        text = os.read(lock, 4096)
        if text != _mark(place) and not (alone and _mark(place).startswith(text)):
            return
        if (folder / OLD).is_dir() and not place.exists():
            os.replace(folder / OLD, place)
        _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    for name in (NEW, SPENT):
        shutil.rmtree(folder / name, ignore_errors=True)
    if any((folder / name).exists() for name in (NEW, OLD, SPENT)):
        return  # something of ours is left: so is the mark
    for name in (f"{MARK}.part", MARK):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written beside `path` and renamed to it, so that it appears complete;
    it gets the rights that a new file has here.

    Args:
        write: given a new file's path, writes it.
    Raises:
        OSError, SafetensorError: what `write` or the system says; nothing is left behind.
    """
    stream, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
    os.close(stream)
    scratch = Path(name)
    try:
        write(scratch)
        scratch.chmod(_rights(path))
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def is_part(name: str, whole: str) -> bool:
    """Whether a file of this name is what a process that was killed in `write_whole` has left of
    `whole`."""
    return re.fullmatch(re.escape(whole) + r"\.[a-z0-9_]{8}\.part", name) is not None


def _rights(path: Path) -> int:
    """Those of the file that is replaced, or of a new one."""
    with suppress(OSError):
        return path.stat().st_mode & 0o777
    mask = os.umask(0)  # there is no other way to read it
    os.umask(mask)
    return 0o666 & ~mask
