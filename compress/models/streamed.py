"""Models that are bigger than memory: weights stay in their files, and a decoder layer is in
memory, in the type that is computed in, only while it runs.

What one layer after the other needs (embeddings, the last norm, the head) is in memory throughout.
A file's pages are given back to the system after each layer, so that a process is as big as the
layer that runs and what it computes.
"""

import json
import mmap
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from kvfold.compress.models.stored_names import Names, join, names_of, wide_names
from kvfold.errors import KvfoldError
from kvfold.exports.architectures import Architecture
from kvfold.exports.files import weight_files
from kvfold.pretrained import config_from_pretrained, model_from_config

TORCH_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Stored(NamedTuple):
    """Where a streamed model's weights are: files, their tensors by name, and what those are
    for."""

    files: "list[WeightFile]"
    tensors: dict[str, Tensor]
    names: Names


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
            return torch.frombuffer(bytearray(self._map[first:last]), dtype=dtype).view(
                entry["shape"]
            )
        count = (last - first) // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=first).view(
            entry["shape"]
        )

    def release(self) -> None:
        """Gives back the memory that reading has taken; what is looked at again is read again."""
        self._map.madvise(mmap.MADV_DONTNEED)


def load_streamed(
    path: Path, arch: Architecture, dtype: torch.dtype | None, device: torch.device, attention: str
) -> Any:
    """A checkpoint folder as a model whose decoder layers stay in their files, in eval mode and
    without gradients.

    Args:
        path: a folder that `load_model` reads too.
        arch: its row in the table.
        dtype: that is computed in; None: weights stay in their files, in the types that
            transformers gives them, and nothing is to be computed.
        device: where layers run, and the rest of the model stays.
        attention: name of an attention function.
    Raises:
        KvfoldError: tensors are missing or of the wrong shape.
    """
    config = config_from_pretrained(path)
    with init_empty_weights(include_buffers=False):
        model = model_from_config(config, dtype=config.dtype, attn_implementation=attention)
    files = [WeightFile(file) for file in weight_files(path)]
    stored = {name: tensor for file in files for name, tensor in file.tensors.items()}
    names = names_of(model, stored)
    own = model.state_dict()
    for name, target in names.same.items():
        if stored[name].shape != own[target].shape:
            raise KvfoldError(
                f"The tensor {name} in '{path}' is of the wrong shape, so its weights do not fit config.json; give a "
                "matching pair."
            )
    there = {
        target: nn.Parameter(stored[name], requires_grad=False)
        for name, target in names.same.items()
    }
    if dtype is None:  # the types that transformers gives them
        wide = wide_names(model, there, config.dtype)
        for target, x in there.items():
            x.data = x.data.to(torch.float32 if target in wide else own[target].dtype)
    model.load_state_dict(there, strict=False, assign=True)
    model.tie_weights()
    joined = set(names.joined.values())
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" and name not in joined:
            raise KvfoldError(
                f"The tensor {name} in '{path}' is missing, so its weights do not fit config.json; give a matching "
                "pair."
            )
    if (generation := path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_dict(
            json.loads(generation.read_text(encoding="utf-8"))
        )
    model.eval().requires_grad_(False)
    model.kvfold_stored = Stored(files, stored, names)
    if dtype is not None:
        layers = arch.decoder_layers(model)
        within = {id(x) for x in layers.parameters()}
        for x in model.parameters():
            if id(x) not in within:
                x.data = x.data.to(device).to(dtype)
        # numbers that are no weights, such as Gemma's factor on embeddings, have the type that is
        # computed in, as in a model that is read whole
        with init_empty_weights(include_buffers=False):
            whole = model_from_config(deepcopy(config), dtype=dtype, attn_implementation=attention)
        others = {name: x for name, x in whole.named_buffers() if name not in own}
        for name, buffer in model.named_buffers():
            buffer.data = others.get(name, buffer).data.to(device)
        for index, layer in enumerate(layers):
            prefix = f"{arch.layers}.{index}."
            parts = {
                name: stored[name]
                for name, target in names.joined.items()
                if target.startswith(prefix)
            }
            _stream(model, layer, parts, dtype, device)
    release(model)
    return model


def is_streamed(model: Any) -> bool:
    """Whether `load_streamed` gave it."""
    return hasattr(model, "kvfold_stored")


def release(model: Any) -> None:
    """Gives back the memory that looking at a streamed model's weights has taken; nothing for any
    other model."""
    if is_streamed(model):
        for file in model.kvfold_stored.files:
            file.release()


def move_to_file(model: Any, weights: list[Tensor], folder: Path) -> None:
    """Moves weights of a streamed model that were changed out of memory; nothing for any other
    model. The file loses its name at once, and its bytes with the model.

    Args:
        weights: parameters of the model, any shape, of types that files of weights have.
        folder: where the file is written.
    Raises:
        OSError, SafetensorError: what the system says, e.g. a full disk.
    """
    if not is_streamed(model):
        return
    with TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "weights.safetensors"
        save_file({str(i): x.data.cpu().contiguous() for i, x in enumerate(weights)}, path)
        file = WeightFile(path)
    for i, x in enumerate(weights):
        x.data = file.tensors[str(i)]
    model.kvfold_stored.files.append(file)


def stored_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a model's weights; of a streamed one as the checkpoint has them."""
    if not is_streamed(model):
        yield from model.state_dict().items()
        return
    _, tensors, names = model.kvfold_stored
    for name in [*names.same, *names.joined]:
        yield name, tensors[name]
        release(model)


def save_model(model: Any, folder: Path) -> None:
    """Writes config and weights as transformers' `save_pretrained` does; a streamed model's with
    the checkpoint's names, which that gives too."""
    if not is_streamed(model):
        model.save_pretrained(folder)
        return
    _, tensors, names = model.kvfold_stored
    own = model.state_dict()
    # of a text model that is read from a checkpoint of towers, whose part it is, transformers drops
    # the part's name
    part = f"{model.base_model_prefix}."
    state = {
        target if name == part + target else name: own[target]
        for name, target in names.same.items()
    } | {name: tensors[name] for name in names.joined}
    model.save_pretrained(folder, state_dict=state, save_original_format=False)


def present(layer: Any) -> AbstractContextManager[None]:
    """A context in which a decoder layer's weights are in memory, in the type that is computed in,
    for calls of its parts; of a model that isn't streamed they always are."""
    return getattr(layer, "kvfold_present", nullcontext)()


def _stream(
    model: Any, layer: Any, parts: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Makes a layer's forward pass bring its weights, and take them away again.

    Args:
        parts: by their names in the checkpoint, tensors that parameters of the layer are joined
            from.
        dtype, device: that the layer runs in and on.
    """
    plain = layer.forward

    @contextmanager
    def bring() -> Iterator[None]:
        places = [
            (m, name, x) for m in layer.modules() for name, x in m.named_parameters(recurse=False)
        ]
        try:
            if parts and any(x.device.type == "meta" for _, _, x in places):
                join(model, parts, model.config.dtype)
            for (
                module,
                name,
                _,
            ) in places:  # a new parameter: what autograd keeps of it stays as it is
                weight = getattr(module, name).data.to(device).to(dtype)  # the few bytes travel
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
            yield
        finally:
            for module, name, parameter in places:
                setattr(module, name, parameter)
            release(model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with bring():
            return plain(*args, **kwargs)

    layer.forward, layer.kvfold_present = forward, bring
