"""The one way in which kernels are started: at once, or noted down so that they can be compiled ahead.

Every host function of this package starts its kernels through `launch`. Inside `noting`, nothing runs: the host functions are
called with tensors of the right types and shapes, and what they would have started is collected. What was collected is exactly
what a model will start later, so compiling it (kernels/build.py) leaves nothing to be compiled at the first token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """A kernel as it would have been started."""

    kernel: Any  # triton.JITFunction
    args: tuple
    options: dict[str, Any]  # constants, and num_warps, num_stages, … of the compiler


_noted: list[Launch] | None = None
_multiprocessors = 0
_settled: set[int] = set()


def settle(kernel: Any) -> None:
    """Has Triton hash a kernel's functions before those that call them.

    Triton keys a kernel by a hash that holds the constants of the functions it calls only if those were hashed before: left to itself,
    what was launched earlier in a process decides where a kernel is looked up, and the next process may not find it.
    """
    if id(kernel) in _settled or not hasattr(type(kernel), "cache_key"):  # of the type: it is computed when asked for
        return
    _settled.add(id(kernel))
    for name in kernel.fn.__code__.co_names:
        if hasattr(type(called := kernel.fn.__globals__.get(name)), "cache_key"):
            settle(called)
    kernel.cache_key  # noqa: B018 - this computes it


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Starts `kernel` on `grid` with `args`; `options` are its constants and the compiler's options."""
    settle(kernel)
    if _noted is None:
        kernel[grid](*args, **options)
    else:
        _noted.append(Launch(kernel, args, options))


def multiprocessors(device: torch.device) -> int:
    """Of a device, or while `noting` of the one that will run what is noted; 0 for a CPU."""
    if _noted is not None:
        return _multiprocessors
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


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
