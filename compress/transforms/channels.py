"""Values that stay in their own channels, in another order and each with a scale of its own: what
can be folded where a gate multiplies each channel between attention and o_proj.

A channel's error is felt by the diagonal of the output metric, and its variance is that of Σ_v, in
which a token counts as much as later queries attend to it. λ_i = G_ii·Σ_ii, falling, is the order,
so that classes of more bits take the channels that matter most. Each channel is divided by its
standard deviation, since one scale a token serves all of them.
"""

import torch
from torch import Tensor

from kvfold.compress.calibrate import LayerStats

FLOOR = 1e-6  # least variance of a channel, as a part of its head's largest
DEAD = 1e-20  # a head of less variance is left unscaled


def channel_variances(moment: Tensor, stats: LayerStats) -> tuple[Tensor, Tensor]:
    """λ of each channel, float64 [Hkv, D], falling, and the channel that has it, int64 [Hkv, D].

    Args:
        moment: Σ_v, float64 [Hkv, D, D].
    """
    felt = moment.diagonal(dim1=1, dim2=2) * stats.output_metric.diagonal(dim1=1, dim2=2)
    found = felt.clamp_min(0).sort(dim=-1, descending=True, stable=True)
    return found.values, found.indices


def ordered(moment: Tensor, stats: LayerStats) -> Tensor:
    """The basis, float64 [Hkv, D, D]: in each row one channel, divided by its standard deviation."""
    variance = moment.diagonal(dim1=1, dim2=2)
    top = variance.amax(-1, keepdim=True)
    variance = torch.where(
        top > DEAD, torch.maximum(variance, FLOOR * top), torch.ones_like(variance)
    )
    _, order = channel_variances(moment, stats)
    scales = (1 / variance.sqrt()).gather(-1, order)
    return torch.zeros_like(moment).scatter(-1, order[..., None], scales[..., None])
