"""The one way in which kernels are started: at once, or noted down so that they can be compiled
ahead.

Every host function of this package starts its kernels through `launch`. Inside `noting`, nothing
runs: the host functions are called with tensors of the right types and shapes, and what they would
have started is collected. What was collected is exactly what a model will start later, so compiling
it (build.py) leaves nothing to be compiled at the first token.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """A kernel as it would have been started."""

    kernel: Any  # triton.JITFunction
    args: tuple
    options: dict[str, Any]  # constants, and num_warps, num_stages, … of the compiler


INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton's interpreter runs the kernels

_noted: list[Launch] | None = None
_multiprocessors = 0
_settled: set[int] = set()


def settle(kernel: Any) -> None:
    """Has Triton hash a kernel's functions before those that call them.

    Triton keys a kernel by a hash that holds the constants of the functions it calls only if those
    were hashed before: left to itself, what was launched earlier in a process decides where a
    kernel is looked up, and the next process may not find it.
    """
    if id(kernel) in _settled or not hasattr(
        type(kernel), "cache_key"
    ):  # of the type: it is computed when asked for
        return
    _settled.add(id(kernel))
    for name in kernel.fn.__code__.co_names:
        if hasattr(type(called := kernel.fn.__globals__.get(name)), "cache_key"):
            settle(called)
    kernel.cache_key  # noqa: B018 - this computes it


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Starts `kernel` on `grid` with `args`; `options` are its constants and the compiler's
    options."""
    settle(kernel)
    if _noted is None:
        kernel[grid](*args, **options)
    else:
        _noted.append(Launch(kernel, args, options))


def multiprocessors(device: torch.device) -> int:
    """Of a device, or while `noting` of the one that will run what is noted; 0 for a CPU."""
    if _noted is not None:
        return _multiprocessors
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 0
    )


@contextmanager
def noting(multiprocessors: int = 0) -> Iterator[list[Launch]]:
    """While this lasts, `launch` starts nothing and appends to the list.

    Args:
        multiprocessors: of the device that is planned for.
    """
    global _noted, _multiprocessors
    before = _noted, _multiprocessors
    _noted, _multiprocessors = [], multiprocessors
    try:
        yield _noted
    finally:
        _noted, _multiprocessors = before


class _Streams(threading.local):
    """Streams of this thread's captures, by device."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, list[torch.cuda.Stream]] = {}


_streams = _Streams()


class Branches:
    """Kernels that don't wait for each other: while a CUDA graph is captured, what is launched
    inside `branch(i)` is a branch of the graph, from where this was made to where `join` is called.
    Elsewhere everything runs in order, as the host is what takes its time.

    Args:
        device: of the kernels.
        count: branches.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.others: list[torch.cuda.Stream] = []
        if (
            count < 2
            or device.type != "cuda"
            or _noted is not None
            or not torch.cuda.is_current_stream_capturing()
        ):
            return
        self.main = torch.cuda.current_stream(device)
        kept = _streams.by_device.setdefault(self.main.device, [])
        while len(kept) < count - 1:
            kept.append(
                torch.cuda.Stream(device, priority=-1)
            )  # of a pool of their own, which captures don't run on
        self.others = kept[: count - 1]
        begun = self.main.record_event()
        for stream in self.others:
            stream.wait_event(begun)

    @contextmanager
    def branch(self, index: int) -> Iterator[None]:
        """While this lasts, launches belong to branch `index`; branch 0 is the current stream
        itself."""
        if not self.others or index == 0:
            yield
            return
        with torch.cuda.stream(self.others[index - 1]):
            yield

    def join(self) -> None:
        """What is launched from now on waits for all branches."""
        for stream in self.others:
            self.main.wait_event(stream.record_event())
