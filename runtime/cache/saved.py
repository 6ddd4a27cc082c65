"""What a cache file states, checked against the model before anything is made of it:
its hash fits whatever somebody has written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.cache_model import MOST_TOKENS
from kvfold.kernels.formats import Format
from kvfold.runtime.cache.entropy import NAMES, decode_layer
from kvfold.runtime.cache.storage import CODED

GONE = -1  # a page that a sliding window has left behind


def check_saved(
    path: Path,
    body: dict[str, Any],
    tensors: dict[str, Tensor],
    geometry: Geometry,
    formats: Sequence[tuple[Format, Format]],
    states: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> dict[str, Tensor]:
    """Checks the JSON object and the tensors of a cache file (storage.py).

    Args:
        tensors: as stored; taken out of there, so that memory holds one layer twice at the most.
        geometry, formats: of a new cache of the model.
        states: type and shape, without the batch, of each state of a hybrid model, by name.
    Returns:
        The tensors, decoded where they are entropy-coded.
    Raises:
        KvfoldError: what is wrong, by field.
    """

    def need(fits: bool, what: str) -> None:
        if not fits:
            raise KvfoldError(
                f"'{path}' describes no cache of this model: {what}; save the cache again."
            )

    need(
        set(body) == {"version", "artifact", "rollback", "padding", "layers"},
        "it lacks a field, or has one too many",
    )
    need(_count(body["rollback"], MOST_TOKENS), "rollback is no number of tokens")
    need(not states or not body["rollback"], "states go back by no rollback")
    need(_counts(body["padding"]), "padding is no list of columns")
    layers = body["layers"]
    need(
        isinstance(layers, list) and len(layers) == len(formats),
        f"it has not {len(formats)} layers",
    )
    fields = {"columns", "length", "oldest", "pages"}
    need(
        all(isinstance(layer, dict) and set(layer) == fields for layer in layers),
        "a layer has other fields",
    )
    geometry = replace(geometry, rollback=max(geometry.rollback, body["rollback"]))
    for i, layer in enumerate(layers):
        _check_layer(layer, layers[0], body["padding"], geometry, geometry.sliding_of(i), i, need)
    names = {f"layers.{i}.{name}" for i in range(len(layers)) for name in NAMES}
    need(
        set(tensors) == names | set(states),
        "its tensors are not three a layer" + (" and its states" if states else ""),
    )
    for name, (dtype, shape) in states.items():
        fits = tensors[name].shape == (len(body["padding"]), *shape)
        need(fits and tensors[name].dtype == dtype, f"{name} has another type or shape")
        need(bool(torch.isfinite(tensors[name]).all()), f"{name} is not finite")
    checked = {name: tensors.pop(name) for name in states}
    for i, (layer, pair) in enumerate(zip(layers, formats, strict=True)):
        found = {name: tensors.pop(f"layers.{i}.{name}") for name in NAMES}
        rows = sum(
            min(geometry.sinks, n) + max(0, n - low)
            for n, low in zip(layer["length"], layer["oldest"], strict=True)
        )
        used = {row for rows in layer["pages"] for row in rows if row != GONE}
        need(used == set(range(len(used))), f"layer {i} counts its pages with gaps")
        own = geometry.of_layer(i)
        if body["version"] == CODED:
            try:
                found = decode_layer(found, rows, len(used), own, pair)
            except ValueError as error:
                need(False, f"layers.{i}.{error}")
        shape = (own.num_kv_heads, rows, own.head_dim)
        for name in ("keys", "values"):
            need(
                found[name].dtype == torch.float16 and found[name].shape == shape,
                f"layers.{i}.{name} has another shape",
            )
            need(bool(torch.isfinite(found[name]).all()), f"layers.{i}.{name} is not finite")
        pages = found["pages"]
        size = own.pair_nbytes(*pair)
        need(
            pages.dtype == torch.uint8 and pages.shape == (len(used), size),
            f"layers.{i}.pages has another shape than {len(used)} pages of {size} bytes",
        )
        checked |= {f"layers.{i}.{name}": tensor for name, tensor in found.items()}
    return checked


def _check_layer(
    layer: dict[str, Any],
    first: dict[str, Any],
    padding: list[int],
    g: Geometry,
    sliding: int,
    i: int,
    need: Callable[[bool, str], None],
) -> None:
    """Checks what layer i states of its sequences; `first` is layer 0."""
    lengths, oldest, pages = layer["length"], layer["oldest"], layer["pages"]
    need(_counts(lengths) and bool(lengths) and _counts(oldest), f"layer {i} states no lengths")
    need(
        isinstance(pages, list)
        and all(isinstance(rows, list) and all(type(row) is int for row in rows) for rows in pages),
        f"layer {i} states no pages",
    )
    need(len(lengths) == len(oldest) == len(pages), f"layer {i} has not as many pages as sequences")
    need(
        lengths == first["length"] and layer["columns"] == first["columns"],
        f"layer {i} has other lengths than layer 0",
    )
    need(
        _count(layer["columns"], MOST_TOKENS) and len(padding) == len(lengths),
        "padding is of another batch",
    )
    for length, low, rows, pad in zip(lengths, oldest, pages, padding, strict=True):
        need(length == max(0, layer["columns"] - pad), "padding does not fit the lengths")
        packed = g.sinks + len(rows) * g.page_tokens
        need(not rows or packed <= length, f"layer {i} has more pages than tokens")
        need(length - packed <= g.ring, f"layer {i} has too few pages for its tokens")
        need(
            g.sinks <= low <= max(packed, g.sinks) and length - low <= g.ring,
            f"layer {i} lacks 16-bit rows",
        )
        gone = rows.count(GONE)
        need(all(row >= 0 for row in rows[gone:]), f"layer {i} lacks a page in the middle")
        need(
            gone <= g.passed_pages(length + g.rollback, sliding),
            f"layer {i} lacks pages that are still read",
        )


def _count(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(_count(x, MOST_TOKENS) for x in value)
