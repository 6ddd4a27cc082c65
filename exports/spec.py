"""What one layer of an artifact says about its cache, as tensors: the object that compress writes and runtime reads."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvfold.kernels.formats import Format


@dataclass(frozen=True)
class KeySpec:
    """How a layer's keys are stored: z = M(k − μ) after RoPE, coded in `format`.

    Attributes:
        format: of one KV head.
        transforms: names of the transforms applied, for people.
        matrix: float32 [num_kv_heads, head_dim, head_dim], M; None for the identity.
        offset: float32 [num_kv_heads, head_dim], μ; None for zero. A constant shift of every key's logit under one query,
            so softmax does not see it; only a soft-cap or a sink logit needs it back (`shift`).
        clip: float32 [num_kv_heads], factor on (minimum, maximum) of "scale_min" formats; None for 1.
    """

    format: Format
    transforms: tuple[str, ...] = ()
    matrix: Tensor | None = None
    offset: Tensor | None = None
    clip: Tensor | None = None

    @cached_property
    def query_matrix(self) -> Tensor | None:
        """M⁻¹, float32 [num_kv_heads, head_dim, head_dim]: q·(k − μ) = (q M⁻¹)·z. Inverted in float64."""
        return None if self.matrix is None else torch.linalg.inv(self.matrix.double()).float().contiguous()

    def apply(self, keys: Tensor) -> Tensor:
        """Keys after RoPE [..., num_kv_heads, T, head_dim] → z, float32."""
        z = keys.float()
        if self.offset is not None:
            z = z - self.offset[:, None]
        return z if self.matrix is None else z @ self.matrix.mT

    def apply_query(self, queries: Tensor) -> Tensor:
        """Queries after RoPE [..., num_heads, T, head_dim] → queries in the keys' basis, float32."""
        if self.query_matrix is None:
            return queries.float()
        heads = self.query_matrix.shape[0]
        grouped = queries.float().unflatten(-3, (heads, -1))
        return (grouped @ self.query_matrix[:, None]).flatten(-4, -3)

    def shift(self, queries: Tensor) -> Tensor | None:
        """q · μ of queries after RoPE [..., num_heads, T, head_dim] → float32 [..., num_heads, T]; None without offset."""
        if self.offset is None:
            return None
        offset = self.offset.repeat_interleave(queries.shape[-3] // len(self.offset), 0)
        return (queries.float() * offset[:, None]).sum(-1)

    def to(self, device: torch.device) -> "KeySpec":
        matrix, offset, clip = (None if t is None else t.to(device) for t in (self.matrix, self.offset, self.clip))
        return KeySpec(self.format, self.transforms, matrix, offset, clip)


@dataclass(frozen=True)
class ValueSpec:
    """How a layer's values are stored. Their basis is fused into v_proj and o_proj, so nothing is applied at run time.

    Attributes:
        format, transforms, clip: as in KeySpec.
    """

    format: Format
    transforms: tuple[str, ...] = ()
    clip: Tensor | None = None

    def to(self, device: torch.device) -> "ValueSpec":
        return ValueSpec(self.format, self.transforms, None if self.clip is None else self.clip.to(device))


@dataclass(frozen=True)
class LayerSpec:
    """Keys and values of one layer."""

    key: KeySpec
    value: ValueSpec

    def to(self, device: torch.device) -> "LayerSpec":
        return LayerSpec(self.key.to(device), self.value.to(device))
