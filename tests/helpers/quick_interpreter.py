"""Triton's interpreter without the work that it repeats: the same results in a fraction of the time.

As it is, each call of a helper inside a kernel patches some 400 names of triton.language anew, the
NumPy type of each tensor is looked up in a table that is built for that look-up, and for each sum
or product of integers it computes whether it overflows, by a dozen tensors of its own, and then
drops the answer; here an overflow is an error. Each tensor and each type of a block makes objects
anew for its shape, though a kernel has a few dozen shapes; here those are made once.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import quick_operations
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
        return [
            (thing, name, quick_operations.method(name, direct(value)) if thing is tl.tensor else direct(value))
            for thing, name, value in changes.values()
        ]  # fmt: skip


def direct(patched: Any) -> Any:
    """What the interpreter puts in place of a function of the language, without its two layers that
    look through the keywords."""
    member = (getattr(patched, "__kwdefaults__", None) or {}).get("member")
    inner = getattr(member, "__wrapped__", None)
    semantic = interpreter.interpreter_semantic
    if inner is None:
        return patched

    def call(*args: Any, **options: Any) -> Any:
        options["_semantic"] = semantic
        return inner(*args, **options)

    return call


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


def one_of_each(kind: Any, key: Callable) -> None:
    """Types of this kind that are equal become one object.

    Args:
        key: of the arguments; what is told apart.
    """
    known: dict[Any, Any] = {}
    kept = []  # the arguments, whose identities are keys

    def new(cls: Any, *args: Any, **options: Any) -> Any:
        if cls is not kind:
            return object.__new__(cls)
        told = key(*args, **options)
        found = known.get(told)
        if found is None:
            found = known[told] = object.__new__(cls)
            kept.append(args)
        return found

    kind.__new__ = staticmethod(new)


def block_key(element_ty: Any, shape: Any) -> tuple:
    sizes = shape.values if isinstance(shape, tl.tuple) else shape
    return (id(element_ty), *[getattr(size, "value", size) for size in sizes])


def pointer_key(element_ty: Any, address_space: int = 1, const: bool = False) -> tuple:
    return id(getattr(element_ty, "value", element_ty)), address_space, const


def shapes() -> tuple[Callable, Callable]:
    """In place of block_type.__init__ and tensor.__init__: what they make of a shape is made once."""
    real = tl.block_type.__init__
    scalar = {"shape": tl.tuple([]), "numel": tl.constexpr(1)}

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        if "of_tensors" not in self.__dict__:
            real(self, element_ty, shape)
            sizes = tl.tuple([tl.constexpr(size) for size in self.shape])
            self.of_tensors = {"shape": sizes, "numel": tl.constexpr(self.numel)}

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        own = self.__dict__
        own["handle"], own["type"], own["dtype"] = handle, kind, kind.scalar
        own.update(kind.of_tensors if kind.is_block() else scalar)

    return block, tensor


def broadcast(real: Callable) -> Callable:
    """In place of TritonSemantic.broadcast_impl_value: two blocks of one shape are returned."""

    def quick(semantic: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return lhs, rhs
        return real(semantic, lhs, rhs)

    return quick


def operands(real: Callable) -> Callable:
    """In place of TritonSemantic.binary_op_type_checking_impl: two tensors of one type of number
    need no look at what they have in common but their shapes."""

    def quick(semantic: Any, lhs: Any, rhs: Any, *checks: bool) -> tuple[Any, Any]:
        division = len(checks) > 3 and checks[3]  # of halves gives floats
        if isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor) and not division:
            kind = lhs.dtype
            if kind is rhs.dtype and not kind.is_ptr():
                return semantic.broadcast_impl_value(lhs, rhs)
        return real(semantic, lhs, rhs, *checks)

    return quick


class ComputationTypes:
    """In place of TritonSemantic.computation_type_impl: asks it once for each pair of types."""

    def __init__(self, find: Callable) -> None:
        self.find = find
        self.known: dict[tuple, Any] = {}

    def __call__(
        self, semantic: Any, a: Any, a_scalar: bool, b: Any, b_scalar: bool, div: bool
    ) -> Any:
        key = (a.name, a_scalar, b.name, b_scalar, div)
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = self.find(semantic, a, a_scalar, b, b_scalar, div)
        return found


def install() -> None:
    """For this process; a second time does nothing."""
    if not isinstance(interpreter._patch_lang, Patches):
        semantic = type(interpreter.interpreter_semantic)
        types = ComputationTypes(semantic.computation_type_impl)
        one_of_each(tl.block_type, block_key)
        one_of_each(tl.pointer_type, pointer_key)
        tl.block_type.__init__, tl.tensor.__init__ = shapes()
        semantic.binary_op_type_checking_impl = operands(semantic.binary_op_type_checking_impl)
        semantic.broadcast_impl_value = broadcast(semantic.broadcast_impl_value)
        semantic.computation_type_impl = lambda *args: types(*args)
        type(interpreter.interpreter_semantic).binary_op_sanitize_overflow_impl = check_overflow
        interpreter._patch_lang = Patches(interpreter._patch_lang)
        interpreter._get_np_dtype = NumpyTypes(interpreter._get_np_dtype)
        quick_operations.install()
