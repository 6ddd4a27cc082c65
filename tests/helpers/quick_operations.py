"""Operations of Triton's interpreter on types that it has met before.

An operation looks at the types of its operands, casts and spreads them, and makes a type for what
comes out: some hundred calls for one of NumPy's. What it does depends on the types alone, so here
the first call for some types runs as it is and is watched, and those after it repeat what reached
NumPy. What isn't a single step on numbers that NumPy has (bfloat16, eight-bit floats) runs as it is
each time.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

KNOWN = triton.__version__.startswith("3.7.")  # whose operations these are; others stay as they are
Tensor, Handle, Constant = tl.tensor, interpreter.TensorHandle, tl.constexpr
builder = interpreter.interpreter_builder
RANGED = {np.add, np.subtract, np.multiply}  # an overflow of these is an error
least, most = np.minimum.reduce, np.maximum.reduce


def made(data: np.ndarray, kind: Any, template: dict[str, Any]) -> Any:
    """A tensor of `data`.

    Args:
        kind: type of its handle; template: what else a tensor of its type holds.
    """
    handle, result = object.__new__(Handle), object.__new__(Tensor)
    handle.__dict__ = {"data": data, "dtype": kind, "attr": {}}
    own = result.__dict__
    own.update(template)
    own["handle"] = handle
    return result


def template_of(tensor: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(tensor).items() if name != "handle"}


def watched(names: tuple[str, ...], run: Callable[[], Any]) -> tuple[Any, str, tuple]:
    """(what `run` returns, name and arguments of the builder's method that made it): one of
    `names`, or "" if it was none of them."""
    seen: list[tuple] = []

    def watch(name: str, real: Callable) -> Callable:
        def note(*args: Any) -> Any:
            handle = real(*args)
            seen.append((name, args, handle))
            return handle

        return note

    own = vars(builder)
    before = {name: own[name] for name in names if name in own}  # of an operation that is watched
    for name in names:
        setattr(builder, name, watch(name, getattr(builder, name)))
    try:
        result = run()
    finally:
        for name in names:
            del own[name]
        own.update(before)
    if not seen or seen[-1][2] is not result.handle:
        return result, "", ()
    return result, seen[-1][0], seen[-1][1]


def numbers_of_numpy(*tensors: Any) -> bool:
    """Whether NumPy has the numbers of these tensors, or types."""
    scalars = [getattr(x, "type", x).scalar for x in tensors]
    return all(x.is_ptr() or not (x.is_bf16() or x.is_fp8()) for x in scalars)


def key_of(operand: Any) -> Any:
    """What an operation depends on: the type of a tensor, the value of a number."""
    return id(operand.type) if operand.__class__ is Tensor else (operand.__class__, exact(operand))


def exact(number: Any) -> Any:
    """A number, by which −0.0 is another than 0.0 and NaN equals itself."""
    if number.__class__ is Constant:
        number = number.value
    return number.hex() if number.__class__ is float else number


def own_data(operand: Any, data: np.ndarray) -> tuple[np.ndarray | None, np.dtype]:
    """(of a number its array, the type that reached NumPy)."""
    return (None if isinstance(operand, Tensor) else data.reshape(-1)[:1].copy()), data.dtype


def array_of(fixed: np.ndarray | None, operand: Any, kind: np.dtype) -> np.ndarray:
    """The array of an operand, `fixed` of a number's, in the type that reached NumPy."""
    if fixed is not None:
        return fixed
    data = operand.handle.data
    return data if data.dtype is kind else data.astype(kind)


def quotient(lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """As InterpreterBuilder.create_idiv."""
    return (lhs - np.fmod(lhs, rhs)) // rhs


def wide(operation: Callable, lhs: np.ndarray, rhs: np.ndarray, bounds: tuple) -> np.ndarray:
    """Sum, difference or product in 64 bits.

    Raises:
        OverflowError: it is outside of `bounds`, of a type of 32 bits or fewer.
    """
    found = operation(lhs, rhs, dtype=np.int64)
    if found.size == 1:
        low = high = found.item()
    else:
        low, high = least(found, None), most(found, None)
    if not bounds[0] <= low <= high <= bounds[1]:
        raise OverflowError(
            f"{operation.__name__} leaves {bounds[2]}: results from {low} to {high}"
        )
    return found


def binary(real: Callable) -> Callable:
    """In place of a method of TritonSemantic with two operands."""
    plans: dict[tuple, Any] = {}
    kept = []  # the types, whose identities the plans go by

    def plan(semantic: Any, lhs: Any, rhs: Any, rest: tuple) -> tuple[Any, Any]:
        """(result, what the next call does or False)."""
        names = ("binary_op", "create_idiv", "create_addptr")
        result, name, args = watched(names, lambda: real(semantic, lhs, rhs, *rest))
        if name == "create_addptr":
            swapped = lhs.__class__ is not Tensor or not lhs.type.scalar.is_ptr()
            pointer, offset = (rhs, lhs) if swapped else (lhs, rhs)
            width = max(1, pointer.type.scalar.element_ty.primitive_bitwidth // 8)
            distance, _ = own_data(offset, args[1].data)
            if distance is not None:
                distance = distance.astype(np.uint64) * np.uint64(width)
            return result, ("pointer", swapped, distance, np.uint64(width), template_of(result))
        operands = [x for x in (lhs, rhs) if isinstance(x, Tensor)]
        if not name or not numbers_of_numpy(*operands, result):
            return result, False
        operation = args[2] if name == "binary_op" else quotient
        left, right = own_data(lhs, args[0].data), own_data(rhs, args[1].data)
        kind, data = result.type.scalar, result.handle.data
        bounds = None
        if operation in RANGED and kind.is_int() and kind.int_bitwidth < 64:
            bounds = (kind.get_int_min_value(), kind.get_int_max_value(), kind)
        return result, (
            operation, *left, *right, bounds, data.dtype, result.handle.dtype, template_of(result)
        )  # fmt: skip

    @wraps(real)  # the check of overflows goes by names
    def quick(semantic: Any, lhs: Any, rhs: Any, *rest: Any, **named: Any) -> Any:
        if named:  # the one that there is besides
            rest = (*named.values(),)
        key = (
            id(lhs.type) if lhs.__class__ is Tensor else key_of(lhs),
            id(rhs.type) if rhs.__class__ is Tensor else key_of(rhs),
            rest == (False,),  # an overflow is no error
        )
        found = plans.get(key)
        if found is None:
            result, found = plan(semantic, lhs, rhs, rest)
            plans[key] = found
            kept.append((getattr(lhs, "type", None), getattr(rhs, "type", None)))
            return result
        if found is False:
            return real(semantic, lhs, rhs, *rest)
        if found[0] == "pointer":
            _, swapped, distance, width, template = found
            pointer, offset = (rhs, lhs) if swapped else (lhs, rhs)
            if distance is None:
                distance = offset.handle.data.astype(np.uint64) * width
            handle = pointer.handle
            return made(handle.data + distance, handle.dtype, template)
        operation, left, left_type, right, right_type, bounds, data_type, kind, template = found
        left, right = array_of(left, lhs, left_type), array_of(right, rhs, right_type)
        checked = bounds is not None and not key[2]
        data = wide(operation, left, right, bounds) if checked else operation(left, right)
        if data.dtype is not data_type:
            data = data.astype(data_type)
        return made(data, kind, template)

    return quick


def select(real: Callable) -> Callable:
    """In place of TritonSemantic.where."""
    plans: dict[tuple, Any] = {}
    kept = []

    def quick(semantic: Any, condition: Any, x: Any, y: Any) -> Any:
        key = key_of(condition), key_of(x), key_of(y)
        found = plans.get(key)
        if found is None:
            result, name, args = watched(("ternary_op",), lambda: real(semantic, condition, x, y))
            operands = [operand for operand in (x, y) if isinstance(operand, Tensor)]
            found = False
            if name and condition.dtype is tl.int1 and numbers_of_numpy(result, *operands):
                one, other = args[1:3]
                found = (
                    *own_data(x, one.data), *own_data(y, other.data), result.handle.dtype, template_of(result)
                )  # fmt: skip
            plans[key] = found
            kept.append([getattr(value, "type", None) for value in (condition, x, y)])
            return result
        if found is False:
            return real(semantic, condition, x, y)
        one, one_type, other, other_type, kind, template = found
        one, other = array_of(one, x, one_type), array_of(other, y, other_type)
        return made(np.where(condition.handle.data, one, other), kind, template)

    return quick


def cast(real: Callable) -> Callable:
    """In place of TritonSemantic.cast."""
    plans: dict[tuple, Any] = {}
    kept = []

    def quick(semantic: Any, x: Any, kind: Any, *rounding: Any) -> Any:
        own = x.type
        if own.scalar is kind:
            return x
        key = (id(own), id(kind), *rounding)
        found = plans.get(key)
        if found is None:
            names = ("cast_impl", "create_bitcast", "create_int_to_ptr", "create_ptr_to_int")
            result, name, _ = watched(names, lambda: real(semantic, x, kind, *rounding))
            found = False
            if name and numbers_of_numpy(x, result):
                handle, viewed = result.handle, name != "cast_impl"
                found = (viewed, handle.data.dtype, handle.dtype, template_of(result))
            plans[key] = found
            kept.append((own, kind))
            return result
        if found is False:
            return real(semantic, x, kind, *rounding)
        viewed, data_type, handle_type, template = found
        data = x.handle.data
        data = data.view(data_type) if viewed else data.astype(data_type)
        return made(data, handle_type, template)

    return quick


def load(real: Callable) -> Callable:
    """In place of TritonSemantic._load_legacy."""
    plans: dict[tuple, Any] = {}
    kept = []

    def quick(semantic: Any, ptr: Any, mask: Any, other: Any, *rest: Any) -> Any:
        key = (
            id(ptr.type),
            mask if mask is None else id(mask.type),
            other if other is None else id(other.type),
        )
        found = plans.get(key)
        if found is None or rest[0] or rest[1]:
            result, name, _ = watched(
                ("create_masked_load",), lambda: real(semantic, ptr, mask, other, *rest)
            )
            found, shape, data_type = False, ptr.handle.data.shape, result.handle.data.dtype
            known = other is None or numbers_of_numpy(result, other)
            if name and known and result.handle.data.shape == shape:
                missing = np.zeros(shape, data_type)
                found = (
                    shape, data_type, np.ones(shape, bool), missing, result.handle.dtype, template_of(result)
                )  # fmt: skip
            plans[key] = found
            kept.append([getattr(value, "type", None) for value in (ptr, mask, other)])
            return result
        if found is False:
            return real(semantic, ptr, mask, other, *rest)
        shape, data_type, shown, missing, kind, template = found
        if mask is not None:
            shown = mask.handle.data
            if shown.shape != shape:
                shown = np.broadcast_to(shown, shape)
        if other is not None:
            missing = array_of(None, other, data_type)
            if missing.shape != shape:
                missing = np.broadcast_to(missing, shape)
        data = interpreter._interpreter.load(ptr.handle.data, shown, missing, data_type)
        return made(data, kind, template)

    return quick


def constant(real: Callable) -> Callable:
    """In place of TritonSemantic.scalar_constant."""
    known: dict[tuple, Any] = {}
    kept = []

    def quick(semantic: Any, value: Any, dtype: Any) -> Any:
        key = value.__class__, exact(value), id(dtype)
        found = known.get(key)
        if found is None:
            result = real(semantic, value, dtype)
            known[key] = result.handle.data, result.handle.dtype, template_of(result)
            kept.append(dtype)
            return result
        return made(*found)

    return quick


def item(real: Callable) -> Callable:
    """In place of tensor.__getitem__, which knows new axes alone."""
    plans: dict[tuple, Any] = {}
    kept = []
    whole = slice(None)

    def quick(self: Any, slices: Any, **options: Any) -> Any:
        if slices.__class__ is not tuple or not self.type.is_block():
            return real(self, slices, **options)
        key = (id(self.type), *[x is None for x in slices])
        found = plans.get(key)
        if found is None or any(x is not None and x != whole for x in slices):
            result = real(self, slices, **options)
            plans[key] = template_of(result)
            kept.append(self.type)
            return result
        return made(self.handle.data[slices], self.handle.dtype.scalar, found)

    return quick


def right_shift(self: Any, lhs: Any, rhs: Any) -> Any:
    """In place of InterpreterBuilder.create_ashr, which changes its operands for whoever holds them
    too."""
    one, other = (
        Handle(x.data.astype(interpreter._get_signed_np_dtype(x.data.dtype)), x.dtype)
        for x in (lhs, rhs)
    )
    return self.binary_op(one, other, np.right_shift)


def unwrap(real: Callable) -> Callable:
    """In place of core._unwrap_if_constexpr."""

    def quick(value: Any) -> Any:
        kind = value.__class__
        if kind is Constant:
            return value.value
        if kind is Tensor or kind is int or kind is bool:
            return value
        return real(value)

    return quick


BINARY = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "minimum", "maximum", "and_", "or_", "xor_", "lshr",
    "ashr", "shl", "greater_than", "greater_equal", "less_than", "less_equal", "equal", "not_equal",
)  # fmt: skip
# operators that hand both operands over as they are: (method, whether swapped, what else it takes)
OPERATORS = {
    "__add__": ("add", False, (True,)), "__radd__": ("add", True, (True,)),
    "__sub__": ("sub", False, (True,)), "__rsub__": ("sub", True, (True,)),
    "__mul__": ("mul", False, (True,)), "__rmul__": ("mul", True, (True,)),
    "__truediv__": ("truediv", False, ()), "__rtruediv__": ("truediv", True, ()),
    "__floordiv__": ("floordiv", False, ()), "__mod__": ("mod", False, ()),
    "__and__": ("and_", False, ()), "__or__": ("or_", False, ()), "__xor__": ("xor_", False, ()),
}  # fmt: skip
# comparisons, before which a number becomes a tensor of a type of its own
COMPARISONS = {
    "__gt__": "greater_than", "__ge__": "greater_equal", "__lt__": "less_than", "__le__": "less_equal",
    "__eq__": "equal", "__ne__": "not_equal",
}  # fmt: skip


def method(name: str, patched: Callable) -> Callable:
    """What a tensor's method of this name is while a kernel runs, in place of `patched`."""
    if not KNOWN:
        return patched
    semantic = interpreter.interpreter_semantic
    if name == "__getitem__":
        return item(patched)
    if name in COMPARISONS:
        compare = getattr(type(semantic), COMPARISONS[name])

        def comparison(self: Any, other: Any, **options: Any) -> Any:
            if other.__class__ is not Tensor:
                other = semantic.to_tensor(other)
            return compare(semantic, self, other)

        return comparison
    if name not in OPERATORS:
        return patched
    found, swapped, rest = OPERATORS[name]
    run = getattr(type(semantic), found)

    def operator(self: Any, other: Any, **options: Any) -> Any:
        if other.__class__ is Constant:
            other = other.value
        if swapped:
            return run(semantic, other, self, *rest)
        return run(semantic, self, other, *rest)

    return operator


def called(real: Callable) -> Callable:
    """In place of InterpretedFunction.__call__, which finds its rewritten function anew each time:
    a kernel's helper is called within a kernel, whose launch has patched the language."""

    def quick(self: Any, *args: Any, **options: Any) -> Any:
        function = self.__dict__.get("rewritten")
        if function is None:
            function = self.rewritten = self.rewrite()
        try:
            return function(*args, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    return quick


def install() -> None:
    """For this process, once."""
    if not KNOWN:
        return
    semantic = type(interpreter.interpreter_semantic)
    for name in BINARY:
        setattr(semantic, name, binary(getattr(semantic, name)))
    semantic.where, semantic.cast = select(semantic.where), cast(semantic.cast)
    semantic.scalar_constant = constant(semantic.scalar_constant)
    semantic._load_legacy = load(semantic._load_legacy)
    type(builder).create_ashr = right_shift
    interpreter.InterpretedFunction.__call__ = called(interpreter.InterpretedFunction.__call__)
    tl.core._unwrap_if_constexpr = unwrap(tl.core._unwrap_if_constexpr)
