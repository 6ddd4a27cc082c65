"""A cache on disk: one safetensors file whose header's `kvfold_cache` is JSON. Restored, it goes on as if it had never stopped.

Tensors of layer I, with R 16-bit rows and P distinct pages of all sequences together:

    layers.I.keys, layers.I.values    float16 [num_kv_heads, R, head_dim]: of each sequence its sinks, then its window
    layers.I.pages                    uint8 [P, page_nbytes]

The JSON object: `version`; `artifact`, the digest of the artifact's kv_cache.json; `rollback`; `padding`, columns of each
sequence; `layers`, of each layer `columns`, and of each sequence `length`, `oldest` (first token of the window that is
there) and `pages` (rows of layers.I.pages, −1 where a sliding window has left one behind); `sha256` of all that.
"""

import hashlib
import json
import os
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvfold.errors import KVBudgetExceeded, KvfoldError
from kvfold.exports.account import batch_nbytes
from kvfold.runtime.cache.ambient import neutrally
from kvfold.runtime.cache.sequences import PASSED

if TYPE_CHECKING:
    from kvfold.runtime.cache.cache import QuantizedKVCache

VERSION = 1
FIELD = "kvfold_cache"


def save_cache(cache: Any, path: str | PathLike) -> None:
    """Writes a cache to `path`, which appears complete or not at all.

    Raises:
        KvfoldError: the cache holds no tokens, was made by hand, or `path` can't be written.
    """
    if cache.artifact is None:
        raise KvfoldError(
            "This cache belongs to no artifact, so no file could say when it fits; save one of generate's."
        )
    if not cache.get_seq_length():
        raise KvfoldError("This cache holds no tokens, so there is nothing to save; run the model on a prompt first.")
    tensors: dict[str, Tensor] = {}
    layers = []
    for i, layer in enumerate(cache.layers):
        layers.append(_layer_state(layer, f"layers.{i}.", tensors))
    body = {
        "version": VERSION, "artifact": cache.artifact, "rollback": cache.geometry.rollback,
        "padding": cache.padding.columns, "layers": layers,
    }  # fmt: skip
    header = json.dumps({**body, "sha256": _sha256(body, tensors)})
    path = Path(path)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, scratch, metadata={FIELD: header})
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise KvfoldError(f"The cache cannot be written to '{path}' ({error}); choose another place.") from None
    finally:
        scratch.unlink(missing_ok=True)


@neutrally
def load_cache(path: str | PathLike, model: Any) -> "QuantizedKVCache":
    """The cache that `cache.save` wrote, on the device of `model`, which must be of the same artifact.

    Raises:
        KvfoldError: no such file, a damaged one, or one of another artifact or version.
        KVBudgetExceeded: it takes more than the model's kv_budget.
    """
    if not hasattr(model, "new_kv_cache"):
        raise KvfoldError("A cache is restored for a model that runtime.load_pretrained has loaded; this one is not.")
    body, tensors = _read(Path(path))
    digest = model.kv_artifact.metadata.digest
    if body["artifact"] != digest:
        raise KvfoldError(
            f"'{path}' is a cache of another artifact ({str(body['artifact'])[:12]}…, this model's is {digest[:12]}…); load "
            "the artifact that it was made with."
        )
    cache = model.new_kv_cache()
    cache.extend_rollback(body["rollback"])
    lengths = body["layers"][0]["length"]
    if cache.pager is not None and cache.budget is not None:
        fixed = cache.geometry.fixed_nbytes(max(lengths)) * len(lengths) * len(cache.layers)
        most = max(len(tensors[f"layers.{i}.pages"]) for i in range(len(cache.layers)))
        need = fixed + cache.pager.needed(most, min(1, most))
        if need > cache.budget:
            raise KVBudgetExceeded(
                f"The cache in '{path}' takes {need} bytes on the device, with all pages in host memory, but kv_budget is "
                f"{cache.budget}; raise kv_budget."
            )
        cache.pager.admit(cache, fixed, cache.budget, most)
    elif cache.budget is not None:
        need = batch_nbytes(cache.geometry, cache.formats, lengths)
        if need > cache.budget:
            raise KVBudgetExceeded(
                f"The cache in '{path}' takes {need} bytes, but kv_budget is {cache.budget}; raise kv_budget."
            )
    cache.padding.columns = list(body["padding"])
    parameter = next(model.parameters())
    for i, (layer, state) in enumerate(zip(cache.layers, body["layers"], strict=True)):
        _restore(layer, state, f"layers.{i}.", tensors, parameter)
    return cache


def _layer_state(layer: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Adds a layer's tensors, on the CPU, and returns the rest of its state."""
    g = layer.geometry
    numbers = sorted({i for ids in layer.pages for i in ids if i != PASSED})
    place = {number: row for row, number in enumerate(numbers)} | {PASSED: PASSED}
    oldest = [max(g.sinks, low, n - g.ring) for low, n in zip(layer.oldest, layer.length, strict=True)]
    keys, values = [], []
    for b, length in enumerate(layer.length):
        rows = torch.cat((layer.slots(0, min(g.sinks, length)), layer.slots(oldest[b], length)))
        keys.append(layer.raw_keys[b][:, rows].cpu())
        values.append(layer.raw_values[b][:, rows].cpu())
    tensors[prefix + "keys"], tensors[prefix + "values"] = torch.cat(keys, 1), torch.cat(values, 1)
    pages = [layer.pool.page(number).cpu() for number in numbers]
    tensors[prefix + "pages"] = (
        torch.stack(pages) if pages else torch.zeros(0, layer.pool.page_nbytes, dtype=torch.uint8)
    )
    return {
        "columns": layer.columns, "length": list(layer.length), "oldest": oldest,
        "pages": [[place[i] for i in ids] for ids in layer.pages],
    }  # fmt: skip


def _restore(layer: Any, state: dict[str, Any], prefix: str, tensors: dict[str, Tensor], parameter: Tensor) -> None:
    """Fills a new layer with what `_layer_state` gave; `parameter` has the model's type and device."""
    g, lengths = layer.geometry, state["length"]
    like = parameter.new_zeros(len(lengths), g.num_kv_heads, 0, g.head_dim)
    layer.lazy_initialization(like, like)
    layer.columns, layer.length, layer.oldest = state["columns"], list(lengths), list(state["oldest"])
    start = 0
    for b, length in enumerate(lengths):
        rows = torch.cat((layer.slots(0, min(g.sinks, length)), layer.slots(layer.oldest[b], length)))
        part = slice(start, start + len(rows))
        start += len(rows)
        layer.raw_keys[b, :, rows] = tensors[prefix + "keys"][:, part].to(layer.device)
        layer.raw_values[b, :, rows] = tensors[prefix + "values"][:, part].to(layer.device)
    data = tensors[prefix + "pages"]
    numbers = []
    for page in data:
        numbers += layer.pool.allocate(1)
        layer.pool.page(numbers[-1]).copy_(page)
        layer.pool.written()
    layer.pages = [[PASSED if row == PASSED else numbers[row] for row in rows] for rows in state["pages"]]
    layer.passed = [ids.count(PASSED) for ids in layer.pages]
    for ids, passed in zip(layer.pages, layer.passed, strict=True):
        layer.pool.share(ids[passed:])
    layer.pool.release(numbers)  # each sequence owns them now
    layer._fit_table(0)
    for b, (ids, passed) in enumerate(zip(layer.pages, layer.passed, strict=True)):
        layer.enter(b, passed, ids[passed:])
        layer._set_state(b)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON object and the tensors of a file, checked against its hash."""
    if not path.is_file():
        raise KvfoldError(f"'{path}' is no file; give what `cache.save` wrote.")
    try:
        with safe_open(path, framework="pt") as stored:
            header = (stored.metadata() or {}).get(FIELD)
            tensors = {} if header is None else {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        body = None if header is None else json.loads(header)
    except (SafetensorError, ValueError, OSError) as error:
        raise KvfoldError(f"'{path}' is not a readable cache file ({error}); save the cache again.") from None
    if not isinstance(body, dict):
        raise KvfoldError(f"'{path}' is no cache of kvfold; give what `cache.save` wrote.")
    if body.get("version") != VERSION:
        raise KvfoldError(
            f"'{path}' is a cache of version {body.get('version')!r}, but this kvfold reads {VERSION}; save the cache again."
        )
    digest = body.pop("sha256", None)
    if digest != _sha256(body, tensors):
        raise KvfoldError(f"'{path}' does not match its own sha256; the file is damaged, save the cache again.")
    return body, tensors


def _sha256(body: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Of the JSON object and of all tensors, by name."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
