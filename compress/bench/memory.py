"""`kvfold bench memory`: the largest batch that runs in a card's memory, and one very long
sequence."""

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from kvfold.compress.bench.decode import BASELINES, ROOM, packed_step_ms
from kvfold.compress.bench.model import (
    attach_formats,
    build_model,
    free_memory,
    layer_formats,
    weights_nbytes,
)
from kvfold.exports.account import Geometry, batch_nbytes

MARGIN = 1 << 30  # bytes left free for a step's own tensors when the largest batch is chosen


def room_bytes(device: torch.device, limit: int) -> int:
    """Free bytes on the device; `limit`, if given, on top of what is in use."""
    free_memory(device)
    if device.type != "cuda":
        return limit or 1 << 28
    free = torch.cuda.mem_get_info(device)[0]
    return min(free, limit) if limit else free


def largest_batch(
    room: int, sequence: int, run: Callable[[int], Any], device: torch.device
) -> tuple[int, Any]:
    """The largest batch that a step really ran with, from the one that `room` bytes would hold
    downwards.

    Args:
        sequence: bytes of one sequence.
        run: takes a batch; raises torch.OutOfMemoryError where it does not fit.
    Returns:
        (batch, what `run` returned); (0, None) if not even one sequence fits.
    """
    batch = max(0, room - MARGIN if device.type == "cuda" else room) // sequence
    while batch >= 1:
        with suppress(torch.OutOfMemoryError):
            return batch, run(batch)
        free_memory(device)
        batch -= max(1, math.ceil(batch / 50))
    return 0, None


def memory_rows(
    shape: str, tokens: int, names: list[str], baselines: list[str], regions: tuple[int, int, int],
    device: torch.device, limit: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """The largest batch of `tokens` tokens in 16-bit caches and in packed ones, and its tokens a
    second.

    The 16-bit caches are transformers' (`baselines`) and, as format "16", this runtime's own.

    Args:
        limit: bytes that a cache may take; 0: what the device has.
    Returns:
        cache, shape, tokens, batch (0, and no ms, where not even one sequence fits), ms,
        tokens_per_s, and for packed caches `ratio` to the best 16-bit row.
    """
    model = build_model(shape, device)
    config = model.config
    geometry = Geometry(config.num_key_value_heads, config.head_dim, *regions)
    plain = model.dtype.itemsize * geometry.elements(tokens + ROOM, config.num_hidden_layers)
    rows: list[dict[str, Any]] = []

    def add(name: str, batch: int, ms: float | None) -> None:
        rate = batch / ms * 1e3 if ms else 0.0
        rows.append(
            {
                "cache": name,
                "shape": shape,
                "tokens": tokens,
                "batch": batch,
                "ms": ms,
                "tokens_per_s": rate,
            }
        )

    for kind in baselines:
        more = (
            plain // config.num_hidden_layers if kind == "eager" else 0
        )  # a layer is copied while it grows
        run: Callable[[int], Any] = partial(BASELINES[kind], model, tokens=tokens)
        add(kind, *largest_batch(room_bytes(device, limit), plain + more, run, device))
    for name in ["16", *names]:
        formats = layer_formats(name, config.head_dim, config.num_hidden_layers)
        artifact, triton = attach_formats(model, formats, geometry)
        sequence = batch_nbytes(geometry, formats, [tokens + ROOM])
        run = partial(packed_step_ms, model, artifact, tokens=tokens, triton=triton)
        batch, row = largest_batch(room_bytes(device, limit), sequence, run, device)
        add(name, batch, row["ms"] if row else None)
    best = max(row["tokens_per_s"] for row in rows[: len(baselines) + 1])
    for row in rows[len(baselines) + 1 :]:
        row["ratio"] = row["tokens_per_s"] / best if best else None
    return rows


def long_row(
    shape: str, tokens: int, name: str, regions: tuple[int, int, int], device: torch.device
) -> dict[str, Any]:
    """One very long sequence: its cache resident and decoding steps running.

    Returns:
        format, shape, tokens, ms, cache_bytes, resident_bytes, weights_bytes and peak_bytes (None
        on a CPU).
    """
    free_memory(device)
    model = build_model(shape, device)
    free_memory(device)
    geometry = Geometry(model.config.num_key_value_heads, model.config.head_dim, *regions)
    formats = layer_formats(name, geometry.head_dim, model.config.num_hidden_layers)
    artifact, triton = attach_formats(model, formats, geometry)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    row = packed_step_ms(model, artifact, 1, tokens, triton)
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return {
        "format": name, "shape": shape, "batch": 1, "tokens": tokens, **row,
        "weights_bytes": weights_nbytes(model), "peak_bytes": peak,
    }  # fmt: skip
