"""A cache on disk: one safetensors file whose header's `kvfold_cache` is JSON. Restored, it goes on
as if it had never stopped.

Tensors of layer I, with R 16-bit rows and P distinct pages of all sequences together:

    layers.I.keys, layers.I.values    float16 [num_kv_heads, R, head_dim]: of each sequence its
    sinks, then its window layers.I.pages                    uint8 [P, page_nbytes]

and of layer I of a hybrid model, by the model's own numbers, its states of sequences B in the types
that the model computes them in, KIND being conv_states or recurrent_states, J their number:

    states.I.KIND.J                   [B, …]

The JSON object: `version`; `artifact`, the digest of the artifact's kv_cache.json; `rollback`;
`padding`, columns of each sequence; `layers`, of each layer `columns`, and of each sequence
`length`, `oldest` (first token of the window that is there) and `pages` (rows of layers.I.pages, −1
where a sliding window has left one behind); `sha256` of all that.

In version 2, the entropy-coded form, the three tensors of a layer are streams, uint8 [bytes] each,
that decode to those of version 1 (entropy.py); all else is the same.
"""

import hashlib
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.exports.scratch import write_whole
from kvfold.runtime.cache.entropy import NAMES, code_layer
from kvfold.runtime.cache.layer import PackedLayer
from kvfold.runtime.cache.sequence import PASSED
from kvfold.runtime.cache.states import Kept

VERSION = 1
CODED = 2  # the version of entropy-coded files
FIELD = "kvfold_cache"


def save_layers(
    path: str | PathLike,
    layers: Sequence[PackedLayer],
    artifact: str | None,
    entropy_coded: bool = False,
) -> None:
    """Writes the layers of a cache to `path`, which appears complete or not at all.

    Args:
        artifact: digest of the artifact that the cache belongs to.
        entropy_coded: write version 2.
    Raises:
        KvfoldError: the cache holds no tokens, was made by hand, has states that a call which
            failed has changed, or `path` can't be written; `entropy_coded` is no bool.
    """
    if not isinstance(entropy_coded, bool):
        raise KvfoldError(
            f"entropy_coded={entropy_coded!r} is not one this version knows; use True or False."
        )
    if artifact is None:
        raise KvfoldError(
            "This cache belongs to no artifact, so no file could say when it fits; save one of generate's."
        )
    if not layers[0].get_seq_length():
        raise KvfoldError(
            "This cache holds no tokens, so there is nothing to save; run the model on a prompt first."
        )
    tensors: dict[str, Tensor] = {}
    shared = layers[0].shared
    shared.states.check()
    tensors |= {state_name(name): tensor.cpu() for name, tensor in shared.states.kept()}
    states = []
    for i, layer in enumerate(layers):
        states.append(_layer_state(layer, f"layers.{i}.", tensors))
        if entropy_coded:  # a layer at a time, so that memory holds one twice
            found = {name: tensors[f"layers.{i}.{name}"] for name in NAMES}
            streams = code_layer(found, layer.geometry, layer.formats)
            tensors |= {f"layers.{i}.{name}": stream for name, stream in streams.items()}
    body = {
        "version": CODED if entropy_coded else VERSION,
        "artifact": artifact,
        "rollback": shared.geometry.rollback,
        "padding": shared.padding,
        "layers": states,
    }
    header = json.dumps({**body, "sha256": _sha256(body, tensors)})
    path = Path(path)
    try:
        write_whole(path, lambda scratch: save_file(tensors, scratch, metadata={FIELD: header}))
    except (OSError, SafetensorError) as error:
        raise KvfoldError(
            f"The cache cannot be written to '{path}' ({error}); choose another place."
        ) from None


def state_name(kept: Kept) -> str:
    """What a state is called in a file."""
    return "states.{}.{}.{}".format(*kept)


def _layer_state(layer: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Adds a layer's tensors, on the CPU, and returns the rest of its state."""
    g, window, pool = layer.geometry, layer.window, layer.table.pool
    numbers = sorted(layer.table.own_pages())
    place = {number: row for row, number in enumerate(numbers)} | {PASSED: PASSED}
    oldest = [window.oldest(sequence) for sequence in layer.table.sequences]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for b, length in enumerate(layer.lengths()):
        slots = torch.cat((window.slots(0, min(g.sinks, length)), window.slots(oldest[b], length)))
        for rows, part in zip((keys, values), window.read(b, slots), strict=True):
            rows.append(part.cpu())
    tensors[prefix + "keys"], tensors[prefix + "values"] = torch.cat(keys, 1), torch.cat(values, 1)
    pages = [pool.page(number).cpu() for number in numbers]
    tensors[prefix + "pages"] = (
        torch.stack(pages) if pages else torch.zeros(0, pool.page_nbytes, dtype=torch.uint8)
    )
    return {
        "columns": layer.columns,
        "length": layer.lengths(),
        "oldest": oldest,
        "pages": [[place[i] for i in ids] for ids in layer.table.pages()],
    }


def restore_layer(
    layer: PackedLayer,
    state: dict[str, Any],
    prefix: str,
    tensors: dict[str, Tensor],
    parameter: Tensor,
) -> None:
    """Fills a new layer with what `_layer_state` gave; `parameter` has the model's type and
    device."""
    g, lengths = layer.geometry, state["length"]
    like = parameter.new_zeros(len(lengths), g.num_kv_heads, 0, g.head_dim)
    layer.lazy_initialization(like, like)
    sequences = list(zip(lengths, state["oldest"], state["pages"], strict=True))
    counts = [min(g.sinks, length) + max(0, length - oldest) for length, oldest, _ in sequences]
    rows = zip(
        *(tensors[prefix + name].split(counts, 1) for name in ("keys", "values")), strict=True
    )
    layer.held.restore(sequences, list(rows), list(tensors[prefix + "pages"]))
    layer.count(state["columns"])


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON object and the tensors of a file, as they are stored, checked against its hash."""
    if not path.is_file():
        raise KvfoldError(f"'{path}' is no file; give what `cache.save` wrote.")
    try:
        with safe_open(path, framework="pt") as stored:
            header = (stored.metadata() or {}).get(FIELD)
            names = [] if header is None else list(stored.keys())
            tensors = {name: stored.get_tensor(name) for name in names}
        body = None if header is None else json.loads(header)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise KvfoldError(
            f"'{path}' is not a readable cache file ({error}); save the cache again."
        ) from None
    if not isinstance(body, dict):
        raise KvfoldError(f"'{path}' is no cache of kvfold; give what `cache.save` wrote.")
    if body.get("version") not in (VERSION, CODED):
        raise KvfoldError(
            f"'{path}' is a cache of version {body.get('version')!r}, but this kvfold reads "
            f"{VERSION} and {CODED}; save the cache again."
        )
    digest = body.pop("sha256", None)
    if digest != _sha256(body, tensors):
        raise KvfoldError(
            f"'{path}' does not match its own sha256; the file is damaged, save the cache again."
        )
    return body, tensors


def _sha256(body: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Of the JSON object and of all tensors, by name."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
