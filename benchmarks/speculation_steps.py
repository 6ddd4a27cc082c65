"""Time of a model's steps of one and of more tokens on full caches, and the bytes of these; for
benchmarks/self_speculation.py."""

import time
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache

from kvfold.compress.bench.decode import packed_step_ms, wait
from kvfold.compress.bench.model import fill_cache, free_memory
from kvfold.exports.account import Geometry, cache_nbytes
from kvfold.exports.spec import LayerSpec
from kvfold.runtime.backends.choose import backend_of
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.load import plain_cache

PLAIN = "16"


@torch.inference_mode()
def step_times(
    model: Any,
    caches: dict[str, list[LayerSpec]],
    geometry: Geometry,
    context: int,
    lengths: dict[str, list[int]],
    repeats: int,
) -> dict[str, dict[int, float]]:
    """Milliseconds of steps on caches of `context` tokens, by name and by number of new tokens; the
    fastest of `repeats`.

    Steps of all caches take turns, so that other load on the machine falls on all alike. "16" is
    the faster of transformers' own cache and of 16-bit pages. One token's step is a replayed graph
    where kernels run on a GPU.
    """
    device = model.device
    found: dict[str, dict[int, float]] = {name: {} for name in caches}
    held: dict[tuple[str, bool], Any] = {}
    for name, specs in caches.items():
        if model.kv_triton and device.type == "cuda":
            stand_in: Any = SimpleNamespace(specs=specs, geometry=geometry)
            found[name][1] = packed_step_ms(model, stand_in, 1, context, True)["ms"]
            free_memory(device)
        held[name, True] = QuantizedKVCache(specs, geometry, None, backend_of(model.kv_triton))
        fill_cache(held[name, True], 1, context, model.dtype, device)
        if name == PLAIN:
            held[name, False] = filled_plain(model, geometry, context)
    for turn in range(repeats + 1):  # in the first one kernels are compiled
        for (name, packed), cache in held.items():
            for count in lengths[name]:
                ms = one_step(model, cache, count, packed)
                if turn:
                    found[name][count] = min(ms, found[name].get(count, ms))
    return found


def filled_plain(model: Any, geometry: Geometry, context: int) -> DynamicCache:
    """transformers' own cache with random keys and values."""
    cache = DynamicCache(config=model.config)
    shape = (2, 1, geometry.num_kv_heads, context, geometry.head_dim)
    for layer in range(model.config.num_hidden_layers):
        cache.update(*torch.randn(shape, dtype=model.dtype, device=model.device), layer)
    return cache


def one_step(model: Any, cache: Any, count: int, packed: bool) -> float:
    """Milliseconds of a step of `count` tokens; of one thread on a CPU the processor's, which a
    busy machine adds less to."""
    clock = (
        time.process_time
        if model.device.type == "cpu" and torch.get_num_threads() == 1
        else time.perf_counter
    )
    ids = torch.zeros(1, count, dtype=torch.long, device=model.device)
    wait(model.device)
    begun = clock()
    if packed:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    else:
        with plain_cache(model):
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    wait(model.device)
    return 1e3 * (clock() - begun)


def bytes_of(
    caches: dict[str, list[LayerSpec]], geometry: Geometry, context: int, draft: str
) -> dict[str, int]:
    """Bytes of one sequence's cache, by name, and of both views in one, "DRAFT and VERIFIER".

    Both views share sinks, window and tables: the drafter's cache and, besides, the verifier's
    pages.
    """
    found = {}
    for name, specs in caches.items():
        formats = [(spec.key.format, spec.value.format) for spec in specs]
        whole = cache_nbytes(geometry, formats, context)
        found[name] = 2 * geometry.elements(context, len(specs)) if name == PLAIN else whole
        found[f"{draft} and {name}"] = whole - len(specs) * geometry.fixed_nbytes(context)
    for name in caches:
        found[f"{draft} and {name}"] += found[draft]
    return found
