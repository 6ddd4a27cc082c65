"""What rivals are made of: codecs that turn one side of one layer, float32 [Hkv, T, D], into the
arrays that a cache would keep.

`encode` returns every array in its stored type (codes bit-packed in uint8, parameters in float16 or
float8), and `decode` reads nothing else, so the size of a rival is the size of these arrays. Only
static tables (rotations, orders, clips, grids) stay outside, as they do for our own artifacts: they
are paid once a model, not once a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from kvfold.compress.transforms.basis import mixing_matrix

Stored = tuple[Tensor, ...]
ParamType = Literal["e4m3", "fp16"]
PARAM_BITS: dict[ParamType, int] = {"e4m3": 8, "fp16": 16}
CLIPS = tuple(
    round(0.4 + 0.05 * i, 2) for i in range(13)
)  # factors on a range that a clip search tries


class Codec(Protocol):
    """One way to store float32 [..., T, D]."""

    def encode(self, x: Tensor) -> Stored: ...

    def decode(self, stored: Stored) -> Tensor: ...


def nbytes(stored: Stored) -> int:
    """Bytes of the arrays."""
    return sum(array.numel() * array.element_size() for array in stored)


def group_of(head_dim: int) -> int:
    """Channels that share parameters where a scheme leaves it open: a head, at most 128 channels
    (SKVQ's group)."""
    return min(head_dim, 128)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., n] below 2^bits → uint8 [..., n·bits/8], low bits first; n·bits is a
    multiple of 8."""
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    planes = ((codes[..., None] >> shifts) & 1).flatten(-2).unflatten(-1, (-1, 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (planes * weights).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    planes = ((packed[..., None] >> shifts) & 1).flatten(-2).unflatten(-1, (-1, bits))
    weights = 1 << torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (planes * weights).sum(-1, dtype=torch.uint8)


def store(x: Tensor, kind: ParamType) -> Tensor:
    """Parameters in their stored type, saturating."""
    if kind == "e4m3":
        return x.clamp(-448, 448).to(torch.float8_e4m3fn)
    return x.clamp(-65504, 65504).to(torch.float16)


@dataclass(frozen=True)
class Affine:
    """Asymmetric round-to-nearest in groups of the last axis: x̂ = m + s·c, m = clip·min, s =
    clip·(max − min)/(2^bits − 1).

    Attributes:
        group: neighbours that share (m, s).
        params: stored type of m and s, rounded before coding.
        clip: factor on minimum and maximum, broadcastable to [..., groups]; None for 1.
        cut: factor on the range about its middle, which a group far from zero needs instead.
    """

    bits: int
    group: int
    params: ParamType = "e4m3"
    clip: Tensor | None = None
    cut: float = 1.0

    def encode(self, x: Tensor) -> Stored:
        grouped = x.float().unflatten(-1, (-1, self.group))
        low, high = grouped.amin(-1), grouped.amax(-1)
        if self.clip is not None:
            clip = self.clip.to(x.device)
            low, high = low * clip, high * clip
        margin = (high - low) * (1 - self.cut) / 2
        low, high = low + margin, high - margin
        pair = store(torch.stack((low, (high - low) / (2**self.bits - 1)), -1), self.params)
        minimum, scale = pair.float()[..., None].unbind(-2)
        codes = ((grouped - minimum) / scale.clamp_min(1e-30)).round().clamp(0, 2**self.bits - 1)
        return pack(codes.flatten(-2).to(torch.uint8), self.bits), pair

    def decode(self, stored: Stored) -> Tensor:
        minimum, scale = stored[1].float()[..., None].unbind(-2)
        codes = unpack(stored[0], self.bits).float().unflatten(-1, (-1, self.group))
        return (minimum + scale * codes).flatten(-2)


@dataclass(frozen=True)
class Grid:
    """The nearest of 2^bits fixed points times a scale in groups of the last axis.

    Attributes:
        points: float32 [2^bits], rising.
        norm: what the scale is: the group's root mean square or its largest magnitude.
    """

    points: Tensor
    group: int
    norm: Literal["rms", "absmax"]
    params: ParamType = "fp16"

    @property
    def bits(self) -> int:
        return len(self.points).bit_length() - 1

    def encode(self, x: Tensor) -> Stored:
        grouped = x.float().unflatten(-1, (-1, self.group))
        scale = grouped.square().mean(-1).sqrt() if self.norm == "rms" else grouped.abs().amax(-1)
        stored = store(scale, self.params)
        points = self.points.to(x.device)
        codes = torch.bucketize(
            grouped / stored.float().clamp_min(1e-30)[..., None], (points[1:] + points[:-1]) / 2
        )
        return pack(codes.flatten(-2).to(torch.uint8), self.bits), stored

    def decode(self, stored: Stored) -> Tensor:
        codes = unpack(stored[0], self.bits).int().unflatten(-1, (-1, self.group))
        return (self.points.to(codes.device)[codes] * stored[1].float()[..., None]).flatten(-2)


@dataclass(frozen=True)
class Channelwise:
    """A codec along the tokens of each channel, in blocks of `block` tokens; T is a multiple of
    it."""

    inner: Codec
    block: int

    def encode(self, x: Tensor) -> Stored:
        return self.inner.encode(x.unflatten(-2, (-1, self.block)).mT)

    def decode(self, stored: Stored) -> Tensor:
        return self.inner.decode(stored).mT.flatten(-3, -2)


@dataclass(frozen=True)
class Rotated:
    """A codec in an orthogonal basis. `matrix`: [Hkv, D, D] or [D, D]; None for a Hadamard with
    random signs, seed
    0."""

    inner: Codec
    matrix: Tensor | None = None

    def _matrix(self, head_dim: int, device: torch.device) -> Tensor:
        matrix = hadamard(head_dim) if self.matrix is None else self.matrix
        return matrix.to(device, torch.float32)

    def encode(self, x: Tensor) -> Stored:
        return self.inner.encode(x @ self._matrix(x.shape[-1], x.device).mT)

    def decode(self, stored: Stored) -> Tensor:
        x = self.inner.decode(stored)
        return x @ self._matrix(x.shape[-1], x.device)


def hadamard(head_dim: int) -> Tensor:
    """Orthogonal float64 [D, D]: Hadamard with random signs, seed 0 (a random orthogonal matrix if
    D is no power of 2)."""
    return mixing_matrix(head_dim, torch.Generator().manual_seed(0))


def search_clip(x: Tensor, codec: Callable[[Tensor], Codec], metric: Tensor) -> Tensor:
    """The clip of each head with the least error tr(metric · E[Δx Δxᵀ]): float32 [Hkv, 1, 1].

    Args:
        x: float32 [Hkv, S, D], calibration tokens as they are quantised.
        codec: makes the codec for a clip [Hkv, 1, 1].
        metric: float64 [Hkv, D, D].
    """
    errors = []
    for clip in CLIPS:
        tried = codec(torch.full((x.shape[0], 1, 1), clip))
        delta = (tried.decode(tried.encode(x)) - x).double()
        errors.append(torch.einsum("hti,hij,htj->h", delta, metric, delta))
    return torch.tensor(CLIPS)[torch.stack(errors).argmin(0)][:, None, None]
