"""What was chosen for a layer, and how that is folded into a model's weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.compress.fuse import fuse_all
from kvfold.compress.models.streamed import move_to_file, release
from kvfold.compress.search.candidates import KeyCandidate, ValueCandidate
from kvfold.exports.architectures import Architecture


@dataclass(frozen=True)
class Layer:
    """One layer's choices: what the search found.

    Attributes:
        key_loss, value_loss: nats of KL that are foretold.
    """

    key: KeyCandidate
    value: ValueCandidate
    key_loss: float
    value_loss: float


def fold_layers(
    model: Any,
    arch: Architecture,
    layers: list[Layer],
    dtype: torch.dtype,
    keep: bool,
    folder: Path | None,
) -> None:
    """Folds each layer's choices into the model's projections.

    Args:
        dtype: that the folded weights are rounded to.
        keep: leave them as that type, not as the module's own.
        folder: for a model that is read layer by layer, whose folded weights go into a file there
            that has no name, so that nothing has to be removed; None: they stay in memory.
    Raises:
        OSError, SafetensorError: what the system says of that file, e.g. a full disk.
    """
    for modules, layer in zip(arch.reading_modules(model), layers, strict=True):
        fused = fused_parameters(modules, arch, layer)
        changed: list[Tensor] = []
        for attention, parameters in zip(modules, fused, strict=True):
            set_parameters(attention, parameters, dtype, keep)
            changed += [attention.get_parameter(name) for name in parameters]
        if folder is not None:
            move_to_file(model, changed, folder)
        release(model)


def fused_parameters(
    modules: list[Any], arch: Architecture, layer: Layer
) -> list[dict[str, Tensor]]:
    """All parameters of attention modules that the layer's choices change, float64, by name; the
    modules, its own and those that read its keys and values too, stay."""
    return fuse_all(modules, layer.value.matrix, layer.key.pair_scale, arch)


def set_parameters(
    attention: Any, fused: dict[str, Tensor], dtype: torch.dtype, keep: bool = False
) -> None:
    """Puts parameters rounded to `dtype` into the module; `keep`: as that type, not as the module's
    own."""
    for name, value in fused.items():
        parameter = attention.get_parameter(name)
        rounded = value.to(dtype)
        parameter.data = rounded if keep else rounded.to(parameter.dtype)
