"""The work folder beside an artifact in the making: what an interrupted run has finished, for `--resume`."""

import hashlib
import json
import shutil
from pathlib import Path

from kvfold.errors import KvfoldError

MARK = "run.json"


def fingerprint(parts: dict) -> str:
    """sha256 of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def weights_fingerprint(path: Path) -> list[list]:
    """Name, size and time of each weight file: enough to notice that a model changed between two runs."""
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(path.glob("*.safetensors"))]


def open_work(out: Path, key: str, resume: bool) -> Path:
    """The work folder of a run, empty unless it is resumed.

    Args:
        out: the artifact's folder.
        key: fingerprint of everything that the intermediate results depend on.
    Raises:
        KvfoldError: to be resumed, but it belongs to a run with other options; or the folder isn't ours.
    """
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
