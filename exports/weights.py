"""Whether files of weights fit the model that config.json describes, found out from their headers
alone: before a loader makes room for what isn't there, and fills it with random numbers."""

import re
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvfold.errors import KvfoldError
from kvfold.exports.files import weight_files
from kvfold.pretrained import model_from_config, reason_of

TOWERS = re.compile(r"(^|[._])(vision|visual|audio|multi_modal)")
LEAST_TENSORS = 4  # of a decoder layer, in any family: projections and norms
MOST_BUFFER = 1 << 26  # elements that a model computes for itself, such as RoPE's frequencies


def stored_shapes(files: Iterable[Path], fix: str) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in safetensors files.

    Args:
        fix: what to do about a file that can't be read, the end of the sentence.
    Raises:
        KvfoldError: one is no whole safetensors file.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    found[name] = tuple(stored.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise KvfoldError(
                f"{file.name} in '{file.parent}' is not a whole safetensors file ({error}); {fix}."
            ) from None
    return found


def weights_nbytes(path: Path, dtype: torch.dtype | str) -> int:
    """Bytes of a folder's weights once they are read as `dtype`, a type or "auto" for their own;
    towers for pictures and sound, which are no part of a language model, left out.

    Raises:
        KvfoldError: they can't be read.
    """
    files = weight_files(path)
    if not isinstance(dtype, torch.dtype):
        return sum(file.stat().st_size for file in files)
    shapes = stored_shapes(files, "download it again")
    return dtype.itemsize * sum(
        prod(shape) for name, shape in shapes.items() if not TOWERS.search(name)
    )


def check_weights_fit(
    path: Path, config: Any, stored: dict[str, tuple[int, ...]], fix: str
) -> None:
    """Compares weights with the model of a config, which is built without any memory for its
    weights.

    Names that only one side has are the loader's to match, which knows the families whose
    checkpoints call things otherwise; what counts here is that the model has no weight of another
    shape, and not more of them than there are.

    Args:
        path: the folder, for the sentence.
        config: transformers' config of it.
        stored: of `stored_shapes`.
        fix: the end of the sentence.
    Raises:
        KvfoldError: config.json makes no model, or one of other weights.
    """
    layers = config.get_text_config().num_hidden_layers
    if len(stored) < LEAST_TENSORS * layers:
        raise KvfoldError(
            f"'{path}' holds {len(stored)} tensors of weights, too few for the {layers} layers that config.json "
            f"states; {fix}."
        )
    try:
        with torch.device("meta"):
            model = model_from_config(config)
    except Exception as error:  # fields of the right types can hold anything
        raise KvfoldError(
            f"config.json and the weights in '{path}' make no model ({type(error).__name__}: {reason_of(error)}); "
            f"{fix}."
        ) from error
    wanted = {
        name: tuple(tensor.shape) for name, tensor in model.named_parameters()
    }  # a tied one once
    for name, shape in sorted(wanted.items()):
        if stored.get(name, shape) != shape:
            raise KvfoldError(
                f"The weight {name} in '{path}' has not the shape that config.json gives it; {fix}."
            )
    if sum(map(prod, wanted.values())) > sum(map(prod, stored.values())):
        absent = [
            name for name in sorted(wanted) if not {name, name.removeprefix("model.")} & set(stored)
        ]
        what = (
            f"the weight {absent[0]}"
            if absent
            else "some of the weights that config.json describes"
        )
        raise KvfoldError(f"'{path}' lacks {what}; {fix}.")
    if sum(buffer.numel() for buffer in model.buffers()) > MOST_BUFFER:
        raise KvfoldError(
            f"config.json in '{path}' has the model compute tables of more than {MOST_BUFFER} numbers; {fix}."
        )
