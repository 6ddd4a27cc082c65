"""How the tensors of a checkpoint become a model's parameters, by transformers' own rules: most
have the parameter's name, some another one, and those of experts are joined."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig


class Names(NamedTuple):
    """What a checkpoint's tensors are for.

    Attributes:
        same: stored name → the parameter or buffer that the tensor is.
        joined: stored name → the parameter that is made of it and others.
    """

    same: dict[str, str]
    joined: dict[str, str]


def names_of(model: Any, stored: Mapping[str, Tensor]) -> Names:
    """Sorts a checkpoint's tensors; those that the model has no use for are left out.

    Args:
        model: of the checkpoint's config, its parameters anywhere.
        stored: tensors by their names in the checkpoint.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [x for x in rules if isinstance(x, WeightRenaming)]
    converters = [x for x in rules if isinstance(x, WeightConverter)]
    own = model.state_dict()
    names = Names({}, {})
    for name in stored:
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, own
        )
        if target not in own and name in own:
            target, pattern = name, None
        if target in own:
            (names.same if pattern is None else names.joined)[name] = target
    return names


def wide_names(model: Any, names: Iterable[str], dtype: torch.dtype) -> set[str]:
    """Those of a model's parameters and buffers that transformers keeps in float32 in a model of
    another type."""
    fields = ["_keep_in_fp32_modules_strict"] if dtype in (torch.float16, torch.bfloat16) else []
    fields += ["_keep_in_fp32_modules"] if dtype == torch.float16 else []
    patterns = [x for field in fields for x in getattr(model, field, None) or ()]
    if not patterns:
        return set()
    wide, *_ = build_glob_alternation(patterns)
    return {name for name in names if wide.search(name)}


def join(model: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Puts into the model, on the CPU, the parameters that are made of several tensors of a
    checkpoint.

    Args:
        tensors: by their names in the checkpoint, all that those parameters are made of.
        dtype: of the checkpoint.
    """
    rules: Any = get_model_conversion_mapping(model)
    config = LoadStateDictConfig(dtype=dtype, weight_mapping=rules, device_map={"": "cpu"})
    convert_and_load_state_dict_in_model(model, tensors, config)
