"""How much of the rotating mean is taken off each head's keys.

Keys before RoPE scatter around a large mean b, and taking R(t)·b off leaves the least variance. But
tokens whose keys are unlike the others, to which later queries often attend most, then lie far out,
in channels that have few bits because they vary little: their error is as large as b. Taking off
f·R(t)·b with f < 1 keeps bits in the directions of b. Which f is best differs by layer and head,
and no moment of the keys tells: each is measured as fisher.py does, with a format of about the
budget's bits. Nothing of it is seen when an artifact is read, since f·b is stored as the mean.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.compress.calibrate import LayerStats
from kvfold.compress.recipe import Recipe
from kvfold.compress.search.candidates import KeyCandidate
from kvfold.compress.search.fisher import Losses
from kvfold.compress.transforms.whiten import turning


def takes_mean(recipe: Recipe, stats: LayerStats) -> bool:
    """Whether a rotating mean is taken off a layer's keys."""
    return recipe.key.transform == "whiten" and turning(stats, recipe.key.without)


def choose_factors(
    losses: Losses, layer: int, candidates: Sequence[KeyCandidate], factors: Sequence[float]
) -> Tensor:
    """The factor of each KV head with the least loss.

    Args:
        losses: that are found so far.
        candidates: one for each factor, all of as many bits.
        factors: parts of the mean that may be taken off.
    Returns:
        float64 [Hkv].
    """
    named = {f"mean.{i}": {"key_spec": x.spec} for i, x in enumerate(candidates)}
    found = losses.of(layer, named)
    offered = torch.tensor(factors, dtype=torch.float64)
    return offered[torch.tensor([found[name] for name in named]).argmin(0)]
