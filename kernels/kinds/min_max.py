"""Codes between a token's minimum and maximum, over all channels or a group of them.

x̂_i = m + s·c_i, c in 0 … L−1, with m = clip·min, s = clip·(max − min)/(L − 1) over the token's
group (asymmetric per-token codes as KIVI's, 2402.02750, stores values; the clip is SKVQ's,
2405.06219), both rounded to their stored type before coding.
"""

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.kernels.kinds.interface import CodeKind, Layout
from kvfold.kernels.kinds.params import TINY, store_param


class MinMax(CodeKind):
    """See this module."""

    name = "scale_min"
    minimum = True
    grouped = True

    def check(self, classes: tuple[tuple[int, int], ...]) -> None:
        """As in `CodeKind`."""
        super().check(classes)
        if len(classes) != 1 or classes[0][1] == 0:
            raise KvfoldError(
                "A format with params 'scale_min' has exactly one class of 2 to 256 levels."
            )

    def label(self, fmt: Layout) -> str:
        """As in `CodeKind`."""
        group = f" g{fmt.group_size}" if fmt.group_size else ""
        return f" asym{group} {fmt.param_dtype}"

    def encode(self, x: Tensor, fmt: Layout, clip: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As in `CodeKind`."""
        top = fmt.classes[0][1] - 1
        grouped = x.unflatten(-1, (fmt.num_groups, -1))  # [..., T, G, group]
        low, high = grouped.amin(-1), grouped.amax(-1)
        if clip is not None:
            low, high = low * clip, high * clip
        pair = torch.stack((low, (high - low) / torch.full_like(high, top)), -1)  # [..., T, G, 2]
        params, pair = store_param(pair.flatten(-2), fmt.param_dtype)
        minimum, scale = pair.unflatten(-1, (fmt.num_groups, 2)).unbind(-1)
        u = (grouped - minimum[..., None]) / scale.clamp_min(TINY)[..., None]
        return u.round().clamp(0, top).flatten(-2).to(torch.uint8), params

    def decode(self, codes: Tensor, params: Tensor, fmt: Layout) -> Tensor:
        """As in `CodeKind`."""
        minimum, scale = params.unflatten(-1, (fmt.num_groups, 2)).unbind(-1)
        grouped = codes.float().unflatten(-1, (fmt.num_groups, -1))
        return grouped.mul_(scale[..., None]).add_(minimum[..., None]).flatten(-2)


MIN_MAX = MinMax()
