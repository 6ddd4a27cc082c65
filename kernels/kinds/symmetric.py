"""Codes that are symmetric about zero, with one scale a token for the whole head.

x̂_i = τ·step(L_i)·(c_i − (L_i − 1)/2), c in 0 … L−1, the nearest. The caller brings channels to unit
variance, so step(L) is the Gaussian optimum and no zero point is needed.

Of FACTORS times the root mean square over the stored channels, τ is the one with the least

    Σ w_i·d_i² + ALONG·(Σ w_i·d_i·x_i)² / Σ w_i·x_i²,  d = x − x̂, w_i = 1/error(L_i).

So tokens that are no Gaussians, of which a few channels are large, are not cut off. Classes weigh
alike: where water-filling spends more levels, an error costs more. The second term is the part of
the error that lies along x. Coarse codes shrink what they code, and while the rest of many tokens'
errors averages out in attention, that part adds up. In the search for τ sums are of integers, so
that they don't depend on their order.
"""

import torch
from torch import Tensor

from kvfold.kernels.kinds.interface import CodeKind, Layout, levels_of
from kvfold.kernels.kinds.levels import GAUSSIAN_STEP
from kvfold.kernels.kinds.params import TINY, store_param

FACTORS = (1.0, 0.8, 0.9, 1.1, 1.25, 1.5, 1.8, 2.2)  # of equally good ones the first is taken
ALONG = 4.0
UNITS = 16.0  # in the sums, of one squared root mean square of weight 1
MOST_UNITS = float((1 << 22) - 1)  # of a channel, so that 512 of them fit an int32
# that a core searches at a time: enough that an operation's own cost is little, and what its caches
# hold
BLOCK_ELEMENTS = 1 << 16


def _units(x: Tensor, numbers: bool) -> Tensor:
    """float32 [n, 1], the sum over channels of x, each cut off at ±MOST_UNITS and rounded to a
    whole number. NaN counts as one of the ends; `numbers`: there is none."""
    if not numbers:
        x = torch.where(x > -MOST_UNITS, x, -MOST_UNITS)
    cut = x.clamp(-MOST_UNITS, MOST_UNITS).round_()
    return cut.to(torch.int32).sum(-1, keepdim=True).float()


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

    def weight(self, levels: int) -> float:
        """UNITS·w of a channel; 0 where it is not stored."""
        return UNITS / self.error(levels) if levels else 0.0

    def encode(self, x: Tensor, fmt: Layout, clip: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As in `CodeKind`."""
        table = torch.tensor(
            [(levels, self.step(levels), self.weight(levels)) for levels in levels_of(fmt)],
            dtype=torch.float32,
            device=x.device,
        )
        levels, steps, weights = table.unbind(-1)
        root = x[..., levels > 0].square().mean(-1, keepdim=True).sqrt()
        _, root = store_param(root, fmt.param_dtype)
        rows, roots = x.flatten(0, -2), root.flatten(0, -2)
        elements = BLOCK_ELEMENTS * torch.get_num_threads()
        size = max(1, elements // x.shape[-1] if x.device.type == "cpu" else len(rows))
        found = [
            _search(*block, levels, steps, weights, fmt.param_dtype)
            for block in zip(rows.split(size), roots.split(size), strict=True)
        ]
        codes, params = (torch.cat(parts) for parts in zip(*found, strict=True))
        return codes.view(x.shape), params.view(*x.shape[:-1], params.shape[-1])


def _search(
    x: Tensor, root: Tensor, levels: Tensor, steps: Tensor, weights: Tensor, param_dtype: str
) -> tuple[Tensor, Tensor]:
    """The best of FACTORS for each token.

    Args:
        x: float32 [n, head_dim].
        root: float32 [n, 1], root mean squares as stored.
        levels, steps, weights: float32 [head_dim].
    Returns:
        (codes uint8 [n, head_dim], bytes of the scales [n, 1 or 2])
    """
    # divisions are many times dearer than products, so all is in units of the root
    inverse = 1 / root.clamp_min(TINY)
    v = x * inverse
    in_steps = v * (1 / steps)
    numbers = x.device.type == "cpu" and bool(v.isfinite().all())
    size = _units(v * weights * v, numbers).clamp_min(1)
    top, middle = (levels - 1).clamp_min(0), (levels - 1) / 2
    found: tuple[Tensor, Tensor, Tensor] | None = None  # cost, scale, its bytes
    for factor in FACTORS:
        stored, scale = store_param(root * factor, param_dtype)
        ratio = scale * inverse
        tried = in_steps * (1 / ratio.clamp_min(TINY))
        tried = torch.minimum(tried.add_(middle).clamp_min_(0), top).round_()
        n = v - tried.sub_(middle).mul_(ratio * steps)
        weighted = n * weights
        along = _units(weighted * v, numbers)
        cost = _units(weighted.mul_(n), numbers) + ALONG * (along * (along / size))
        if found is None:
            found = cost, scale, stored
            continue
        best, scales, params = found
        better = cost < best
        found = (
            torch.where(better, cost, best),
            torch.where(better, scale, scales),
            torch.where(better, stored, params),
        )
    assert found is not None
    u = x / (found[1].clamp_min(TINY) * steps)
    codes = torch.minimum(u.add_(levels / 2).floor_().clamp_min_(0), top)
    return codes.to(torch.uint8), found[2]


SYMMETRIC = Symmetric()
