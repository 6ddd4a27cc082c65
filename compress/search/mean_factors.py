"""How much of the rotating mean is taken off each head's keys.

Keys before RoPE scatter around a large mean b, and taking R(t)·b off leaves the least variance. But
tokens whose keys are unlike the others, to which later queries often attend most, then lie far out,
in channels that have few bits because they vary little: their error is as large as b. Taking off
f·R(t)·b with f < 1 keeps bits in the directions of b. Which f is best differs by layer and head,
and no moment of the keys tells: each is measured as fisher.py does, with a format of about the
budget's bits. Nothing of it is seen when an artifact is read, since f·b is stored as the mean.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from kvfold.compress.calibrate import LayerStats
from kvfold.compress.recipe import Recipe
from kvfold.compress.search.candidates import KeyCandidate
from kvfold.compress.search.fisher import head_losses
from kvfold.compress.search.sensitivity import Probe
from kvfold.compress.transforms.whiten import turning
from kvfold.exports.account import Geometry


def turning_layers(recipe: Recipe, stats: Sequence[LayerStats]) -> list[int]:
    """The layers whose keys have a rotating mean taken off."""
    if recipe.key.transform != "whiten":
        return []
    return [i for i, layer in enumerate(stats) if turning(layer, recipe.key.without)]


def choose_factors(
    probe: Probe,
    candidates: list[list[KeyCandidate]],
    layers: Sequence[int],
    factors: Sequence[float],
    geometry: Geometry,
    count: int,
    seed: int,
    work: Path,
) -> dict[int, torch.Tensor]:
    """The factor of each KV head with the least loss.

    Args:
        candidates: of every layer, one for each factor, all of as many bits.
        layers: those that have a choice.
        factors: parts of the mean that may be taken off.
        geometry, count, seed: as in fisher.fisher_losses.
        work: folder for mean_factors.json, from which an interrupted run goes on.
    Returns:
        float64 [Hkv] for each of `layers`.
    """
    jobs = [("key", layer, c) for layer in layers for c in range(len(factors))]
    path = work / "mean_factors.json"
    found = head_losses(
        probe, jobs, candidates, [], geometry, count, seed, path, "share of the mean"
    )
    offered = torch.tensor(factors, dtype=torch.float64)
    return {
        layer: offered[
            torch.tensor([found["key", layer, c] for c in range(len(factors))]).argmin(0)
        ]
        for layer in layers
    }
