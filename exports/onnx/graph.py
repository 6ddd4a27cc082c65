"""Writes nodes of an ONNX graph. Operators of the standard domain at opset 21,
so that any runtime of that opset runs them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

OPSET = 21
IR_VERSION = 10  # of opset 21
FLOAT, FLOAT16, UINT8, INT8 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.UINT8,
    TensorProto.INT8,
)
INT32, INT64, BOOL = TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL


class Constants:
    """The graph's constants, each stored once whatever asks for it, and a counter for names."""

    def __init__(self) -> None:
        self.tensors: dict[tuple, TensorProto] = {}
        self.count = 0

    def name(self, stem: str) -> str:
        """A name that no other tensor of the graph has."""
        self.count += 1
        return f"kv.{stem}.{self.count}"

    def add(self, array: np.ndarray) -> str:
        """Name of a constant tensor."""
        array = np.ascontiguousarray(array) if array.ndim else array
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.tensors:
            self.tensors[key] = numpy_helper.from_array(array, self.name("const"))
        return self.tensors[key].name


class Graph:
    """A list of nodes that grows; every method returns names of tensors.

    Args:
        constants: shared with the graphs of branches.
    """

    def __init__(self, constants: Constants) -> None:
        self.constants = constants
        self.nodes: list[NodeProto] = []

    def op(
        self, kind: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> Any:
        """Adds a node; its output's name, or a list of names for several."""
        names = [self.constants.name(kind) for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def ints(self, *values: int) -> str:
        """Constant int64 [len(values)]."""
        return self.constants.add(np.array(values, dtype=np.int64))

    def number(self, value: float) -> str:
        """Constant float32 scalar."""
        return self.constants.add(np.array(value, dtype=np.float32))

    def array(self, values: Any, dtype: Any = np.float32) -> str:
        """A constant tensor."""
        return self.constants.add(np.asarray(values, dtype=dtype))

    def cast(self, x: str, to: int) -> str:
        """`x` in another type, rounded to nearest even."""
        return self.op("Cast", x, to=to)

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps the dimension at that place, −1 is what is left over."""
        return self.op("Reshape", x, self.ints(*shape))

    def transpose(self, x: str, *perm: int) -> str:
        """Dimensions in the order `perm`."""
        return self.op("Transpose", x, perm=perm)

    def slice(self, x: str, axis: int, start: int | str, end: int | str | None = None) -> str:
        """x[start:end] along an axis; bounds are numbers or names of int64 [1]."""
        bounds = [
            b if isinstance(b, str) else self.ints(2**62 if b is None else b) for b in (start, end)
        ]
        return self.op("Slice", x, *bounds, self.ints(axis))

    def concat(self, parts: Sequence[str], axis: int) -> str:
        """Parts side by side; one part is itself."""
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=axis)

    def size(self, x: str, axis: int) -> str:
        """Length of one dimension, int64 [1]."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def total(self, x: str, *axes: int, keep: bool = False) -> str:
        """Sum over axes."""
        return self.op("ReduceSum", x, self.ints(*axes), keepdims=int(keep))

    def clamp(self, x: str, low: str, high: str) -> str:
        """Between two tensors, elementwise."""
        return self.op("Max", self.op("Min", x, high), low)

    def half(self, x: str) -> str:
        """float32 → float16, saturating at ±65504 as quantizer.to_float16 does."""
        return self.cast(self.op("Clip", x, self.number(-65504.0), self.number(65504.0)), FLOAT16)

    def choose(
        self, condition: str, then: tuple["Graph", list[str]], other: tuple["Graph", list[str]]
    ) -> list[str]:
        """The outputs of one of two branches; `condition` is bool [1]."""
        branches = [
            helper.make_graph(
                graph.nodes,
                self.constants.name("branch"),
                [],
                [helper.make_empty_tensor_value_info(n) for n in names],
            )
            for graph, names in (then, other)
        ]
        return self.op(
            "If", condition, outputs=len(then[1]), then_branch=branches[0], else_branch=branches[1]
        )  # fmt: skip
