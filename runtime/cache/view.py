"""What a layer of the packed cache hands to the attention function in place of keys and values."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfold.kernels.attention import KeyMean, attend

if TYPE_CHECKING:
    from kvfold.runtime.cache.layer import PackedLayer


@dataclass
class Padding:
    """What the layers of a cache share: the left padding of each sequence, in columns.

    batch_invariant: kernels divide a sequence's pages by its own length alone, not by the batch's.
    steps: decoding steps that the host has prepared for all layers at once (runtime.steps); each layer catches up when it is asked.
    stepping: such a step is being run, or captured: layers leave their host's state alone.
    plain: the current call's mask hides left padding, the future and what lies behind a sliding window, and nothing else: what kernels
        know. Other calls are the reference's.
    """

    columns: list[int]
    batch_invariant: bool = False
    scratch: dict = field(default_factory=dict)  # buffers that the layers' kernels take turns with
    steps: int = 0
    stepping: bool = False
    plain: bool = True


@dataclass
class RowView:
    """What the queries of one sequence read: 16-bit rows that live for this call, and pages."""

    skip: int  # leading columns of this call that are padding
    pad: int  # leading columns of the whole sequence that are padding
    positions: Tensor  # int64 [T - skip], of the queries
    limit: Tensor  # int64 [T - skip], see kernels.attention.attend
    keys: Tensor  # [Hkv, R, D] raw
    values: Tensor  # [Hkv, R, D] raw
    raw_positions: Tensor  # int64 [R]
    pages: list[int]
    packed_before: int  # tokens that were in pages before this call


@dataclass
class LayerView:
    """The handle that `update` returns in place of keys and values; the attention function hands it back.

    `rows` is None for a decoding step that a kernel reads from the layer itself. `dtype`, `device` and `shape` answer what
    model code may ask of a key tensor.
    """

    layer: "PackedLayer"
    rows: list[RowView] | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    new: tuple[Tensor, Tensor] | None = None  # keys and values of a step that the kernel appends when it attends
    sources: tuple[Tensor, ...] = ()  # keys and values whose gradients somebody may ask for

    def attend(
        self,
        query: Tensor,
        scaling: float,
        mask: Tensor | None,
        softcap: float | None = None,
        sinks_logit: Tensor | None = None,
        sliding: int = 0,
    ) -> Tensor:
        """Attention of query [B, num_heads, T, head_dim] → the same shape, float32 or the query's own type.

        mask: bool [B, 1, T, columns] or None for plain causal over what is not padding.
        softcap, sinks_logit: as in kernels.attention.attend.
        sliding: tokens that a query sees at the most, 0 for all; the mask says so too, kernels go by this.
        """
        if self.layer.use_triton and self.layer.padding.plain:
            from kvfold.runtime.backends.triton import attend_triton

            out = attend_triton(self, query, scaling, sliding, softcap, sinks_logit)
        else:
            out = self._attend_reference(query, scaling, mask, softcap, sinks_logit)
        if not self.layer.padding.stepping:
            self.layer.pool.written()
            self.layer.release_passed()
        return out

    def _attend_reference(
        self, query: Tensor, scaling: float, mask: Tensor | None, softcap: float | None, sinks_logit: Tensor | None
    ) -> Tensor:
        assert self.rows is not None
        spec, geometry = self.layer.spec, self.layer.geometry
        out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        q = spec.key.apply_query(query)
        shift = spec.key.shift(query) if softcap is not None or sinks_logit is not None else None
        tables = spec.key.tables(geometry.sinks) if spec.key.turns else None
        for b, row in enumerate(self.rows):
            if row.positions.numel() == 0:
                continue
            row_mask = None
            if mask is not None:
                columns = row.pad + int(row.positions[-1]) + 1
                row_mask = mask[min(b, mask.shape[0] - 1), 0, row.skip :, row.pad : columns]
            mean = None
            if tables is not None:
                assert spec.key.offset is not None
                mean = KeyMean(tables, tables.coefficients(spec.key.offset, query[b, :, row.skip :]))
            out[b, :, row.skip :] = attend(
                q[b, :, row.skip :], row.positions, row.limit, self.layer.tiles(row),
                sinks=geometry.sinks, scaling=scaling, mask=row_mask, softcap=softcap, sinks_logit=sinks_logit,
                shift=None if shift is None else shift[b, :, row.skip :], mean=mean,
            )  # fmt: skip
        return out
