"""PM-KVQ's smoothing (2505.18610) at one uniform width: a scale shared by each RoPE pair, its
exponent from a grid."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.compress.bench.rivals.base import Rival
from kvfold.compress.bench.rivals.codecs import Affine, Codec, Stored, group_of
from kvfold.compress.calibrate import LayerStats
from kvfold.compress.transforms.smooth import GRID, pair_scale


@dataclass(frozen=True)
class Smoothed:
    """A codec of x / scale; scale float32 [Hkv, 1, D], fused into the query and key projections."""

    inner: Codec
    scale: Tensor

    def encode(self, x: Tensor) -> Stored:
        return self.inner.encode(x / self.scale.to(x.device))

    def decode(self, stored: Stored) -> Tensor:
        x = self.inner.decode(stored)
        return x * self.scale.to(x.device)


class PMKVQ(Rival):
    """Without its mixed widths and progressive lowering: what uniform storage with its smoothing
    gives.

    The exponent has the least error of the logits on calibration keys (PM-KVQ: of the attention's
    output).
    """

    source = "PM-KVQ (2505.18610): smoothing over interpolated positions, uniform width; exponent by logit error"
    needs = "spread"

    def calibrate(self, stats: LayerStats) -> None:
        plain = Affine(self.bits, group_of(self.head_dim))
        best: Codec = plain
        least = torch.inf
        for step in range(GRID):
            codec = Smoothed(plain, pair_scale(stats, step / (GRID - 1)).float()[:, None])
            delta = (codec.decode(codec.encode(stats.key_sample)) - stats.key_sample).double()
            error = float(torch.einsum("hti,hij,htj->", delta, stats.query_moment, delta))
            if error < least:
                best, least = codec, error
        self.key, self.value = best, plain

    def payload_bits(self, head_dim: int) -> float:
        return self.bits + 16 / group_of(head_dim)
