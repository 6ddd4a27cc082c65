"""What is known before the weights are read: model, budget, calibration text, output."""

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from kvfold.compress.budget import Budget, parse_budget
from kvfold.compress.models import Source, read_config, resolve_model
from kvfold.compress.models.states import states_of
from kvfold.compress.progress import stage
from kvfold.compress.recipe import Recipe
from kvfold.compress.text import calibration_sequences
from kvfold.compress.transforms import UNMIXED
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry, cache_nbytes
from kvfold.exports.architectures import (
    TEXT_ALONE,
    Architecture,
    architecture_of,
    attention_layers_of,
    head_dim_of,
    heads_of,
    is_chunked,
    rotary_dim_of,
    shared_layers_of,
    sliding_windows_of,
    text_of,
)
from kvfold.exports.cache_model import StatesModel
from kvfold.kernels.formats import Format
from kvfold.pretrained import tokenizer_from_pretrained

WINDOW_SHARE = 8  # a window that the budget decides takes this part of its bytes at the most, and
SLIDING_SHARE = 4  # this part of what a layer with a sliding window sees


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the weights are read."""

    source: Source
    config: Any
    arch: Architecture
    geometry: Geometry
    budget: Budget
    recipe: Recipe
    tokenizer: Any
    sequences: list[Tensor]
    text_name: str
    spread: int
    steps: list[int]
    max_memory: int | None = None  # bytes that are taken to be free; None: those that are
    states: StatesModel | None = None  # of a hybrid model

    @property
    def num_layers(self) -> int:
        """Layers that have keys and values."""
        return len(attention_layers_of(self.config))


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA if there is one, else the CPU.

    Raises:
        KvfoldError: no such device here.
    """
    if name.split(":")[0] == "meta":
        raise KvfoldError(
            "Device 'meta' holds no numbers to compute with; give 'auto', 'cpu' or 'cuda'."
        )
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise KvfoldError(
            f"Device '{name}' cannot be used here; give 'auto', 'cpu' or a device that this PyTorch sees."
        ) from error


def make_plan(
    model: str,
    budget: str,
    calib: str | None,
    recipe: Recipe,
    context: int | None,
    max_memory: int | None = None,
) -> Plan:
    """Finds the model and checks everything that can be checked before its weights are read.

    Args:
        model, budget, calib, recipe, context, max_memory: as in `pipeline.compress`.
    Raises:
        KvfoldError: what is wrong with any of them.
    """
    stage(f"finding the model '{model}'")
    source = resolve_model(model)
    config = read_config(source.path)
    arch, text = architecture_of(config), text_of(config)
    if config.model_type in TEXT_ALONE:
        stage(
            f"taking the language model of '{source.name}' alone, '{text.model_type}': the artifact reads no images"
        )
    if (
        recipe.key.transform == "smooth"
        and not arch.by_layer
        and rotary_dim_of(config) != head_dim_of(config)
    ):
        raise KvfoldError(
            f"key.transform 'smooth' scales the pairs that RoPE rotates, but '{source.name}' rotates "
            f"{rotary_dim_of(config)} of {head_dim_of(config)} channels; choose another key.transform in the recipe."
        )
    check_values_keep_channels(arch, recipe, source.name)
    heads, values = heads_of(config), recipe.value
    if arch.value_norm:  # no mixed formats (search/candidates.py)
        values = values.model_copy(update={"bits": ()})
    states = states_of(config, arch)
    recipe = without_rollback(recipe, source.name) if states is not None else recipe
    geometry = Geometry(
        *heads[0],
        recipe.sinks,
        recipe.least_window,
        recipe.page_tokens,
        sliding_windows_of(config),
        recipe.most_rollback,
        0 if states is None else states.nbytes(),
        heads if len(set(heads)) > 1 else (),
        shared_layers_of(config),
        is_chunked(config),
    )
    layers = len(heads)
    allowance = parse_budget(budget, geometry, layers, text.max_position_embeddings, context)
    smallest = [
        (
            recipe.key.least_format(dim, recipe.catalogue),
            values.least_format(dim, recipe.catalogue),
        )
        for _, dim in heads
    ]
    if recipe.rollback == "auto":
        if cache_nbytes(geometry, smallest, allowance.at) > allowance.nbytes:
            geometry = replace(geometry, rollback=0)
        recipe = recipe.model_copy(update={"rollback": geometry.rollback})
    check_reach(allowance, geometry, layers, cache_nbytes(geometry, smallest, allowance.at))
    if recipe.window == "auto":
        geometry = replace(geometry, window=longest_window(geometry, allowance, smallest))
        recipe = recipe.model_copy(update={"window": geometry.window})
    tokenizer = tokenizer_from_pretrained(source.path)
    c = recipe.calibration
    name, sequences = calibration_sequences(
        tokenizer, calib, c, text.max_position_embeddings, recipe.seed
    )
    check_ids(sequences, config, source.name)
    spread = c.spread or max(1, ceil(allowance.at / sequences[0].shape[1]))
    steps = graded_steps(spread, len(sequences)) if c.graded else [spread] * len(sequences)
    return Plan(
        source,
        config,
        arch,
        geometry,
        allowance,
        recipe,
        tokenizer,
        sequences,
        name,
        spread,
        steps,
        max_memory,
        states,
    )


def check_values_keep_channels(arch: Architecture, recipe: Recipe, name: str) -> None:
    """Refuses a basis that mixes the channels of values where a gate multiplies each of them behind
    attention, and a recipe that offers no format for values that are normalised.

    Raises:
        KvfoldError: naming the transform.
    """
    transform = recipe.value.transform
    if arch.value_norm and not recipe.value.levels:
        raise KvfoldError(
            f"value.levels is empty, but values of a '{arch.model_type}' model such as '{name}' are normalised behind "
            "their projection, which no format of value.bits goes with; offer some levels in the recipe."
        )
    if arch.gate and transform not in UNMIXED:
        raise KvfoldError(
            f"value.transform '{transform}' mixes channels, each of which a '{arch.model_type}' model such as '{name}' "
            f"multiplies by a gate of its own before o_proj; choose {', '.join(UNMIXED)} in the recipe."
        )


def without_rollback(recipe: Recipe, name: str) -> Recipe:
    """The recipe of a hybrid model, whose cache can't be cropped: its 16-bit rows need be kept no
    longer for that.

    Raises:
        KvfoldError: it asks for a rollback.
    """
    if recipe.rollback not in ("auto", 0):
        raise KvfoldError(
            f"rollback {recipe.rollback} keeps rows for tokens that are taken back, but layers of '{name}' keep a "
            "state, which can't go back; leave rollback out of the recipe."
        )
    return recipe.model_copy(update={"rollback": 0})


def longest_window(geometry: Geometry, budget: Budget, least: list[tuple[Format, Format]]) -> int:
    """Tokens of the window that the budget pays for: its own times a power of two, a WINDOW_SHAREth
    of the budget at the most.

    At equal bytes a longer window is worth more than the bits it takes from the pages, up to a
    quarter and more of them (benchmarks/LOG.md); an eighth leaves the pages, which all that lies
    further back depends on, most of theirs.

    Args:
        geometry: with the shortest window.
        least: the smallest formats of each layer, which must fit beside the window.
    """
    token = geometry.raw_nbytes(len(least)) / geometry.raw_rows
    most = min(
        [
            (budget.nbytes - geometry.state_nbytes) / (WINDOW_SHARE * token),
            *(n / SLIDING_SHARE for n in geometry.sliding if n),
        ]
    )
    window = geometry.window
    while 0 < 2 * window <= most:
        longer = replace(geometry, window=2 * window)
        if cache_nbytes(longer, least, budget.at) > budget.nbytes:
            break
        window *= 2
    return window


def graded_steps(spread: int, count: int) -> list[int]:
    """`count` steps between positions that rise geometrically from 1 to `spread`; for a single
    sequence, `spread` itself."""
    return [round(spread ** (i / (count - 1))) for i in range(count)] if count > 1 else [spread]


def check_ids(sequences: list[Tensor], config: Any, name: str) -> None:
    """Refuses a tokenizer that isn't the model's.

    Raises:
        KvfoldError: it gives an id that the model has no embedding for.
    """
    largest, size = max(int(ids.max()) for ids in sequences), config.get_text_config().vocab_size
    if largest >= size:
        raise KvfoldError(
            f"The tokenizer of '{name}' gives the token {largest}, but the model's vocab_size is {size}; put the "
            "model's own tokenizer files there."
        )


def check_reach(budget: Budget, geometry: Geometry, num_layers: int, least: int) -> None:
    """Refuses a budget below `least` bytes, the smallest cache that the search can choose.

    Raises:
        KvfoldError: naming the smallest budget that works, or, where even 16 bits would not, the
            length.
    """
    if budget.nbytes < least:
        packed = least - geometry.state_nbytes
        bits = ceil(8000 * packed / geometry.elements(budget.at, num_layers)) / 1000
        if bits > 16:
            raise KvfoldError(
                f"Budget '{budget.request}' counts at {budget.at} tokens, where the 16-bit sinks, window and first "
                f"page alone are more than an uncompressed cache ({least} bytes); choose a longer context."
            )
        raise KvfoldError(
            f"Budget '{budget.request}' is {budget.nbytes} bytes at {budget.at} tokens, out of reach: the smallest "
            f"cache of this model takes {least} bytes; ask for at least {bits} bits or {least}B@{budget.at}."
        )
