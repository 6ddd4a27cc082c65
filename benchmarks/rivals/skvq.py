"""SKVQ (2405.06219): channels reordered into like groups, a searched clip for each group, parameters in fp8."""

from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from kvfold.compress.calibrate import LayerStats

from .base import Rival
from .codecs import CLIPS, Affine, Codec, Stored, group_of


def cluster_order(sample: Tensor, group: int) -> Tensor:
    """The channels of all heads ordered so that each run of `group` is alike: k-means on (minimum, maximum) over tokens.

    Args:
        sample: float32 [Hkv, S, D].
    Returns:
        int64 [Hkv·D].
    """
    channels = sample.transpose(1, 2).flatten(0, 1)
    features = torch.stack((channels.amin(-1), channels.amax(-1)), -1).double().numpy()
    groups = len(features) // group
    if groups < 2:
        return torch.arange(len(features))
    labels = KMeans(groups, n_init=4, random_state=0).fit_predict(features)
    width = features[:, 1] - features[:, 0]
    key = [(float(width[labels == label].mean()), label, width[i]) for i, label in enumerate(labels)]
    return torch.tensor(sorted(range(len(features)), key=key.__getitem__))


@dataclass(frozen=True)
class Reordered:
    """A codec over all heads' channels in one row, in a given order."""

    inner: Codec
    order: Tensor
    num_kv_heads: int

    def encode(self, x: Tensor) -> Stored:
        return self.inner.encode(x.transpose(0, 1).flatten(1)[:, self.order.to(x.device)])

    def decode(self, stored: Stored) -> Tensor:
        x = self.inner.decode(stored)
        back = x[:, self.order.argsort().to(x.device)]
        return back.unflatten(1, (self.num_kv_heads, -1)).transpose(0, 1).contiguous()


class SKVQ(Rival):
    """Groups cross the heads of a layer, as in SKVQ; keys after RoPE; the clip of a group has the least squared error."""

    source = "SKVQ (2405.06219): reorder, clip search, e4m3 parameters; groups of a head's size, keys after RoPE"
    needs = "plain"

    def calibrate(self, stats: LayerStats) -> None:
        self.key = self._fit(stats.key_sample)
        self.value = self._fit(stats.value_sample)

    def _fit(self, sample: Tensor) -> Codec:
        num_kv_heads, _, head_dim = sample.shape
        group = group_of(head_dim)
        order = cluster_order(sample, group)
        rows = sample.transpose(0, 1).flatten(1)[:, order]
        errors = []
        for clip in CLIPS:
            tried = Affine(self.bits, group, clip=torch.full((len(order) // group,), clip))
            delta = tried.decode(tried.encode(rows)) - rows
            errors.append(delta.double().square().unflatten(-1, (-1, group)).sum((0, 2)))
        clip = torch.tensor(CLIPS)[torch.stack(errors).argmin(0)]
        return Reordered(Affine(self.bits, group, clip=clip), order, num_kv_heads)

    def payload_bits(self, head_dim: int) -> float:
        return self.bits + 16 / group_of(head_dim)
