"""A cache from a file that `cache.save` wrote."""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.errors import KVBudgetExceeded, KvfoldError
from kvfold.runtime.cache.ambient import neutrally
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.cache.saved import check_saved
from kvfold.runtime.cache.states import Kept
from kvfold.runtime.cache.storage import read_file, restore_layer, state_name


def check_origin(path: Path, found: str, digest: str) -> None:
    """Refuses a saved cache of another artifact, or of other KV heads of the same one.

    Args:
        found: the digest that the file names.
        digest: that of the model (`Artifact.digest`).
    """
    (other, _, heads), (own, _, part) = found.partition(", "), digest.partition(", ")
    if other != own:
        raise KvfoldError(
            f"'{path}' is a cache of another artifact ({other[:12]}…, this model's is {own[:12]}…); load "
            "the artifact that it was made with."
        )
    if heads != part:
        raise KvfoldError(
            f"'{path}' is a cache of {heads or 'all KV heads'}, but this model has {part or 'all KV heads'}; load it "
            "on the process that saved it, among as many as then."
        )


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
    check_origin(Path(path), str(body.get("artifact")), model.kv_artifact.digest)
    cache: QuantizedKVCache = model.new_kv_cache()
    like = _states_of(model) if cache.states else {}
    shapes = {state_name(kept): (x.dtype, tuple(x.shape[1:])) for kept, x in like.items()}
    tensors = check_saved(Path(path), body, tensors, cache.geometry, cache.formats, shapes)
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
    cache.states.restore({kept: tensors[state_name(kept)].to(x.device) for kept, x in like.items()})
    return cache


@torch.no_grad()
def _states_of(model: Any) -> dict[Kept, Tensor]:
    """States [1, …] of a hybrid model after any token, for their types, shapes and devices."""
    probe = model.new_kv_cache()
    parameter = next(model.parameters())
    token = torch.zeros(1, 1, dtype=torch.int64, device=parameter.device)
    model.base_model(input_ids=token, past_key_values=probe)
    return dict(probe.states.kept())
