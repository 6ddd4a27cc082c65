"""Building blocks: seeded orthogonal matrices and symmetric powers."""

import torch
from scipy.linalg import hadamard
from torch import Tensor

# of the mean eigenvalue, added before a root or an inverse is taken: rank-deficient heads stay
# invertible
EPS = 1e-3


def mixing_matrix(n: int, generator: torch.Generator) -> Tensor:
    """An orthogonal float64 [n, n] that spreads every channel over all: Hadamard with random signs,
    or, where n is not a power of two, the orthogonal factor of a Gaussian matrix."""
    if n & (n - 1) == 0:
        signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
        return torch.from_numpy(hadamard(n)).double() * signs / n**0.5
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def regularised(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues [..., n] with EPS of their mean added; never 0, even for a dead head."""
    clamped = eigenvalues.clamp_min(0)
    return clamped + (EPS * clamped.mean(-1, keepdim=True)).clamp_min(1e-12)


def symmetric_power(matrix: Tensor, power: float) -> Tensor:
    """matrix^power of positive semi-definite float64 [..., n, n], regularised."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return (vectors * regularised(values)[..., None, :] ** power) @ vectors.mT
