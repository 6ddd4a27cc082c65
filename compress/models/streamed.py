"""Models that are bigger than memory: weights stay in their files, and a decoder layer is in memory, in the type that
is computed in, only while it runs.

What one layer after the other needs (embeddings, the last norm, the head) is in memory throughout. A file's pages are
given back to the system after each layer, so that a process is as big as the layer that runs and what it computes.
"""

import json
import mmap
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig

from kvfold.errors import KvfoldError
from kvfold.exports.architectures import Architecture
from kvfold.exports.files import weight_files
from kvfold.pretrained import config_from_pretrained, model_from_config

TORCH_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightFile:
    """A safetensors file whose tensors are read when they are looked at.

    Attributes:
        tensors: by name, in the file's own types and memory.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        (length,) = struct.unpack_from("<Q", self._map)
        header = json.loads(self._map[8 : 8 + length])
        header.pop("__metadata__", None)
        self.tensors = {name: self._view(8 + length, entry) for name, entry in header.items()}

    def _view(self, start: int, entry: dict[str, Any]) -> Tensor:
        dtype = TORCH_TYPES[entry["dtype"]]
        first, last = (start + x for x in entry["data_offsets"])
        if first == last:
            return torch.empty(entry["shape"], dtype=dtype)
        if first % dtype.itemsize:  # a header of odd length
            return torch.frombuffer(bytearray(self._map[first:last]), dtype=dtype).view(entry["shape"])
        count = (last - first) // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=first).view(entry["shape"])

    def release(self) -> None:
        """Gives back the memory that reading has taken; what is looked at again is read again."""
        self._map.madvise(mmap.MADV_DONTNEED)


def load_streamed(
    path: Path, arch: Architecture, dtype: torch.dtype | None, device: torch.device, attention: str
) -> Any:
    """A checkpoint folder as a model whose decoder layers stay in their files, in eval mode and without gradients.

    Args:
        path: of a family whose modules are named as its tensors are.
        arch: its row in the table.
        dtype: that is computed in; None: all weights stay in their files, in their own types, and nothing is to be
            computed.
        device: where layers run, and the rest of the model stays.
        attention: name of an attention function.
    Raises:
        KvfoldError: tensors are missing, or named otherwise.
    """
    config = config_from_pretrained(path)
    with init_empty_weights(include_buffers=False):
        model = model_from_config(config, dtype=config.dtype, attn_implementation=attention)
    files = [WeightFile(file) for file in weight_files(path)]
    stored = {name: tensor for file in files for name, tensor in file.tensors.items()}
    for name, parameter in model.named_parameters():
        if name in stored and stored[name].shape != parameter.shape:
            raise KvfoldError(
                f"The tensor {name} in '{path}' is of the wrong shape, so its weights do not fit config.json; give a "
                "matching pair."
            )
    own = {name: nn.Parameter(x, requires_grad=False) for name, x in stored.items()}
    model.load_state_dict(own, strict=False, assign=True)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise KvfoldError(
                f"'{path}' has no tensor {name}, as models that are read layer by layer must; if no tensor is missing, "
                "give a --max-memory of more than twice the weights in float32, to read it whole."
            )
    if (generation := path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_dict(json.loads(generation.read_text(encoding="utf-8")))
    model.eval().requires_grad_(False)
    if dtype is not None:
        layers = arch.decoder_layers(model)
        within = {id(x) for x in layers.parameters()}
        for x in model.parameters():
            if id(x) not in within:
                x.data = x.data.to(device, dtype)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        for layer in layers:
            _stream(layer, dtype, device, lambda: release(model))
    model.kvfold_files = files
    release(model)
    return model


def is_streamed(model: Any) -> bool:
    """Whether `load_streamed` gave it."""
    return hasattr(model, "kvfold_files")


def release(model: Any) -> None:
    """Gives back the memory that looking at a streamed model's weights has taken; nothing for any other model."""
    for file in getattr(model, "kvfold_files", ()):
        file.release()


def present(layer: Any) -> AbstractContextManager[None]:
    """A context in which a decoder layer's weights are in memory, in the type that is computed in, for calls of its
    parts; of a model that isn't streamed they always are."""
    return getattr(layer, "kvfold_present", nullcontext)()


def _stream(layer: Any, dtype: torch.dtype, device: torch.device, release: Callable[[], Any]) -> None:
    """Makes a layer's forward pass bring its weights, and take them away again."""
    plain = layer.forward

    @contextmanager
    def bring() -> Iterator[None]:
        places = [(m, name, x) for m in layer.modules() for name, x in m.named_parameters(recurse=False)]
        try:
            for module, name, parameter in places:  # a new parameter: what autograd keeps of it stays as it is
                weight = parameter.data.to(device).to(dtype)  # the few bytes travel
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
            yield
        finally:
            for module, name, parameter in places:
                setattr(module, name, parameter)
            release()

    def forward(*args: Any, **kwargs: Any) -> Any:
        with bring():
            return plain(*args, **kwargs)

    layer.forward, layer.kvfold_present = forward, bring
