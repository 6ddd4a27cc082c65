"""The one way in which kernels are started: at once, or noted down so that they can be compiled ahead.

Every host function of this package starts its kernels through `launch`. Inside `noting`, nothing runs: the host functions are
called with tensors of the right types and shapes, and what they would have started is collected. What was collected is exactly
what a model will start later, so compiling it (runtime/compile.py) leaves nothing to be compiled at the first token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """A kernel as it would have been started."""

    kernel: Any  # triton.JITFunction
    args: tuple
    options: dict[str, Any]  # constants, and num_warps, num_stages, … of the compiler


_noted: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Starts `kernel` on `grid` with `args`; `options` are its constants and the compiler's options."""
    if _noted is None:
        kernel[grid](*args, **options)
    else:
        _noted.append(Launch(kernel, args, options))


@contextmanager
def noting() -> Iterator[list[Launch]]:
    """While this lasts, `launch` starts nothing and appends to the list."""
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before
