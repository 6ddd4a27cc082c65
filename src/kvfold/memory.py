"""How much memory is left here, and the sentence where it is too little: the system ends a process
without one."""

import os
import re
from pathlib import Path

from kvfold.errors import KvfoldError

try:
    import resource
except ImportError:  # no POSIX
    resource = None  # type: ignore[assignment]

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU or a GPU."""
    text = str(error).lower()
    words = (
        "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory",
        "failed to map segment", "unable to mmap",
    )  # fmt: skip
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError | ImportError) and any(w in text for w in words)
    )


def reason_of_shortage(error: BaseException) -> str:
    """What an error of `is_out_of_memory` says was asked for, for a sentence."""
    asked = re.search(r"(?i)tr(?:ied|ying) to allocate ([\d.]+ ?(?:bytes|[KMGT]iB))", str(error))
    lines = str(error).strip().splitlines()
    last = lines[-1].strip().rstrip(".") if lines else type(error).__name__
    left = memory_left()
    rest = "" if left is None else f", {max(0, left[0]) >> 20} MiB are left, {left[1]}"
    return (f"{asked[1]} more were asked for" if asked else last) + rest


def memory_left() -> tuple[int, str] | None:
    """Bytes that this process can still take, and what limits them; None where the system says
    nothing.

    The least of: the address space that is allowed (ulimit -v), the memory of the control groups
    that it is in (a container's), and the machine's.
    """
    found = [x for x in (address_space_left(), _of_cgroups(), _of_machine()) if x is not None]
    return min(found) if found else None


def need_memory(nbytes: int, what: str) -> None:
    """Refuses what doesn't fit before it is begun.

    Args:
        nbytes: the least that it takes.
        what: the subject of the sentence.
    Raises:
        KvfoldError: how much was needed, and how much there is.
    """
    left = memory_left()
    if left is not None and nbytes > left[0]:
        raise KvfoldError(
            f"There is too little memory: {what} takes {nbytes >> 20} MiB, but {max(0, left[0]) >> 20} MiB are left "
            f"({left[1]}); free some, raise the limit or choose a smaller model."
        )


def address_space_left() -> tuple[int, str] | None:
    """Bytes of addresses that ulimit -v leaves this process, and why; None without such a limit."""
    if resource is None:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    taken = _field("/proc/self/status", "VmSize:")
    if limit == resource.RLIM_INFINITY or taken is None:
        return None
    return limit - taken, f"since ulimit -v is {limit >> 10}"


def _of_machine() -> tuple[int, str] | None:
    free, swap = (_field("/proc/meminfo", name) for name in ("MemAvailable:", "SwapFree:"))
    return None if free is None else (free + (swap or 0), "of this machine")


def _of_cgroups() -> tuple[int, str] | None:
    """Of version 2, the group of this process and those above it; of version 1, the one of its
    memory."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, kinds, name = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = CGROUPS if kinds == "" else CGROUPS / "memory"
        most, taken, cached = (
            ("memory.max", "memory.current", "inactive_file") if kinds == ""
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )  # fmt: skip
        place = root / name.lstrip("/")
        for folder in (place, *place.parents):
            limit, used = _number(folder / most), _number(folder / taken)
            if limit is not None and used is not None:
                spare = (
                    _field(folder / "memory.stat", cached, 1) or 0
                )  # what the system drops when it must
                found.append(
                    (limit - used + spare, f"of {limit >> 20} MiB that its control group may have")
                )
            if folder == root:
                break
    return min(found) if found else None


def _number(file: Path) -> int | None:
    """The number in a file; None for "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _field(file: str | os.PathLike, name: str, unit: int = 1024) -> int | None:
    """Bytes that a line of a file states behind a name."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * unit for line in lines if line.split()[:1] == [name]), None)
