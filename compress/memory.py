"""How much memory there is for a model's weights."""

import os
from pathlib import Path

import torch

from kvfold.exports.files import weight_files

SHARE = 2  # the weights may take one SHAREth of the memory; the rest is for what is computed


def free_nbytes(device: torch.device) -> int:
    """Bytes that are free on a device; of the CPU's memory no more than the process's cgroup allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_available(), *_limits()])


def weights_nbytes(path: Path, own: torch.dtype, dtype: torch.dtype) -> int:
    """Bytes that a checkpoint folder's weights, stored in type `own`, take in type `dtype`."""
    stored = sum(file.stat().st_size for file in weight_files(path))
    return stored * dtype.itemsize // own.itemsize


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limits() -> list[int]:
    """Memory limits of the process's cgroup, of version 1 or 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, kinds, group = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        folder, name = ("memory", "memory.limit_in_bytes") if kinds else ("", "memory.max")
        for inside in (group, "/"):  # a container sees its own group as the root
            try:
                found.append(int(Path(f"/sys/fs/cgroup/{folder}/{inside}/{name}").read_text(encoding="ascii")))
                break
            except (OSError, ValueError):  # not there, or "max"
                continue
    return found
