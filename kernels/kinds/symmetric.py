"""Codes that are symmetric about zero, with one scale a token for the whole head.

x̂_i = τ·step(L_i)·(c_i − (L_i − 1)/2), c in 0 … L−1, with τ = rms over the stored channels. The
caller brings channels to unit variance, so step(L) is the Gaussian optimum and no zero point is
needed.
"""

from functools import partial

import torch
from torch import Tensor

from kvfold.kernels.kinds.interface import CodeKind, Layout
from kvfold.kernels.kinds.levels import GAUSSIAN_STEP
from kvfold.kernels.kinds.params import TINY, store_param


class Symmetric(CodeKind):
    """See this module."""

    name = "scale"

    def label(self, fmt: Layout) -> str:
        """As in `CodeKind`."""
        return f" {fmt.param_dtype}"

    def step(self, levels: int) -> float:
        """As in `CodeKind`; 1 for channels that are not stored."""
        return GAUSSIAN_STEP.get(levels, 1.0)

    def middle(self, levels: int) -> float:
        """As in `CodeKind`."""
        return max(0, levels - 1) / 2

    def encode(self, x: Tensor, fmt: Layout, clip: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As in `CodeKind`."""
        as_float = partial(torch.tensor, dtype=torch.float32, device=x.device)
        levels = as_float([n for channels, n in fmt.classes for _ in range(channels)])
        steps = as_float([self.step(n) for channels, n in fmt.classes for _ in range(channels)])
        coded = levels > 0
        tau = x[..., coded].square().mean(-1, keepdim=True).sqrt()
        params, tau = store_param(tau, fmt.param_dtype)
        u = x / (tau.clamp_min(TINY) * steps) + levels / 2
        return torch.minimum(u.floor().clamp_min(0), (levels - 1).clamp_min(0)).to(
            torch.uint8
        ), params


SYMMETRIC = Symmetric()
