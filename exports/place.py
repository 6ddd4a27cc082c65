"""Where an artifact or an export goes: found out once, checked before anything is computed,
and taken by rename when all is written.

A link is followed, so that what it leads to is written and the link stays. A folder that something
is mounted on can't be renamed onto, so it is refused at once, and not after the search.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvfold.errors import KvfoldError
from kvfold.exports.files import foreign_names
from kvfold.exports.reader import is_artifact, read_metadata
from kvfold.exports.scratch import NEW, OLD, SPENT, remove_leftovers, scratch_folder
from kvfold.exports.units import format_nbytes

LONGEST_NAME = (
    240  # bytes; file systems take 255, of which LONGEST_ENDING are for the scratch folder's name
)
FULL = {
    errno.ENOSPC: "The disk filled up",
    errno.EDQUOT: "The quota of disk space was used up (the disk filled up for this user)",
    errno.EFBIG: "A file grew to the most that is allowed here (ulimit -f)",
}


def resolve_output(out: Path) -> Path:
    """The folder that `out` stands for, absolute and without links.

    Raises:
        KvfoldError: it has no name, is a link to itself, or is a mount point.
    """
    if out.name in ("", ".."):
        raise KvfoldError(
            f"Output '{out}' has no name of its own; name the artifact's folder, for example '{out / 'artifact'}'."
        )
    try:
        place = out.resolve()
        broken = place.is_symlink()
    except (OSError, RuntimeError):  # a circle of links, by version of Python
        broken = True
    if broken:
        raise KvfoldError(
            f"Output '{out}' is a link that leads to itself; remove it or choose another --out."
        )
    if len(place.name.encode(errors="surrogateescape")) > LONGEST_NAME:
        raise KvfoldError(
            f"Output '{out}' has a name of more than {LONGEST_NAME} bytes; choose a shorter --out."
        )
    refuse_mount(place, out)
    return place


def is_mount(path: Path) -> bool:
    """Whether something is mounted on a folder, a part of the same disk too, which os.path.ismount
    doesn't see."""
    if os.path.ismount(path):
        return True
    try:
        lines = (
            Path("/proc/self/mountinfo")
            .read_text(encoding="utf-8", errors="surrogateescape")
            .splitlines()
        )
    except OSError:
        return False
    points = (
        re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4])
        for line in lines
    )
    return str(path) in points


def refuse_mount(place: Path, out: Path) -> None:
    """Refuses a mount point.

    Raises:
        KvfoldError: naming a folder inside it.
    """
    if is_mount(place):
        raise KvfoldError(
            f"Output '{out}' is a mount point, which no finished folder can be renamed onto; choose a folder inside "
            f"it, for example '{out / 'artifact'}'."
        )


def check_output(out: Path, need_nbytes: int) -> None:
    """Refuses a place that an artifact can't or shouldn't go.

    Args:
        need_nbytes: bytes that the run will write beside it.
    Raises:
        KvfoldError: something else is there, the parent isn't writable, or the disk is too full.
    """
    place = resolve_output(out)
    check_free(place, out)
    parent = place.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise KvfoldError(
            f"Output '{out}' cannot be written, since '{parent}' is a file; choose another --out."
        )
    if not os.access(parent, os.W_OK):
        raise KvfoldError(
            f"Output '{out}' cannot be written, since '{parent}' is read-only for this user; choose another --out."
        )
    free = shutil.disk_usage(parent).free
    if free < need_nbytes:
        raise KvfoldError(
            f"Output '{out}' needs {format_nbytes(need_nbytes)} of disk space while it is made, but "
            f"{format_nbytes(free)} are free; free some or choose another --out."
        )


def check_free(place: Path, out: Path) -> None:
    """Refuses to write over anything but an empty folder or an artifact in which nobody else has
    put anything.

    Raises:
        KvfoldError: something else is there.
    """
    if place.exists() and not place.is_dir():
        raise KvfoldError(
            f"Output '{out}' is a file, but an artifact is a folder; choose another --out."
        )
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not is_artifact(place):
        raise KvfoldError(
            f"Output '{out}' exists and is not an artifact; choose another --out or empty it."
        )
    try:
        foreign = foreign_names(place, read_metadata(place).files)
    except KvfoldError as error:
        raise KvfoldError(
            f"Output '{out}' exists, and which of its files are an artifact's can't be told "
            f"({str(error).rstrip('.')}); remove it or choose another --out."
        ) from None
    if foreign:
        raise KvfoldError(
            f"Output '{out}' is an artifact that would be replaced whole, but it holds '{foreign[0]}', which kvfold "
            "did not write; move that away or choose another --out."
        )


def full_disk(error: BaseException) -> str | None:
    """What ran out, if an error says that no more can be written; safetensors and tokenizers raise
    their own kinds, with the system's number in the text."""
    if isinstance(error, OSError):
        return FULL.get(error.errno or 0)
    return next(
        (words for number, words in FULL.items() if f"(os error {number})" in str(error)), None
    )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, to be filled; it becomes `out`, which must not exist or be
    empty, when the block ends well.

    Raises:
        KvfoldError: the disk filled up; nothing is left behind.
    """
    place = resolve_output(out)
    remove_leftovers(place)
    try:
        with scratch_folder(place) as scratch:
            new = scratch / NEW
            new.mkdir()
            yield new
            open_to_readers(new)
            refuse_mount(place, out)
            if place.is_dir():
                place.rmdir()
            os.replace(new, place)
    except Exception as error:
        if words := full_disk(error):
            raise KvfoldError(
                f"{words} while making '{out}'; free some space or choose another folder."
            ) from error
        raise


def open_to_readers(folder: Path) -> None:
    """Gives every file the rights that a new file has here; safetensors' are for their owner
    alone."""
    allowed = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        path.chmod(allowed)


def put_in_place(new: Path, place: Path) -> None:
    """Renames a finished folder; an older artifact there goes only then, and comes back if that
    fails.

    Raises:
        KvfoldError: meanwhile something else has come there.
    """
    refuse_mount(place, place)
    check_free(place, place)
    if not place.exists():
        os.replace(new, place)
        return
    with scratch_folder(place) as scratch:
        os.replace(place, scratch / OLD)
        try:
            os.replace(new, place)
        except BaseException:
            os.replace(scratch / OLD, place)
            raise
        os.replace(scratch / OLD, scratch / SPENT)
