"""Transforms of keys and values: each a short file with one row in the table of its side.

| transform | side | fused into the weights | at run time, on new keys and queries | source |
|---|---|---|---|---|
| none | K | – | – | |
| none | V | a power of two | – | rotate.py |
| smooth | K | a scale for each pair of channels, in q/k projections, biases or norms | – | PM-KVQ, smooth.py |
| reorder | K | – | a permutation, where K is written | SKVQ, reorder.py |
| reorder | V | a permutation times a power of two | – | SKVQ, reorder.py |
| whiten | K | – | a matrix M and an offset μ | whiten.py |
| rotate | V | an orthogonal matrix times a power of two | – | rotate.py |
| balance | V | an invertible matrix | – | rotate.py |
| whiten | V | an invertible matrix M | – | whiten.py |
| whiten | V, gated | a permutation times a scale of each channel | – | channels.py |

Values that are normalised behind their projection take no scale, and no "whiten" or "balance":
theirs is "rotate" then, or "none" where they come of the keys' projection.
"""

from kvfold.compress.transforms import reorder, rotate, smooth, whiten
from kvfold.compress.transforms.interface import Basis, Request, Transform, identity

KEY_TRANSFORMS = {
    row.name: row for row in (Transform("none", identity), smooth.KEYS, reorder.KEYS, whiten.KEYS)
}
VALUE_TRANSFORMS = {
    row.name: row
    for row in (rotate.PLAIN, reorder.VALUES, rotate.ROTATE, rotate.BALANCE, whiten.VALUES)
}

SCALED = ("whiten", "balance")  # of values, which no norm behind their projection lets through
UNMIXED = ("whiten", "none", "reorder")  # of values, which a gate behind attention lets through

__all__ = [
    "KEY_TRANSFORMS",
    "SCALED",
    "UNMIXED",
    "VALUE_TRANSFORMS",
    "Basis",
    "Request",
    "Transform",
]
