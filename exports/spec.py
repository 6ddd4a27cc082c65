"""What one layer of an artifact says about its cache, as tensors: the object that compress writes
and runtime reads."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kvfold.kernels.formats import Format
from kvfold.kernels.key_mean import RopePairs, TurnTables, mean_bases, turn_tables


def clip_rows(clip: Tensor | None) -> Tensor | None:
    """A spec's clip as `encode` wants it, for blocks [..., num_kv_heads, T, head_dim]:
    [num_kv_heads, 1, groups or 1]."""
    return None if clip is None else clip.reshape(len(clip), 1, -1)


@dataclass(frozen=True)
class KeySpec:
    """How a layer's keys are stored: z = M(k − m_t) after RoPE, coded in `format`.

    Attributes:
        format: of one KV head.
        transforms: names of the transforms applied, for people.
        matrix: float32 [num_kv_heads, head_dim, head_dim], M; None for the identity.
        offset: float32 [num_kv_heads, head_dim]; None for zero. With `frequencies` it is the mean
            of keys before RoPE, and m_t is that mean turned to the key's position
            (kernels/key_mean.py): a logit lacks q·m_t, which the reader adds. Without, it is the
            mean after RoPE and m_t = μ for all keys: a shift of every logit of a query, so softmax
            does not see it; only a soft-cap or a sink logit needs it back (`shift`).
        clip: float32 [num_kv_heads], or [num_kv_heads, groups] where the format has more than one
            group: factor on (minimum, maximum) of "scale_min" formats; None for 1.
        frequencies: RoPE's angular frequencies ω, of its pairs, radians a token; None where keys
            don't turn.
        pairs: which channels are a pair (kernels/key_mean.py).
    """

    format: Format
    transforms: tuple[str, ...] = ()
    matrix: Tensor | None = None
    offset: Tensor | None = None
    clip: Tensor | None = None
    frequencies: tuple[float, ...] | None = None
    pairs: RopePairs = "halves"

    @cached_property
    def query_matrix(self) -> Tensor | None:
        """M⁻¹, float32 [num_kv_heads, head_dim, head_dim]: q·(k − μ) = (q M⁻¹)·z. Inverted in
        float64."""
        return (
            None
            if self.matrix is None
            else torch.linalg.inv(self.matrix.double()).float().contiguous()
        )

    @cached_property
    def mean_bases(self) -> tuple[Tensor, Tensor]:
        """What turns are multiplied with to give m_t in the stored basis; see key_mean.py."""
        assert self.offset is not None and self.frequencies is not None
        return mean_bases(self.frequencies, self.pairs, self.offset, self.matrix)

    @property
    def turns(self) -> bool:
        """Whether the mean that is taken off turns with the position."""
        return self.offset is not None and self.frequencies is not None

    def tables(self, sinks: int) -> TurnTables:
        """What the rotating mean is made of, in a cache of so many sinks; only where `turns`."""
        assert self.offset is not None and self.frequencies is not None
        return turn_tables(
            self.frequencies, self.offset.shape[1], sinks, self.offset.device, self.pairs
        )

    def mean(self, positions: Tensor | None, sinks: int, end: int | None = None) -> Tensor | None:
        """m_t of keys at int64 positions [..., T], which only a mean that turns needs: float32
        [..., num_kv_heads, T or 1, head_dim]; None for zero. end: a number that all positions are
        below, if the host knows one."""
        if self.offset is None:
            return None
        if not self.turns:
            return self.offset[:, None]
        assert positions is not None
        return self.tables(sinks).mean(self.offset, positions, end)

    def apply(
        self, keys: Tensor, positions: Tensor | None, sinks: int, end: int | None = None
    ) -> Tensor:
        """Keys after RoPE → z, float32.

        Args:
            keys: [..., num_kv_heads, T, head_dim].
            positions: int64 [T], or [B, T] where sequences differ, tokens counted from each
                sequence's first; None will do where the mean does not turn.
            sinks: first tokens of a sequence, which have no mean taken off.
            end: as in `mean`.
        """
        mean = self.mean(positions, sinks, end)
        return self.transform(keys.float() if mean is None else keys.float() - mean)

    def transform(self, rest: Tensor) -> Tensor:
        """k − m_t [..., num_kv_heads, T, head_dim] → z, float32."""
        return rest.float() if self.matrix is None else rest.float() @ self.matrix.mT

    def apply_query(self, queries: Tensor) -> Tensor:
        """Queries after RoPE [..., num_heads, T, head_dim] → queries in the keys' basis,
        float32."""
        if self.query_matrix is None:
            return queries.float()
        heads = self.query_matrix.shape[0]
        grouped = queries.float().unflatten(-3, (heads, -1))
        return (grouped @ self.query_matrix[:, None]).flatten(-4, -3)

    def shift(self, queries: Tensor) -> Tensor | None:
        """q·μ of queries after RoPE [..., num_heads, T, head_dim] → float32 [..., num_heads, T];
        None without a constant μ."""
        if self.offset is None or self.turns:
            return None
        offset = self.offset.repeat_interleave(queries.shape[-3] // len(self.offset), 0)
        return (queries.float() * offset[:, None]).sum(-1)

    def to(self, device: torch.device) -> "KeySpec":
        matrix, offset, clip = (
            None if t is None else t.to(device) for t in (self.matrix, self.offset, self.clip)
        )
        return replace(self, matrix=matrix, offset=offset, clip=clip)


@dataclass(frozen=True)
class ValueSpec:
    """How a layer's values are stored. Their basis is fused into v_proj and o_proj, so nothing is
    applied at run time.

    Attributes:
        format, transforms, clip: as in KeySpec.
    """

    format: Format
    transforms: tuple[str, ...] = ()
    clip: Tensor | None = None

    def to(self, device: torch.device) -> "ValueSpec":
        return ValueSpec(
            self.format, self.transforms, None if self.clip is None else self.clip.to(device)
        )


@dataclass(frozen=True)
class LayerSpec:
    """Keys and values of one layer."""

    key: KeySpec
    value: ValueSpec

    def to(self, device: torch.device) -> "LayerSpec":
        return LayerSpec(self.key.to(device), self.value.to(device))

    def of_heads(self, heads: slice) -> "LayerSpec":
        """The formats and transforms of some KV heads."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[heads].contiguous()

        key, value = self.key, self.value
        return LayerSpec(
            replace(key, matrix=cut(key.matrix), offset=cut(key.offset), clip=cut(key.clip)),
            replace(value, clip=cut(value.clip)),
        )
