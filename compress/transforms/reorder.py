"""Channel reordering (after SKVQ, 2405.06219): channels with like ranges share a group.

Channels are clustered by their (minimum, maximum) over the calibration tokens with k-means, one
cluster for each group, and laid out cluster after cluster. SKVQ lets clusters of any size span all
heads; here a group is a contiguous run of `group_size` channels of one head, so a cluster that is
larger runs on into the next group.
"""

import warnings

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from kvfold.compress.calibrate import LayerStats
from kvfold.compress.transforms.interface import Basis, Request, Transform
from kvfold.compress.transforms.rotate import unit_scale


def reorder(ranges: Tensor, group_size: int, seed: int) -> Tensor:
    """Permutation matrices for one layer.

    Args:
        ranges: float64 [Hkv, 2, D], minimum and maximum of each channel.
        group_size: channels of a group; 0 for the whole head (then the order does not matter and
            stays).
    Returns:
        float64 [Hkv, D, D], rows of the identity.
    """
    head_dim = ranges.shape[-1]
    eye = torch.eye(head_dim, dtype=torch.float64)
    groups = head_dim // (group_size or head_dim)
    if groups == 1:
        return eye.expand(ranges.shape[0], -1, -1).clone()
    orders = []
    for low, high in ranges:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # dead channels: fewer ranges than groups is fine
            labels = KMeans(groups, n_init=10, random_state=seed).fit_predict(
                torch.stack((low, high), -1).numpy()
            )
        width = high - low
        key = [(float(width[labels == label].mean()), i) for i, label in enumerate(labels)]
        orders.append(eye[sorted(range(head_dim), key=key.__getitem__)])
    return torch.stack(orders)


def _keys(stats: LayerStats, request: Request) -> Basis:
    return Basis(online=reorder(stats.key_range, request.group_size, request.seed))


def _values(stats: LayerStats, request: Request) -> Basis:
    return Basis(
        fused=unit_scale(stats, request.normed)
        @ reorder(stats.value_range, request.group_size, request.seed)
    )


KEYS = Transform("reorder", _keys)
VALUES = Transform("reorder", _values)
