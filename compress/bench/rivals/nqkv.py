"""NQKV-like (2505.16210): blocks are roughly normal, so the grid is NormalFloat (QLoRA, 2305.14314)
under the largest magnitude."""

import torch
from scipy.stats import norm
from torch import Tensor

from kvfold.compress.bench.rivals.base import Rival
from kvfold.compress.bench.rivals.codecs import Grid, group_of


def normal_float(bits: int) -> Tensor:
    """NormalFloat's 2^bits points, float32, rising from −1 to 1 with an exact 0 (2305.14314).

    Quantiles of the normal between δ and 1 − δ, 2^(bits−1) above zero and one fewer below it.
    """
    half = 2 ** (bits - 1)
    edge = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    above = norm.ppf(torch.linspace(edge, 0.5, half + 1, dtype=torch.float64)[:-1].numpy())
    below = -norm.ppf(torch.linspace(edge, 0.5, half, dtype=torch.float64)[:-1].numpy())
    points = torch.tensor([*below, 0.0, *above[::-1]], dtype=torch.float64)
    return (points / points.abs().max()).float()


class NQKV(Rival):
    """Blocks are a token's head, its largest magnitude in float16. NQKV itself is a 4-bit scheme; 2
    and 3 bits extend it."""

    source = "NQKV-like (2505.16210): NormalFloat grid, absmax of a token's head in float16; no calibration"

    def __init__(self, bits: int, head_dim: int) -> None:
        super().__init__(bits, head_dim)
        self.key = self.value = Grid(normal_float(bits), group_of(head_dim), "absmax")

    def payload_bits(self, head_dim: int) -> float:
        return self.bits + 16 / group_of(head_dim)
