"""Layers whose keys and values later layers read too: their keys' error is felt by the queries of all
of them, which come once those layers run.

So after calibration one more pass goes through the whole model, and E[q qᵀ] of such a layer becomes
the mean over its own queries and those of each layer that reads it. (What later queries attend to,
which tokens are weighed by, stays that of its own.)
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvfold.compress.models.attention_hook import tapped
from kvfold.compress.models.layerwise import LayerRunner
from kvfold.compress.models.rope import norm_weights, rotate_on, turns
from kvfold.compress.processes import Processes
from kvfold.compress.progress import progress
from kvfold.compress.work import keep, kept
from kvfold.exports.architectures import Architecture, heads_of, readers_of

if TYPE_CHECKING:
    from kvfold.compress.calibrate import LayerStats

NAME = "readers.safetensors"


def with_readers(
    stats: "list[LayerStats]",
    model: Any,
    arch: Architecture,
    sequences: list[Tensor],
    steps: list[int],
    skip: int,
    work: Path,
) -> "list[LayerStats]":
    """Statistics whose query moments are of all layers that read the keys; as they are where no layer
    reads another's.

    Args:
        stats: of each layer that has keys and values, as `calibrate` finds them; [] but in process 0.
        model, sequences, steps, work: as there.
        skip: first tokens of each sequence, which are left out.
    """
    processes = Processes.current()
    others = {i: found for i, found in enumerate(readers_of(model.config).values()) if found}
    if not others:
        return stats
    path = work / NAME
    found = processes.from_first(lambda: kept(path, load_file, {}))
    if not found:
        share = processes.share([ids.shape[1] for ids in sequences])
        passes = partial(_moments, model, arch, others, sequences, steps, skip)
        parts = progress(share.map(passes), "calibrate", "reading layers", total=len(sequences))
        for part in parts:
            found = {name: found.get(name, 0) + amount for name, amount in part.items()}
        if processes.first:
            keep(path, lambda scratch: save_file(found, scratch))
    if not processes.first:
        return stats
    tokens = sum(ids.shape[1] - min(skip, ids.shape[1] // 2) for ids in sequences)
    return [
        replace(
            layer,
            query_moment=(layer.query_moment + found[str(i)] / tokens) / (1 + len(others[i])),
        )
        if i in others
        else layer
        for i, layer in enumerate(stats)
    ]


def _moments(
    model: Any,
    arch: Architecture,
    others: dict[int, tuple[int, ...]],
    sequences: list[Tensor],
    steps: list[int],
    skip: int,
    index: int,
) -> dict[str, Tensor]:
    """Σ q qᵀ over one sequence's tokens, and over the layers that read one's keys: float64 [Hkv, D,
    D] by the number of the layer that has them; the mean over a group's query heads."""
    ids, sums = sequences[index], dict[str, Tensor]()
    runner = LayerRunner(model, arch, ids.to(next(model.parameters()).device))
    sources = {place: i for i, found in others.items() for place in found}
    hidden = runner.embedded
    for place, layer in enumerate(arch.decoder_layers(model)):
        if place not in sources:
            hidden = runner.run(place, hidden)
            continue
        source = sources[place]
        attention = layer.get_submodule(arch.attention)

        def tap(
            module: Any, query: Tensor, *rest: Any, source: int = source, **extras: Any
        ) -> None:
            tokens = query.shape[2]
            places = torch.arange(tokens, device=query.device)[None]
            near, far = (turns(model, arch, source, places * s) for s in (1, steps[index]))
            weight = norm_weights(module, arch)[0]
            spread = rotate_on(query, near, far, arch.rope_pairs, weight)
            q = spread[0, :, min(skip, tokens // 2) :].double()
            kv_heads = heads_of(model.config)[source][0]
            grouped = q.unflatten(0, (kv_heads, -1)).flatten(1, 2)
            moment = grouped.mT @ grouped / (q.shape[0] // kv_heads)
            name = str(source)
            sums[name] = sums[name] + moment if name in sums else moment

        with tapped(attention, tap):
            hidden = runner.run(place, hidden)
    return {name: x.cpu() for name, x in sums.items()}
