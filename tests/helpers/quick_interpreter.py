"""Triton's interpreter without the work that it repeats: the same results in half the time.

As it is, each call of a helper inside a kernel patches some 400 names of triton.language anew, the
NumPy type of each tensor is looked up in a table that is built for that look-up, and for each sum
or product of integers it computes whether it overflows, by a dozen tensors of its own, and then
drops the answer; here an overflow is an error.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Change = tuple[Any, str, Any]  # an object, a name of it, what that is while a kernel runs


class Patches:
    """What the interpreter makes of triton.language while a kernel runs; the helpers it calls find
    that done."""

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self.patch = patch
        self.changes: list[Change] = []
        self.running = False

    def __call__(self, function: Any) -> Any:
        """In place of interpreter._patch_lang: returns what has a `restore`, which the launch calls
        at its end."""
        if self.running:
            return _Nothing
        self.changes = self.changes or self.found()
        return _Launch(self)

    def found(self) -> list[Change]:
        """The changes for a kernel that sees triton.language and its core, as our kernels and
        Triton's own do."""

        def kernel() -> None:
            """Only its globals are read."""

        scope = self.patch(type(kernel)(kernel.__code__, {"tl": tl, "core": tl.core}))
        changes = {
            (id(thing), name): (thing, name, vars(thing)[name]) for thing, name, _ in scope._changes
        }
        scope.restore()
        return list(changes.values())


class _Nothing:
    restore = staticmethod(lambda: None)


class _Launch:
    def __init__(self, patches: Patches) -> None:
        self.patches = patches
        self.before = [
            (thing, name, vars(thing).get(name, self)) for thing, name, _ in patches.changes
        ]
        for thing, name, value in patches.changes:
            setattr(thing, name, value)
        patches.running = True

    def restore(self) -> None:
        for thing, name, value in reversed(self.before):
            if value is self:
                delattr(thing, name)
            else:
                setattr(thing, name, value)
        self.patches.running = False


class NumpyTypes:
    """In place of interpreter._get_np_dtype: asks it once for each type."""

    def __init__(self, find: Callable[[Any], np.dtype]) -> None:
        self.find = find
        self.known: dict[str, np.dtype] = {}

    def __call__(self, kind: Any) -> np.dtype:
        element = getattr(kind, "element_ty", kind)
        if isinstance(kind, tl.pointer_type) or isinstance(element, tl.pointer_type):
            return self.find(kind)
        found = self.known.get(element.name)
        if found is None:
            found = self.known[element.name] = self.find(kind)
        return found


def check_overflow(semantic: Any, lhs: Any, rhs: Any, operation: Callable) -> None:
    """In place of TritonSemantic.binary_op_sanitize_overflow_impl.

    Raises:
        OverflowError: the result of integers of 32 bits or fewer doesn't fit their type.
    """
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64:
        return
    apply = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    found = apply(lhs.handle.data, rhs.handle.data, dtype=np.int64)
    if (
        found.size
        and not kind.get_int_min_value() <= found.min() <= found.max() <= kind.get_int_max_value()
    ):
        raise OverflowError(
            f"{operation.__name__} leaves {kind}: from {found.min()} to {found.max()}"
        )


def install() -> None:
    """For this process; a second time does nothing."""
    if not isinstance(interpreter._patch_lang, Patches):
        type(interpreter.interpreter_semantic).binary_op_sanitize_overflow_impl = check_overflow
        interpreter._patch_lang = Patches(interpreter._patch_lang)
        interpreter._get_np_dtype = NumpyTypes(interpreter._get_np_dtype)
