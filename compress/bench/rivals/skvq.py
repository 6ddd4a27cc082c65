"""SKVQ (2405.06219): channels reordered into like groups, a searched clip for each group,
parameters in fp8."""

from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from kvfold.compress.bench.rivals.base import Rival
from kvfold.compress.bench.rivals.codecs import CLIPS, Codec, Stored, group_of, pack, store, unpack
from kvfold.compress.calibrate import LayerStats


def cluster(sample: Tensor, group: int) -> list[Tensor]:
    """The channels of all heads in groups of like ones: k-means on (minimum, maximum) over tokens,
    as many groups as there are runs of `group` channels. A cluster of any size is a group, so a few
    outliers may have one to themselves.

    Args:
        sample: float32 [Hkv, S, D].
    Returns:
        int64 channels of each group, all Hkv·D in all.
    """
    channels = sample.transpose(1, 2).flatten(0, 1)
    features = torch.stack((channels.amin(-1), channels.amax(-1)), -1).double().numpy()
    groups = len(features) // group
    if groups < 2:
        return [torch.arange(len(features))]
    labels = torch.from_numpy(KMeans(groups, n_init=4, random_state=0).fit_predict(features))
    return [found for label in range(groups) if len(found := (labels == label).nonzero().flatten())]


@dataclass(frozen=True)
class Reordered:
    """Asymmetric round-to-nearest in groups of channels that cross heads: x̂ = m + s·c with m =
    clip·min and s = clip·(max − min)/(2^bits − 1), both e4m3.

    Attributes:
        groups: channels of each group, of all heads in one row.
        clip: float32 [groups].
    """

    bits: int
    groups: list[Tensor]
    clip: Tensor
    num_kv_heads: int

    def _label(self, device: torch.device) -> Tensor:
        """The group of every channel."""
        label = torch.empty(sum(map(len, self.groups)), dtype=torch.long)
        for number, channels in enumerate(self.groups):
            label[channels] = number
        return label.to(device)

    def encode(self, x: Tensor) -> Stored:
        rows = x.transpose(0, 1).flatten(1)
        parts = [rows[:, channels.to(x.device)] for channels in self.groups]
        clip = self.clip.to(x.device)
        low = torch.stack([part.amin(-1) for part in parts], -1) * clip
        high = torch.stack([part.amax(-1) for part in parts], -1) * clip
        pair = store(torch.stack((low, (high - low) / (2**self.bits - 1)), -1), "e4m3")
        minimum, scale = pair.float()[:, self._label(x.device)].unbind(-1)
        codes = ((rows - minimum) / scale.clamp_min(1e-30)).round().clamp(0, 2**self.bits - 1)
        return pack(codes.to(torch.uint8), self.bits), pair

    def decode(self, stored: Stored) -> Tensor:
        minimum, scale = stored[1].float()[:, self._label(stored[1].device)].unbind(-1)
        x = minimum + scale * unpack(stored[0], self.bits).float()
        return x.unflatten(1, (self.num_kv_heads, -1)).transpose(0, 1).contiguous()


class SKVQ(Rival):
    """Groups cross the heads of a layer, as in SKVQ; keys after RoPE; the clip of a group has the
    least squared error."""

    source = (
        "SKVQ (2405.06219): reorder, clip search, e4m3 parameters; as many groups as heads hold runs of 128, "
        "keys after RoPE"
    )
    needs = "plain"

    def calibrate(self, stats: LayerStats) -> None:
        self.key = self._fit(stats.key_sample)
        self.value = self._fit(stats.value_sample)

    def _fit(self, sample: Tensor) -> Codec:
        num_kv_heads, _, head_dim = sample.shape
        groups = cluster(sample, group_of(head_dim))
        errors = []
        for clip in CLIPS:
            tried = Reordered(self.bits, groups, torch.full((len(groups),), clip), num_kv_heads)
            squares = (
                (tried.decode(tried.encode(sample)) - sample).double().square().sum(1).flatten()
            )
            errors.append(torch.stack([squares[channels].sum() for channels in groups]))
        return Reordered(
            self.bits, groups, torch.tensor(CLIPS)[torch.stack(errors).argmin(0)], num_kv_heads
        )

    def payload_bits(self, head_dim: int) -> float:
        return self.bits + 16 / group_of(head_dim)
