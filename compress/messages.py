"""Values as bytes that another process of the same run reads: tensors in safetensors' form, the
rest as JSON, and no pickle.

| in JSON | value |
|---|---|
| null, true, 1, 0.5, "text" | itself; a float keeps all its bits |
| ["list", …], ["tuple", …] | a list, a tuple |
| ["dict", [key, value], …] | a dict, its keys of any kind |
| ["tensor", number, order, where] | that one, its dimensions in the order of their strides; on "cpu" or "own" device |
| ["object", "module.Class", [field, value], …] | a dataclass of kvfold's |
"""

import importlib
import json
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

REST = "rest"  # name of the JSON among the tensors


def pack(value: object) -> bytes:
    """A value of the kinds in the table.

    Raises:
        TypeError: it holds something else.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(value, tensors)).encode()
    tensors[REST] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return save(tensors)


def unpack(data: bytes, device: torch.device | None = None) -> Any:
    """What `pack` was given.

    Args:
        device: this process's, for tensors that lay on the other's; None: the CPU.
    Raises:
        TypeError: it names something that `pack` never sends.
    """
    tensors = load(data)
    return _value(json.loads(tensors.pop(REST).numpy().tobytes()), tensors, device)


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        # what is computed from a matrix may differ in the last bit by how it lies in memory
        strides = value.stride()
        order = sorted(range(value.ndim), key=lambda d: (-strides[d], d))
        name = str(len(tensors))
        # a copy: safetensors refuses tensors that share memory
        ordered = value.detach().permute(order).cpu()
        tensors[name] = ordered.clone(memory_format=torch.contiguous_format)
        return ["tensor", name, order, "cpu" if value.device.type == "cpu" else "own"]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(_plain(x, tensors) for x in value)]
    if isinstance(value, dict):
        pairs = value.items()
        return ["dict", *([_plain(k, tensors), _plain(x, tensors)] for k, x in pairs)]
    kind = type(value)
    if is_dataclass(value) and kind.__module__.startswith("kvfold."):
        held = ([f.name, _plain(getattr(value, f.name), tensors)] for f in fields(value))
        return ["object", f"{kind.__module__}.{kind.__qualname__}", *held]
    raise TypeError(f"a {kind.__name__} cannot be sent to another process")


def _dataclass(name: str) -> Any:
    """A dataclass of kvfold's by its full name; nothing else is ever called.

    Raises:
        TypeError: it is none.
    """
    module, _, own = name.rpartition(".")
    found = getattr(importlib.import_module(module), own) if module.startswith("kvfold.") else None
    if not isinstance(found, type) or not is_dataclass(found) or found.__module__ != module:
        raise TypeError(f"'{name}' is no dataclass of kvfold's, and was not sent by it")
    return found


def _value(found: Any, tensors: dict[str, Tensor], device: torch.device | None) -> Any:
    if not isinstance(found, list):
        return found
    kind, *rest = found
    if kind == "tensor":
        name, order, where = rest
        back = [order.index(d) for d in range(len(order))]
        tensor = tensors[name].permute(back)
        return tensor if where == "cpu" or device is None else tensor.to(device)
    if kind == "object":
        made_of = {field: _value(x, tensors, device) for field, x in rest[1:]}
        return _dataclass(rest[0])(**made_of)
    if kind == "dict":
        return {_value(k, tensors, device): _value(x, tensors, device) for k, x in rest}
    values = [_value(x, tensors, device) for x in rest]
    return tuple(values) if kind == "tuple" else values
