"""Triton's folder of compiled kernels, where a fault of the folder costs time and nothing else.

As Triton has it, a folder that can't be written (a container's image, a full disk) is an error of
the first kernel that isn't there, and one that was filled under another path is as good as empty.
Here what can't be written goes to a folder of this process in memory, a filled folder may be moved,
and an entry that is not as long as it was written is compiled again.
"""

import atexit
import glob
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from triton import knobs
from triton.runtime.cache import FileCacheManager

log = logging.getLogger("kvfold")
SPARE = "KVFOLD_SPARE_KERNELS"  # environment: the folder that a process and its compilers share
PREFIX = "__grp__"  # of the file that lists an entry's files
_told: list[str] = []


def tell(reason: str) -> None:
    """Warns, once in a process, that the folder can't be written."""
    if not _told:
        log.warning(
            "compiled kernels can't be kept in %s (%s); the next process compiles them again",
            folder(),
            reason,
        )
    _told.append(reason)


report: Callable[[str], None] = tell  # a compiler's process hands it on instead


def folder() -> str:
    """Where compiled kernels are kept: TRITON_CACHE_DIR, or .triton/cache at home."""
    return knobs.cache.dir


def spare() -> str:
    """The folder, in memory where there is such a place, of what can't be kept; it goes with the
    process that asked first."""
    if SPARE not in os.environ:
        place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        os.environ[SPARE] = tempfile.mkdtemp(prefix="kvfold-kernels-", dir=place)
        atexit.register(_remove, os.environ[SPARE], os.getpid())
    return os.environ[SPARE]


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:
        os.environ.pop(SPARE, None)
        shutil.rmtree(path, ignore_errors=True)


def check_folder() -> None:
    """Warns if the folder can't be written. Finding out costs an empty file that goes at once."""
    try:
        os.makedirs(folder(), exist_ok=True)
        with tempfile.TemporaryFile(dir=folder()):
            pass
    except OSError as error:
        report(error.strerror or str(error))


class KernelCache(FileCacheManager):
    """Triton's files of one kernel; see the module's docstring."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self.plain = override or dump
        if self.plain:
            super().__init__(key, override, dump)
            return
        self.key = key
        self.cache_dir = os.path.join(folder(), key)
        self.lock_path = os.path.join(self.cache_dir, "lock")

    def _places(self) -> list[str]:
        found = os.environ.get(SPARE)
        return [self.cache_dir, *([os.path.join(found, self.key)] if found else [])]

    def get_file(self, filename: str) -> str | None:
        if self.plain:
            return super().get_file(filename)
        paths = (os.path.join(place, filename) for place in self._places())
        return next((path for path in paths if os.path.exists(path)), None)

    def has_file(self, filename: str) -> bool:
        return self.get_file(filename) is not None

    def get_group(self, filename: str) -> dict[str, str] | None:
        if self.plain:
            return super().get_group(filename)
        return next(
            (group for place in self._places() if (group := _read_group(place, filename))), None
        )

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        if self.plain:
            return super().put(data, filename, binary)
        try:
            os.makedirs(self.cache_dir, exist_ok=True)
            return super().put(data, filename, binary)
        except OSError as error:
            reason = error.strerror or str(error)
        for left in glob.glob(
            os.path.join(glob.escape(self.cache_dir), f"tmp.pid_{os.getpid()}_*")
        ):
            shutil.rmtree(left, ignore_errors=True)
        other = FileCacheManager.__new__(FileCacheManager)
        other.key, other.cache_dir = self.key, os.path.join(spare(), self.key)
        other.lock_path = os.path.join(other.cache_dir, "lock")
        os.makedirs(other.cache_dir, exist_ok=True)
        report(reason)
        return other.put(data, filename, binary)

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        sizes = {name: os.path.getsize(path) for name, path in group.items()}
        return self.put(
            json.dumps({"child_paths": group, "sizes": sizes}), PREFIX + filename, binary=False
        )


def _read_group(place: str, filename: str) -> dict[str, str] | None:
    """The files of an entry in `place`, whatever path they were written under; None unless all are
    there and whole."""
    try:
        with open(os.path.join(place, PREFIX + filename), encoding="utf-8") as file:
            listed = json.load(file)
        found = {}
        for name, path in listed["child_paths"].items():
            here = os.path.join(place, os.path.basename(path))
            found[name] = here if os.path.exists(here) else path
        sizes = listed.get("sizes", {})
        for name, path in found.items():
            size = os.path.getsize(path)
            if size == 0 or size != sizes.get(name, size):
                return None
        with open(found[filename], encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found


def install() -> None:
    """Makes Triton keep its kernels through KernelCache in this process, unless it was told another
    way."""
    if knobs.cache.manager_class is None:
        knobs.cache.manager_class = KernelCache
    # TorchInductor names a folder of its own when it first compiles, unless one is named: kernels
    # would be looked up there from then on
    os.environ.setdefault("TRITON_CACHE_DIR", folder())
