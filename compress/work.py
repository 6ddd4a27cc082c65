"""The work folder beside an artifact in the making: what an interrupted run has finished, for
`--resume`.

One run at a time writes there: its mark is locked while it lasts, and the system gives the lock
back however the run ends.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kvfold.errors import KvfoldError
from kvfold.exports.files import INDEX, WEIGHTS, file_sha256, is_read, read_index
from kvfold.exports.place import full_disk
from kvfold.exports.scratch import write_whole
from kvfold.memory import is_out_of_memory, reason_of_shortage

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("kvfold")
MARK = "run.json"
MOST_MARK = 1 << 20  # bytes; a run's has some hundred
SUMS_NBYTES = 256  # two sums of 64 digits, and room
MADE_BY = {"made_by": "kvfold"}  # at the head of the mark: who made the folder
TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    OverflowError,
    RecursionError,
    SafetensorError,
)


class Unfinished(KvfoldError):
    """The last step was refused, after the search: what was found stays for `--resume`."""


def fingerprint(parts: dict) -> str:
    """sha256 of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def model_fingerprint(path: Path) -> dict[str, str]:
    """Name → sha256 of each file of a checkpoint that anything is computed from, whatever its time
    and size say: weights, config.json, generation config, tokenizer, chat templates."""
    if (path / WEIGHTS).is_file() or not (path / INDEX).is_file():
        weights = {WEIGHTS}
    else:
        weights = set(read_index(path / INDEX).values())
    names = {
        p.name for p in path.iterdir() if is_read(p.name) and p.suffix != ".safetensors"
    } | weights
    files = [
        p
        for name in sorted(names)
        for p in (sorted((path / name).rglob("*")) if (path / name).is_dir() else [path / name])
    ]
    return {p.relative_to(path).as_posix(): file_sha256(p) for p in files if p.is_file()}


def _sums(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _known(path: Path) -> list[str]:
    """The sums that stand beside a file, of which there are two at the most; [] without any."""
    if not _sums(path).is_file():
        return []
    with open(_sums(path), "rb") as stream:
        return stream.read(SUMS_NBYTES).decode(errors="replace").split()


def keep(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written for a run that goes on, which `kept` reads. It appears complete, and its
    sha256 before it does: that of what it replaces still counts until then.

    Args:
        write: given a new file's path, writes it.
    """

    def signed(scratch: Path) -> None:
        write(scratch)
        text = "\n".join([*_known(path)[-1:], file_sha256(scratch)])
        write_whole(_sums(path), lambda sums: sums.write_text(text))

    if path.is_dir() or _sums(path).is_dir():
        forget(path)
    write_whole(path, signed)


def kept(path: Path, read: Callable[[Path], Any], default: Any = None) -> Any:
    """What an earlier run left in a file by `keep`; `default` where it is not there or is not what
    was written: it is computed again then."""
    if not os.path.lexists(path):
        return default
    try:
        if not path.is_file():
            raise OSError("it is no file")
        if not (known := _known(path)) or file_sha256(path) not in known:
            raise ValueError("its sha256 is another")
        return read(path)
    except UNREADABLE as error:
        log.warning("%s cannot be read (%s), so it is computed again", path, error)
        forget(path)
        return default


def forget(path: Path) -> None:
    """Removes what `keep` has written, or what stands in its way."""
    for file in (path, _sums(path)):
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink(missing_ok=True)


def _lock(mark: Path, out: Path) -> int:
    """Opens and locks a run's mark, which it makes; returns the descriptor, which holds the lock
    until it is closed."""
    while True:
        mark.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = os.open(mark, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another run has just ended and removed the folder
            continue
        try:
            if fcntl is not None:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                os.close(stream)
                raise KvfoldError(
                    f"Another run is writing '{out}' ('{mark.parent}' is in use); wait for it or choose another --out."
                ) from None
            log.warning(
                "'%s' cannot be locked (%s); see to it that no other run writes there",
                mark,
                error.strerror,
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(mark), os.fstat(stream)):
                return stream
        os.close(stream)  # it was removed between the two: take the one that is there now


def _is_ours(work: Path) -> bool:
    """Whether a folder is empty, or holds the mark of a run, which a crash may have cut short; an
    empty one is all that is there then."""
    if work.is_symlink() or not work.is_dir():
        return False
    names = {path.name for path in work.iterdir()}
    mark = work / MARK
    if not names:
        return True
    if mark.is_symlink() or not mark.is_file():
        return False
    if mark.stat().st_size > MOST_MARK:
        return False
    head, text = json.dumps(MADE_BY)[:-1].encode(), mark.read_bytes()
    return text.startswith(head) or (head.startswith(text) and (bool(text) or names == {MARK}))


def _open(out: Path, work: Path, key: str, resume: bool) -> int:
    mark = work / MARK
    if os.path.lexists(work) and not _is_ours(work):
        raise KvfoldError(f"'{work}' exists and was not made by kvfold; move it away.")
    stream = _lock(mark, out)
    try:
        text = mark.read_bytes()
        if resume and text:  # empty: new, or killed before anything was finished
            try:
                found = json.loads(text)["key"]
            except (ValueError, KeyError, TypeError):
                raise KvfoldError(
                    f"'{mark}' is damaged, so no run can go on with it; drop --resume."
                ) from None
            if found != key:
                raise KvfoldError(
                    f"'{work}' belongs to a run with another model, text or options; repeat those or drop --resume."
                )
            return stream
        _empty(work)
        os.ftruncate(stream, 0)
        os.pwrite(stream, json.dumps({**MADE_BY, "key": key}).encode(), 0)
        return stream
    except BaseException:
        os.close(stream)
        raise


def _empty(work: Path) -> None:
    """Removes all but the mark, by which what is left is known for ours, should this end
    half-way."""
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()


def _remove(work: Path) -> None:
    with suppress(OSError):
        _empty(work)
        (work / MARK).unlink()
        work.rmdir()


@contextmanager
def work_folder(out: Path, key: str, resume: bool) -> Iterator[Path]:
    """The folder of a run's intermediate results, beside the artifact; empty unless the run is
    resumed.

    Deleted on success and on bad input; kept on interruption, so that --resume can go on.

    Args:
        out: the artifact's folder, resolved.
        key: fingerprint of everything that the intermediate results depend on.
        resume: keep what an interrupted run has left there, instead of emptying the folder.
    Raises:
        KvfoldError: `resume` finds another run's folder (its fingerprint differs); a run that still
            lasts has the folder; it was not made by kvfold; or the disk or the memory is full.
    """
    made = [parent for parent in out.absolute().parents if not parent.exists()]  # innermost first
    work = out.with_name(out.name + ".work")
    lock: int | None = None
    try:
        lock = _open(out, work, key, resume)
        yield work
    except Exception as error:
        full = full_disk(error)
        if lock is not None and (
            full or (isinstance(error, KvfoldError) and not isinstance(error, Unfinished))
        ):
            _remove(work)
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
        if is_out_of_memory(error) and not isinstance(error, KvfoldError):
            raise Unfinished(
                f"There is too little memory to make '{out}' ({reason_of_shortage(error)}); free some, raise the limit "
                f"or choose a smaller model: what was found is kept in '{work}', run the same command again with "
                "--resume."
            ) from error
        if full:
            raise KvfoldError(
                f"{full} while making '{out}'; free some space or choose another --out."
            ) from error
        raise
    else:
        _remove(work)
    finally:
        if lock is not None:
            os.close(lock)
