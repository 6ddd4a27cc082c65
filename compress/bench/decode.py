"""`kvfold bench decode`: decoding steps of a whole model on full caches, packed ones and
transformers'."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from kvfold.compress.bench.model import (
    attach_formats,
    build_model,
    fill_cache,
    free_memory,
    layer_formats,
    weights_nbytes,
)
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry, batch_nbytes
from kvfold.exports.reader import Artifact
from kvfold.runtime.backends.choose import backend_of
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.generate.graph import FUSE_AFTER, Decoding

ROOM = 128  # tokens that a cache takes besides those it is filled with
STEPS = 32  # timed in a row: one page of every sequence comes due in between
REPEATS = 3


def steps_ms(
    step: Callable[[Tensor], Tensor], batch: int, device: torch.device, warm: int, steps: int
) -> float:
    """Milliseconds of one greedy decoding step, the median of REPEATS runs of `steps` steps.

    Args:
        step: ids [B, 1] → logits [B, 1, vocab_size].
        warm: steps before the first timed one.
    """
    ids = torch.zeros(batch, 1, dtype=torch.long, device=device)

    def run(count: int) -> float:
        nonlocal ids
        wait(device)
        start = time.perf_counter()
        for _ in range(count):
            ids = step(ids).argmax(-1)
        wait(device)
        return (time.perf_counter() - start) * 1e3 / count

    run(warm)
    return statistics.median(run(steps) for _ in range(REPEATS))


def wait(device: torch.device) -> None:
    """Lets the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def packed_step_ms(model: Any, artifact: Artifact, batch: int, tokens: int, triton: bool) -> dict:
    """One decoding step of `model`, which was attached, on a full packed cache; a CUDA graph on a
    GPU.

    Returns:
        ms, cache_bytes (of `tokens` tokens, by the account) and resident_bytes (with those of the
        steps).
    """
    device, dtype = model.device, model.dtype
    cache = QuantizedKVCache(artifact.specs, artifact.geometry, None, backend_of(triton))
    fill_cache(cache, batch, tokens, dtype, device)

    def plain(ids: Tensor) -> Tensor:
        positions = cache.layers[0].table.state[:, :1].long()
        return model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits

    step = plain
    if device.type == "cuda":
        decoding = Decoding(model, insist=True)
        decoding.steps[batch] = FUSE_AFTER  # small operations are compiled at once
        step = lambda ids: decoding(input_ids=ids, past_key_values=cache).logits  # noqa: E731
        for _ in range(2):  # the first compiles, the second is captured
            step(torch.zeros(batch, 1, dtype=torch.long, device=device))
    ms = steps_ms(step, batch, device, 3, STEPS if device.type == "cuda" else 2)
    formats = [(s.key.format, s.value.format) for s in artifact.specs]
    return {
        "ms": ms,
        "cache_bytes": batch_nbytes(artifact.geometry, formats, [tokens] * batch),
        "resident_bytes": cache.nbytes,
    }


@torch.no_grad()
def eager_step_ms(model: Any, batch: int, tokens: int, steps: int = 8) -> float:
    """One step of transformers as it comes: DynamicCache, eager, sdpa."""
    config, device = model.config, model.device
    cache = DynamicCache(config=config)
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    for i in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype, device=device) for _ in range(2))
        cache.update(keys, values, i)
    del keys, values

    def step(ids: Tensor) -> Tensor:
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits

    return steps_ms(step, batch, device, 2, steps)


@torch.no_grad()
def static_step_ms(model: Any, batch: int, tokens: int, steps: int = 8) -> float:
    """One step of transformers' StaticCache under torch.compile(mode="reduce-overhead"), as
    `generate` compiles it."""
    config, device = model.config, model.device
    cache = StaticCache(config=config, max_cache_len=tokens + ROOM)
    cache.early_initialization(
        batch, config.num_key_value_heads, config.head_dim, model.dtype, device
    )
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, mode="reduce-overhead")

    def step(ids: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(input_ids=ids.clone(), past_key_values=cache, use_cache=True).logits.clone()

    try:
        return steps_ms(step, batch, device, 5, steps)
    finally:
        torch._dynamo.reset()


BASELINES: dict[str, Callable[..., float]] = {"eager": eager_step_ms, "static": static_step_ms}


def baseline_ms(model: Any, kind: str, batch: int, tokens: int) -> float | str:
    """Milliseconds of a step of a baseline, or why there is no figure."""
    try:
        return BASELINES[kind](model, batch, tokens)
    except torch.OutOfMemoryError:
        return "out of memory"
    except RuntimeError as error:  # the compiler's errors are of this class
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    finally:
        free_memory(model.device)


def chosen_baselines(text: str) -> list[str]:
    """Baselines of --baselines none|eager|all.

    Raises:
        KvfoldError: another word.
    """
    known = {"none": [], "eager": ["eager"], "all": ["eager", "static"]}
    if text not in known:
        raise KvfoldError(f"--baselines '{text}' is not one; choose from {', '.join(known)}.")
    return known[text]


def decode_rows(
    shape: str, batch: int, tokens: int, names: list[str], baselines: list[str], regions: tuple[int, int, int],
    device: torch.device, stream: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Times decoding steps, one row a format.

    Args:
        regions: sinks, window and page_tokens.
        stream: bytes a second of the best stream.
    Returns:
        format, shape, batch, tokens, ms, floor_ms (weights and packed cache, each read once at that
        rate), over_floor, the baselines' milliseconds and `ratio`, the better one's over ms (None
        without one).
    """
    model = build_model(shape, device)
    found = {kind: baseline_ms(model, kind, batch, tokens) for kind in baselines}
    times = [ms for ms in found.values() if isinstance(ms, float)]
    geometry = Geometry(model.config.num_key_value_heads, model.config.head_dim, *regions)
    rows = []
    for name in names:
        formats = layer_formats(name, geometry.head_dim, model.config.num_hidden_layers)
        artifact, triton = attach_formats(model, formats, geometry)
        row = packed_step_ms(model, artifact, batch, tokens, triton)
        free_memory(device)
        floor = (weights_nbytes(model) + row["cache_bytes"]) / stream * 1e3
        rows.append(
            {
                "format": name, "shape": shape, "batch": batch, "tokens": tokens, **row,
                "weights_bytes": weights_nbytes(model), "floor_ms": floor, "over_floor": row["ms"] / floor,
                "baselines_ms": found, "ratio": min(times) / row["ms"] if times else None,
            }
        )  # fmt: skip
    return rows
