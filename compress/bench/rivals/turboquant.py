"""TurboQuant-like (2504.19874): a random rotation makes channels nearly Gaussian, then the
Lloyd-Max grid of a Gaussian."""

import itertools
from functools import cache
from math import erf, exp, pi, sqrt

import torch
from torch import Tensor

from kvfold.compress.bench.rivals.base import Rival
from kvfold.compress.bench.rivals.codecs import Grid, Rotated, group_of


@cache
def lloyd_max(bits: int) -> Tensor:
    """The 2^bits points with the least squared error for a standard Gaussian, float32, rising (S.
    P. Lloyd, 1957; J. Max, 1960).

    Each point is the mean of its cell, each border halfway between two points: iterated until
    nothing moves.
    """
    count = 2**bits
    points = [4 * (i + 0.5) / count - 2 for i in range(count)]
    for _ in range(5000):
        borders = [-40.0, *((a + b) / 2 for a, b in itertools.pairwise(points)), 40.0]
        density = [exp(-b * b / 2) / sqrt(2 * pi) for b in borders]
        below = [erf(b / sqrt(2)) / 2 for b in borders]
        points = [(density[i] - density[i + 1]) / (below[i + 1] - below[i]) for i in range(count)]
    return torch.tensor(points)


class TurboQuant(Rival):
    """Its MSE variant: Hadamard with random signs, the root mean square of a token's head in
    float16."""

    source = "TurboQuant-like (2504.19874), MSE variant: Hadamard, Lloyd-Max grid, float16 norm; no calibration"

    def __init__(self, bits: int, head_dim: int) -> None:
        super().__init__(bits, head_dim)
        self.key = self.value = Rotated(Grid(lloyd_max(bits), group_of(head_dim), "rms"))

    def payload_bits(self, head_dim: int) -> float:
        return self.bits + 16 / group_of(head_dim)
