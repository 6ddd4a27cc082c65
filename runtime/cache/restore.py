"""A cache from a file that `cache.save` wrote."""

from os import PathLike
from pathlib import Path
from typing import Any

from kvfold.errors import KVBudgetExceeded, KvfoldError
from kvfold.runtime.cache.ambient import neutrally
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.cache.saved import check_saved
from kvfold.runtime.cache.storage import read_file, restore_layer


@neutrally
def load_cache(path: str | PathLike, model: Any) -> QuantizedKVCache:
    """The cache that `cache.save` wrote, on the device of `model`, which must be of the same
    artifact.

    Raises:
        KvfoldError: no such file, a damaged one, or one of another artifact or version.
        KVBudgetExceeded: it takes more than the model's kv_budget.
    """
    if not hasattr(model, "new_kv_cache"):
        raise KvfoldError(
            "A cache is restored for a model that runtime.load_pretrained has loaded; this one is not."
        )
    body, tensors = read_file(Path(path))
    digest = model.kv_artifact.digest
    if body.get("artifact") != digest:
        raise KvfoldError(
            f"'{path}' is a cache of another artifact ({str(body.get('artifact'))[:12]}…, this "
            f"model's is {digest[:12]}…); load "
            "the artifact that it was made with."
        )
    cache: QuantizedKVCache = model.new_kv_cache()
    check_saved(Path(path), body, tensors, cache.geometry, cache.formats)
    cache.extend_rollback(body["rollback"])
    if cache.budget is not None:
        pages = max(len(tensors[f"layers.{i}.pages"]) for i in range(len(cache.layers)))
        need = cache.policy.hold(cache.layers, body["layers"][0]["length"], pages)
        if need > cache.budget:
            raise KVBudgetExceeded(
                f"The cache in '{path}' takes {need} bytes{cache.policy.stored}, but kv_budget is "
                f"{cache.budget}; raise "
                "kv_budget."
            )
    cache.shared.set_padding(list(body["padding"]))
    parameter = next(model.parameters())
    for i, (layer, state) in enumerate(zip(cache.layers, body["layers"], strict=True)):
        restore_layer(layer, state, f"layers.{i}.", tensors, parameter)
    return cache
