"""OSCAR-like (2605.17757): keys rotated into the queries' eigenbasis, values into their own, then
Hadamard and a clip."""

import torch
from torch import Tensor

from kvfold.compress.bench.rivals.base import Rival
from kvfold.compress.bench.rivals.codecs import (
    Affine,
    Codec,
    Rotated,
    group_of,
    hadamard,
    search_clip,
)
from kvfold.compress.calibrate import LayerStats


def rotation(moment: Tensor) -> Tensor:
    """H·Uᵀ for E[x xᵀ] = U Λ Uᵀ, orthogonal float64 [Hkv, D, D]."""
    return hadamard(moment.shape[-1]) @ torch.linalg.eigh(moment).eigenvectors.mT


class OSCAR(Rival):
    """The clip of each head has the least error of logits or of outputs on calibration tokens.

    OSCAR weights the values' second moment by attention scores and permutes by bit reversal; with
    one group a head the order means nothing, and the weights are left out here.
    """

    source = "OSCAR-like (2605.17757): U_q·H and U_v·H rotations, clip search, e4m3 parameters; values unweighted"
    needs = "plain"

    def calibrate(self, stats: LayerStats) -> None:
        values = stats.value_cov + stats.value_mean[:, :, None] * stats.value_mean[:, None, :]
        self.key = self._fit(stats.key_sample, rotation(stats.query_moment), stats.query_moment)
        self.value = self._fit(stats.value_sample, rotation(values), stats.output_metric)

    def _fit(self, sample: Tensor, matrix: Tensor, metric: Tensor) -> Codec:
        def codec(clip: Tensor) -> Codec:
            return Rotated(Affine(self.bits, group_of(self.head_dim), clip=clip), matrix)

        return codec(search_clip(sample, codec, metric))

    def payload_bits(self, head_dim: int) -> float:
        return self.bits + 16 / group_of(head_dim)
