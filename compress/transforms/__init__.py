"""Transforms of keys and values: each a short file that turns one layer's statistics into matrices.

| transform | side | fused into the weights | at run time, on new keys and queries | source |
|---|---|---|---|---|
| none | K, V | – | – | |
| smooth | K | a scale for each pair of channels, in q/k projections, biases or norms | – | PM-KVQ, smoothing |
| reorder | K | – | a permutation M, where K is written | SKVQ, channel reorder |
| reorder | V | the permutation, in v_proj and o_proj | – | SKVQ, channel reorder |
| whiten | K | – | a matrix M and an offset μ | whiten.py |
| rotate | V | an orthogonal matrix times a power of two | – | rotate.py |
| balance | V | an invertible matrix | – | rotate.py |
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class KeyBasis:
    """What a key transform yields for one layer; every part may be absent.

    Attributes:
        pair_scale: float64 [Hkv, D], equal inside each RoPE pair (i, i + D/2): keys are divided by it, queries multiplied.
        matrix: float64 [Hkv, D, D], M of z = M(k − μ).
        offset: float64 [Hkv, D], μ.
    """

    pair_scale: Tensor | None = None
    matrix: Tensor | None = None
    offset: Tensor | None = None
