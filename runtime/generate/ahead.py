"""Kernels that an artifact's first answer does not need, compiled behind those that it does while
its process lives.

An attention kernel is compiled for a pair of formats, once for steps and once for a few tokens at a
time, as drafts are; and an artifact of other bits has other pairs of the catalogue's short list
(kernels/catalogue.py). Once a model is loaded, a process of the lowest priority compiles those that
are missing, so that drafts and the next artifact find them. It ends with the
process that started it, at the latest, and what it has compiled by then is kept. A file beside the
kernels says that all are there, so that later processes start nothing. KVFOLD_COMPILE_AHEAD=0 turns
this off.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels import catalogue
from kvfold.kernels.formats import Format
from kvfold.runtime.generate.compile import Kind, launches_of, read_kinds

SWITCH = "KVFOLD_COMPILE_AHEAD"  # environment
NICE = 19
START = "import sys; sys.path[:] = sys.argv[2:]; from kvfold.runtime.generate.ahead import main; main(sys.argv[1])"
_running: list[subprocess.Popen] = []


def templates(kinds: Iterable[Kind]) -> list[Kind]:
    """One of each sort of layers that differ in more than their formats."""
    found: dict[tuple, Kind] = {}
    for kind in kinds:
        key = kind.spec.key
        if not key.format.raw:  # which has no basis that the others could have
            sort = kind.sliding > 0, key.turns, key.matrix is None, key.offset is None
            own = kind.num_kv_heads, key.format.head_dim, kind.shared
            found.setdefault((*sort, *own), kind)
    return list(found.values())


def catalogue_kinds(kinds: Iterable[Kind]) -> list[Kind]:
    """Layers like the given ones, but with each pair of the catalogue's list in turn; none for a
    head_dim that it does not have."""
    return [
        kind._replace(spec=_with_formats(kind.spec, *pair))
        for kind in templates(kinds)
        for pair in catalogue.pairs(kind.spec.key.format.head_dim)
    ]


def _with_formats(spec: LayerSpec, key: Format, value: Format) -> LayerSpec:
    side = KeySpec(key) if key.raw else replace(spec.key, format=key, clip=None)
    return LayerSpec(side, ValueSpec(value))


def begin_ahead(
    folder: Path, device: torch.device, dtype: torch.dtype | None, progressive: bool
) -> None:
    """Starts to compile what an artifact's drafts need and what the catalogue has besides, behind
    its own kernels, which must be there; returns at once.

    Args:
        folder: the artifact's.
        dtype: of the model's activations; None for that of its weights.
    """
    from kvfold.kernels.compile import kernel_cache

    if device.type != "cuda" or os.environ.get(SWITCH) == "0":
        return
    if kernel_cache.SPARE in os.environ and os.listdir(kernel_cache.spare()):
        return  # nothing can be kept
    major, minor = torch.cuda.get_device_capability(device)
    task = {
        "folder": str(folder),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "progressive": progressive,
        "arch": 10 * major + minor,
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
    }
    if stamp(task).exists():
        return
    command = [
        sys.executable,
        "-c",
        START,
        json.dumps(task),
        *(path or os.getcwd() for path in sys.path),
    ]
    null = subprocess.DEVNULL
    with suppress(OSError):  # no more processes: the next artifact compiles its own
        _running.append(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True
            )
        )


def wait() -> None:
    """Returns when what `begin_ahead` started in this process is over."""
    for process in _running:
        process.wait()


def wanted_kinds(kinds: list[Kind]) -> list[Kind]:
    """Layers whose kernels are compiled: an artifact's own, and where one of them has a pair of the
    catalogue's list all of these."""
    dims = {kind.spec.key.format.head_dim for kind in kinds}
    listed = {pair for dim in dims for pair in catalogue.pairs(dim)}
    own = [kind for kind in kinds if (kind.spec.key.format, kind.spec.value.format) not in listed]
    return own if len(own) == len(kinds) else own + catalogue_kinds(kinds)


def stamp(task: dict[str, Any]) -> Path:
    """The file that says that all kernels of a task were compiled from these sources."""
    import triton

    from kvfold.kernels.compile import kernel_cache

    kinds, geometry, heads, dtype = read_kinds(Path(task["folder"]), _dtype(task))
    wanted = wanted_kinds(kinds)
    formats = sorted({f"{x.spec.key.format} {x.spec.value.format}" for x in wanted})
    several = len({x.spec.key.format.head_dim for x in kinds}) > 1 or any(x.shared for x in kinds)
    sorts = [
        (
            kind.sliding > 0,
            kind.softcap,
            kind.sinks_logit,
            kind.spec.key.turns,
            kind.spec.key.matrix is None,
            *((kind.num_kv_heads, kind.spec.key.format.head_dim, kind.shared) if several else ()),
        )
        for kind in templates(kinds)
    ]
    shape = (
        geometry.num_kv_heads,
        geometry.head_dim,
        geometry.page_tokens,
        heads,
        str(dtype),
        sorted(sorts, key=str),
        formats,
    )
    rest = [
        *shape,
        *(task[name] for name in ("progressive", "arch", "multiprocessors")),
        triton.__version__,
    ]
    sources = b"".join(
        path.read_bytes() for path in sorted(Path(catalogue.__file__).parent.rglob("*.py"))
    )
    digest = hashlib.sha256(sources + json.dumps(rest).encode()).hexdigest()
    return Path(kernel_cache.folder()) / f"kvfold-catalogue-{digest[:16]}"


def _dtype(task: dict[str, Any]) -> torch.dtype | None:
    return None if task["dtype"] is None else getattr(torch, task["dtype"])


def _end_with_caller() -> None:
    """Ends this process when its caller's end of the pipe is closed, however the caller ended."""
    while os.read(
        0, 1
    ):  # not sys.stdin, whose lock this thread would hold when the interpreter ends
        pass
    os.killpg(0, signal.SIGKILL)  # the compilers, which are a session of their own, notice that


def main(text: str) -> None:
    """The process that compiles; `text`: the task as JSON."""
    from triton.backends.compiler import GPUTarget

    from kvfold.kernels.compile.build import Builder, jobs_of

    os.nice(NICE)
    threading.Thread(target=_end_with_caller, daemon=True).start()
    task = json.loads(text)
    model = read_kinds(Path(task["folder"]), _dtype(task))
    wanted = model._replace(kinds=wanted_kinds(model.kinds))
    launches = launches_of(*wanted, task["progressive"], task["multiprocessors"])
    with Builder() as builder:
        builder.build(jobs_of(launches, GPUTarget("cuda", task["arch"], 32)))
        builder.wait()
    if not builder.failed and not builder.lost:
        stamp(task).touch()
