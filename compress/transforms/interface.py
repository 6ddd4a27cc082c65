"""What a transform is: statistics of one layer in, a basis out.

A basis B stores x as z = online·(fused·x − m), m the offset or, with frequencies, the offset turned
to x's position. The fused part goes into the weights, the online part and the offset are applied
when a token arrives, and whoever reads z takes the inverse: o_proj for values, the query for keys.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.compress.calibrate import LayerStats
from kvfold.kernels.formats import Format
from kvfold.kernels.key_mean import RopePairs


@dataclass(frozen=True)
class Basis:
    """What a transform yields for one layer; an absent part does nothing.

    Attributes:
        fused: float64 [Hkv, D, D], folded into the weights. Of keys only a diagonal that is equal
            inside each RoPE pair, because rotation commutes with nothing else; of values any
            invertible matrix, or what Request.gated allows.
        online: float64 [Hkv, D, D], invertible, applied to new keys; values have none.
        offset: float64 [Hkv, D], subtracted from new keys; values have none.
        frequencies: float32 [n/2], ω of RoPE where the offset is a mean before it
            (kernels/key_mean.py).
    """

    fused: Tensor | None = None
    online: Tensor | None = None
    offset: Tensor | None = None
    frequencies: Tensor | None = None

    @property
    def matrix(self) -> Tensor | None:
        """online · fused, float64 [Hkv, D, D]; None for the identity."""
        if self.fused is None or self.online is None:
            return self.fused if self.online is None else self.online
        return self.online @ self.fused

    @property
    def inverse(self) -> Tensor | None:
        """What undoes `matrix`, float64 [Hkv, D, D]."""
        return None if self.matrix is None else torch.linalg.inv(self.matrix)


@dataclass(frozen=True)
class Request:
    """What a basis may depend on besides the statistics.

    Attributes:
        fmt: the format it is for; None where one basis serves all formats.
        group_size: channels that share parameters; 0 for the whole head.
        seed: of everything random in this layer.
        one_norm: the model normalises all its heads' keys by one k_norm, so all must share what is
            fused.
        without: parts of the transform that are left out, by name.
        output_weight: float [hidden_size, H·D], o_proj; None where unknown.
        catalogue: the mixed formats to choose from; empty: each layer makes its own cuts.
        pairs: which channels RoPE turns together (kernels/key_mean.py).
        gated: a gate multiplies each channel between attention and o_proj, so that a basis of values
            must be a permutation times a positive scale of each.
        normed: values are normalised behind their projection, so that a basis must be orthogonal.
        eigen: of whiten.eigenbasis: what the bases of all formats have in common, once it is known.
    """

    fmt: Format | None = None
    group_size: int = 0
    seed: int = 0
    one_norm: bool = False
    without: tuple[str, ...] = ()
    output_weight: Tensor | None = None
    catalogue: tuple[Format, ...] = ()
    pairs: RopePairs = "halves"
    gated: bool = False
    normed: bool = False
    eigen: tuple[Tensor, Tensor] | None = None

    def generator(self) -> torch.Generator:
        """Always in the same state."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Transform:
    """One row of the table.

    Attributes:
        name: in recipes and artifacts.
        fit: statistics → basis.
        mixed: (statistics, mean code bits, request) → formats with classes of their own, if the
            transform has any.
        each_format: the basis depends on the format.
        shared: adds to a request what the bases of all formats have in common.
    """

    name: str
    fit: Callable[[LayerStats, Request], Basis]
    mixed: Callable[[LayerStats, tuple[float, ...], Request], list[Format]] | None = None
    each_format: bool = False
    shared: Callable[[LayerStats, Request], Request] | None = None


def identity(stats: LayerStats, request: Request) -> Basis:
    """Leaves everything as it is."""
    return Basis()
