"""The work folder beside an artifact in the making: what an interrupted run has finished, for `--resume`."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from kvfold.errors import KvfoldError
from kvfold.exports.writer import is_disk_full

MARK = "run.json"


def fingerprint(parts: dict) -> str:
    """sha256 of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def weights_fingerprint(path: Path) -> list[list]:
    """Name, size and time of each weight file: enough to notice that a model changed between two runs."""
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(path.glob("*.safetensors"))]


def _open(out: Path, key: str, resume: bool) -> Path:
    work = out.with_name(out.name + ".work")
    mark = work / MARK
    if work.exists() and not mark.is_file() and (not work.is_dir() or any(work.iterdir())):
        raise KvfoldError(f"'{work}' exists and was not made by kvfold; move it away.")
    if resume and mark.is_file() and mark.stat().st_size:  # empty: killed before anything was finished
        if json.loads(mark.read_text())["key"] != key:
            raise KvfoldError(
                f"'{work}' belongs to a run with another model, text or options; repeat those or drop --resume."
            )
        return work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    mark.write_text(json.dumps({"key": key}))
    return work


@contextmanager
def work_folder(out: Path, key: str, resume: bool) -> Iterator[Path]:
    """The work folder of a run, empty unless it is resumed; gone when the run ends or refuses its input, and kept when it
    is interrupted.

    Args:
        out: the artifact's folder.
        key: fingerprint of everything that the intermediate results depend on.
    Raises:
        KvfoldError: to be resumed, but it belongs to a run with other options; the folder isn't ours; the disk is full.
    """
    made = [parent for parent in out.absolute().parents if not parent.exists()]  # innermost first
    work = _open(out, key, resume)
    try:
        yield work
    except (KvfoldError, OSError, SafetensorError) as error:
        full = is_disk_full(error)
        if full or isinstance(error, KvfoldError):
            shutil.rmtree(work, ignore_errors=True)
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
        if full:
            raise KvfoldError(
                f"The disk filled up while making '{out}'; free some space or choose another --out."
            ) from error
        raise
    shutil.rmtree(work, ignore_errors=True)
