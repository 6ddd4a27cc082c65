"""KVarN-like (2606.03458): Hadamard, then a tile's tokens and channels brought to unit variance in
turn, then round to nearest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.compress.bench.rivals.base import Rival
from kvfold.compress.bench.rivals.codecs import Affine, Codec, Rotated, Stored, group_of, store

TILE = 128  # tokens
STEPS = 16
# Factor on a normalised tile's range, for it is nearly Gaussian: the least squared error in steps
# of 0.05, groups of 64 and 128
CUT = {2: 0.65, 3: 0.85, 4: 0.95}


def sinkhorn(x: Tensor, steps: int = STEPS) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., T, D] = tokens · y · channels with rows and columns of y of standard deviation 1, by
    dividing in turn.

    Returns:
        y [..., T, D], tokens [..., T, 1], channels [..., 1, D].
    """
    tokens, channels = torch.ones_like(x[..., :1]), torch.ones_like(x[..., :1, :])
    for _ in range(steps):
        for axis in (-2, -1):
            size = x.std(axis, correction=0, keepdim=True)
            size = torch.where(
                size > 1e-6 * x.abs().amax((-2, -1), keepdim=True), size, 1.0
            )  # constant: left alone
            x = x / size
            if axis == -2:
                channels = channels * size
            else:
                tokens = tokens * size
    return x, tokens, channels


@dataclass(frozen=True)
class Normalised:
    """A codec of the normalised tile. `along` names the axis that the codec's own scales run along:
    those absorb the factors of that axis, and the factors of the other one are stored in e4m3."""

    inner: Affine
    along: str

    def encode(self, x: Tensor) -> Stored:
        tiles = x.unflatten(-2, (-1, TILE))
        _, tokens, channels = sinkhorn(tiles)
        keys = (
            self.along == "channels"
        )  # one (minimum, scale) a channel takes up the channel's factor
        kept = tokens if keys else channels
        # tokens · c and channels / c are the same tile: about 1, what is kept neither saturates nor
        # vanishes in e4m3
        kept = store(kept / kept.log().mean((-2, -1), keepdim=True).exp(), "e4m3")
        # divided by what is kept, not by what was rounded: else the rounding would scale the whole
        # number, offset and all
        factor = torch.where(kept.float() > 0, kept.float(), 1.0)
        rest = tiles / factor
        return *self.inner.encode(rest.mT if keys else rest), kept

    def decode(self, stored: Stored) -> Tensor:
        *coded, kept = stored
        y = self.inner.decode(tuple(coded))
        return ((y.mT if self.along == "channels" else y) * kept.float()).flatten(-3, -2)


class KVarN(Rival):
    """Keys per channel, values per token, in tiles of 128 tokens. A key channel's minimum and scale
    are float16, as its offset can dwarf its range; all else is e4m3. K: b + 32/128 + 8/D bits, V: b
    + 16/D + 8/128. Tuned: KVarN spans the whole range, which at 2 bits wastes half of the levels on
    a Gaussian's ends; a constant factor on the range needs no calibration.
    """

    source = (
        "KVarN-like (2606.03458): Hadamard, 16 Sinkhorn steps on 128-token tiles, K per channel, V per token; "
        "range cut to suit a Gaussian"
    )
    block_tokens = TILE

    def __init__(self, bits: int, head_dim: int) -> None:
        super().__init__(bits, head_dim)
        self.key: Codec = Rotated(Normalised(Affine(bits, TILE, "fp16", cut=CUT[bits]), "channels"))
        self.value: Codec = Rotated(
            Normalised(Affine(bits, group_of(head_dim), cut=CUT[bits]), "tokens")
        )

    def payload_bits(self, head_dim: int) -> float:
        key = 32 / TILE + 8 / head_dim
        value = 16 / group_of(head_dim) + 8 / TILE
        return self.bits + (key + value) / 2
