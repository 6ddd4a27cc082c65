"""Writes a traced model as a folder of ONNX graphs that share one file of weights."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from kvfold.exports.onnx.attention import CacheTensor, Call
from kvfold.exports.onnx.graph import INT64, IR_VERSION, OPSET, Constants, Graph
from kvfold.exports.onnx.trace import DOMAIN, Trace, names_of

WEIGHTS_NAME = "weights.bin"
INLINE_NBYTES = 1024  # smaller tensors stay in the graph
ALIGNMENT = 4096  # of tensors in the file, so that it can be mapped
GRAPHS = {"prefill": False, "decode": True}  # file name's stem → one token at a time


class Form(Protocol):
    """Writes the attention of one graph."""

    def write(
        self, constants: Constants, call: Call, tensors: list[str]
    ) -> tuple[Graph, list[str]]:
        """Nodes of one layer, and the names of its output and its cache; see
        PackedAttention.write."""
        ...


class WeightFile:
    """Tensors one after the other, each content once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[str, tuple[int, int]] = {}
        self.end = 0

    def add(
        self, stream: BinaryIO, name: str, dtype: int, shape: Sequence[int], data: memoryview
    ) -> TensorProto:
        """A tensor whose bytes stand in the file."""
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self.places:
            stream.write(b"\0" * (-self.end % ALIGNMENT))
            start = self.end + -self.end % ALIGNMENT
            stream.write(data)
            self.places[digest] = (start, len(data))
            self.end = start + len(data)
        offset, length = self.places[digest]
        tensor = TensorProto(
            name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL
        )
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def _narrow(array: np.ndarray) -> tuple[int, np.ndarray] | None:
    """A float32 array in 16 bits, where that loses nothing: (ONNX type, its words)."""
    words = array.view(np.uint32)
    if not (words & 0xFFFF).any():
        return TensorProto.BFLOAT16, (words >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return (
        (TensorProto.FLOAT16, half.view(np.uint16))
        if (half.astype(np.float32) == array).all()
        else None
    )


def _store(
    file: WeightFile, stream: BinaryIO, arrays: Mapping[str, np.ndarray]
) -> tuple[list[TensorProto], list[NodeProto]]:
    """Tensors for a graph, and the casts that make those float32 again which the file holds in 16
    bits."""
    tensors, casts = [], []
    for name, array in arrays.items():
        if array.nbytes <= INLINE_NBYTES:
            tensors.append(numpy_helper.from_array(np.asarray(array), name))
            continue
        array = np.ascontiguousarray(array)
        narrow = _narrow(array) if array.dtype == np.float32 else None
        if narrow:
            dtype, words = narrow
            tensors.append(file.add(stream, f"{name}.16", dtype, array.shape, words.data.cast("B")))
            casts.append(helper.make_node("Cast", [f"{name}.16"], [name], to=TensorProto.FLOAT))
        else:
            dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
            tensors.append(file.add(stream, name, dtype, array.shape, array.data.cast("B")))
    return tensors, casts


def _value_info(name: str, dtype: int, dims: Sequence[str | int]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, list(dims))


def _renamed(tensors: Sequence[Sequence[CacheTensor]], prefix: str) -> list[ValueInfoProto]:
    """Inputs or outputs of the cache; lengths that a call changes have names of their own on either
    side."""
    found = []
    for name, tensor in zip(
        names_of(tensors, prefix), (t for layer in tensors for t in layer), strict=True
    ):
        dims = [d if d == "batch" or isinstance(d, int) else f"{prefix}_{d}" for d in tensor.dims]
        found.append(_value_info(name, tensor.dtype, dims))
    return found


def _assemble(
    trace: Trace, tensors: Sequence[Sequence[CacheTensor]], form: Form, single: bool, vocab: int
) -> tuple[ModelProto, Constants]:
    """The graph of one form, without weights."""
    constants = Constants()
    nodes: list[NodeProto] = []
    calls = {call.index: call for call in trace.calls}
    for node in trace.proto.graph.node:
        if node.domain != DOMAIN:
            bare = NodeProto()
            bare.CopyFrom(node)
            bare.ClearField(
                "metadata_props"
            )  # the exporter's notes: source files, with this machine's paths
            bare.ClearField("doc_string")
            nodes.append(bare)
            continue
        layer = helper.get_node_attr_value(node, "layer")
        graph, names = form.write(constants, calls[layer], list(node.input))
        nodes += graph.nodes
        nodes += [
            helper.make_node("Identity", [a], [b])
            for a, b in zip(names, node.output, strict=True)
            if b
        ]
    tokens = 1 if single else "tokens"
    inputs = [
        _value_info("input_ids", INT64, ["batch", tokens]),
        _value_info("logits_at", INT64, ["kept"]),
        *_renamed(tensors, "past"),
    ]
    outputs = [
        _value_info("logits", TensorProto.FLOAT, ["batch", "kept", vocab]),
        *_renamed(tensors, "present"),
    ]
    made = helper.make_graph(nodes, "decode" if single else "prefill", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET)]
    if any(node.domain == "com.microsoft" for node in nodes):
        opsets.append(helper.make_opsetid("com.microsoft", 1))
    return helper.make_model(
        made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="kvfold"
    ), constants


def write_graphs(
    folder: Path,
    trace: Trace,
    tensors: Sequence[Sequence[CacheTensor]],
    make_form: Callable[[bool], Form],
    vocab: int,
    metadata: Mapping[str, Any],
) -> None:
    """Writes prefill.onnx, decode.onnx and weights.bin, and checks them.

    Args:
        folder: exists.
        make_form: single → the writer of that graph's attention.
        vocab: size of the logits.
        metadata: goes into the graphs' metadata_props, values as JSON.
    Raises:
        onnx.checker.ValidationError: a graph is not valid, which is a fault of this code.
    """
    file = WeightFile(folder / WEIGHTS_NAME)
    with open(file.path, "wb") as stream:
        for stem, single in GRAPHS.items():
            model, constants = _assemble(trace, tensors, make_form(single), single, vocab)
            arrays = {t.name: numpy_helper.to_array(t) for t in constants.tensors.values()}
            stored, casts = _store(file, stream, {**trace.weights, **arrays})
            nodes = [*casts, *model.graph.node]
            del model.graph.node[:]
            model.graph.node.extend(nodes)
            model.graph.initializer.extend(stored)
            helper.set_model_props(
                model, {f"kvfold.{key}": json.dumps(value) for key, value in metadata.items()}
            )
            (folder / f"{stem}.onnx").write_bytes(model.SerializeToString())
    for stem in GRAPHS:
        onnx.checker.check_model(str(folder / f"{stem}.onnx"))


def copy_side_files(source: Path, target: Path, skip: set[str]) -> None:
    """Copies config, tokenizer and licence files: everything but weights and what `skip` names."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in (".safetensors", ".png") and path.name not in skip:
            shutil.copyfile(path, target / path.name)
