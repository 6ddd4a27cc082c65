"""Channel reordering (after SKVQ, 2405.06219): channels with like ranges share a group.

Channels are clustered by (minimum, maximum) over the calibration tokens with k-means, one cluster for each group, and laid
out cluster after cluster, so that contiguous groups of the quantiser hold like channels.
"""

import torch
from sklearn.cluster import KMeans
from torch import Tensor


def reorder(sample: Tensor, group_size: int, seed: int) -> Tensor:
    """Permutation matrices for one layer.

    Args:
        sample: float [Hkv, S, D] tokens.
        group_size: channels of a group; 0 for the whole head (then the order does not matter and stays).
    Returns:
        float64 [Hkv, D, D], rows of the identity.
    """
    head_dim = sample.shape[-1]
    eye = torch.eye(head_dim, dtype=torch.float64)
    groups = head_dim // (group_size or head_dim)
    if groups == 1:
        return eye.expand(sample.shape[0], -1, -1).clone()
    orders = []
    for head in sample.double():
        features = torch.stack((head.amin(0), head.amax(0)), -1).numpy()
        labels = KMeans(groups, n_init=4, random_state=seed).fit_predict(features)
        width = features[:, 1] - features[:, 0]
        key = [(float(width[labels == label].mean()), i) for i, label in enumerate(labels)]
        orders.append(eye[sorted(range(head_dim), key=key.__getitem__)])
    return torch.stack(orders)
