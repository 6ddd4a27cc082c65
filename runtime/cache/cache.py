"""The packed KV cache as a transformers `Cache`."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.spec import LayerSpec
from kvfold.runtime.budget.ladder import Progressive
from kvfold.runtime.budget.lower import check, make_room, prepare, push_out
from kvfold.runtime.cache import nan_check as marks
from kvfold.runtime.cache.ambient import neutral, neutrally
from kvfold.runtime.cache.branches import Branches
from kvfold.runtime.cache.layer import PackedLayer
from kvfold.runtime.cache.pager import Pager
from kvfold.runtime.cache.pages import set_segments
from kvfold.runtime.cache.view import Padding
from kvfold.runtime.calls.masks import read_columns, settle

log = logging.getLogger("kvfold")


def say(key: str, message: str, *args: Any) -> None:
    """A warning of a cache that belongs to no model."""
    log.warning(message, *args)


class QuantizedKVCache(Branches, Cache):
    """Keys and values of all layers: sinks and window in 16 bits, everything between packed in pages.

    Args:
        specs: one LayerSpec a layer.
        geometry: of the cache.
        budget: bytes that `nbytes` may never pass; None for no limit.
        use_triton: read and write by Triton kernels instead of plain torch.
        policy: pages start in 16 bits and go down as the budget fills; None stores at the searched bits at once.
        offload: old pages go to host memory as the budget, then of bytes on the device, fills; None keeps all on the device.
    Raises:
        KvfoldError: a policy without a budget; offload without a budget or with a policy.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        geometry: Geometry,
        budget: int | None = None,
        use_triton: bool = False,
        policy: Progressive | None = None,
        offload: Pager | None = None,
    ) -> None:
        if offload is not None and (budget is None or policy is not None):
            raise KvfoldError(
                "offload moves pages that stay as they are as kv_budget fills, so it needs kv_budget and policy='floor'."
            )
        if policy is not None and budget is None:
            raise KvfoldError(
                "policy='progressive' lowers pages as a budget fills, so it needs a budget; give kv_budget."
            )
        self.padding = Padding([])
        self.policy = policy
        self.layers: list[PackedLayer]  # type: ignore[assignment]
        rungs = policy.rungs if policy is not None else [(spec,) for spec in specs]
        layers = [PackedLayer(x[0], geometry, self.padding, i, use_triton, x) for i, x in enumerate(rungs)]
        for layer in layers:
            layer.pager = offload
        self.pager = offload
        super().__init__(layers=layers)  # type: ignore[arg-type]
        self.geometry = geometry
        self.budget = budget
        self.tell: Any = say  # of the model's gate, where the cache has a model
        self.graph: Any = None  # a captured decoding step, see runtime.graph
        self.settled: bool | None = None  # of the step that runs: whether pages will be lowered before the next one

    @property
    def nbytes(self) -> int:
        """Resident bytes: codes, parameters, sinks, window, block tables and lengths of every sequence. With offload, those on the
        device, staging buffers included."""
        staging = 0 if self.pager is None else self.pager.nbytes
        return sum(layer.nbytes for layer in self.layers) + staging

    @property
    def host_nbytes(self) -> int:
        """Bytes of pages that offload has moved to host memory."""
        return 0 if self.pager is None else self.pager.host_nbytes

    def note_padding(self, attention_mask: Tensor | None, batch_size: int, tokens: int | None = None) -> None:
        """Learns each sequence's left padding, and whether anything else is hidden, before the forward pass that it belongs to.

        Args:
            attention_mask: [B, columns seen so far and new], 0 where hidden from all; None hides the padding that is known.
            batch_size: B.
            tokens: new columns; None for what the mask has beyond those seen.
        Raises:
            KvfoldError: the mask has another batch, or shows columns that an earlier one said are padding.
        """
        seen, padding = self.get_seq_length(), self.padding
        if len(padding.columns) != batch_size:
            padding.columns = [0] * batch_size
        if attention_mask is None:
            padding.columns, padding.plain = padding.columns if seen else [0] * batch_size, True
            return
        if len(attention_mask) != batch_size:
            raise KvfoldError(
                f"attention_mask is of {len(attention_mask)} sequence(s), but this call has {batch_size}; give it a row for each."
            )
        columns = read_columns(attention_mask, attention_mask.shape[1] if tokens is None else seen + tokens)
        padding.columns, padding.plain = settle(columns, padding.columns, seen)

    @neutrally
    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Positions int64 [B, tokens] of the next tokens, counted from each sequence's first real one."""
        columns = torch.arange(tokens, device=device) + self.get_seq_length()
        return (columns - torch.tensor(self.padding.columns, device=device)[:, None]).clamp_min(0)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Appends one layer's keys and values; see PackedLayer.update.

        Raises:
            KVBudgetExceeded: the tokens would take the whole cache past its budget; nothing is stored.
            FloatingPointError: a key or value is NaN or infinite; what earlier layers have stored of the call is taken back. A
                decoding step by kernels waits for nothing: its keys and values are reported before the next page is packed.
        """
        if self.padding.stepping:  # all of this is done (runtime.steps)
            return self.layers[layer_idx].update(key_states, value_states)
        sources = (key_states, value_states) if torch.is_grad_enabled() else ()
        with neutral():
            view, _ = self._update(key_states.detach(), value_states.detach(), layer_idx, *args, **kwargs)
        view.sources = sources
        return view, view

    def _update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if layer_idx == 0:
            self.quiet = 0
            self.check_whole()
            marks.look_before_packing(self, key_states.shape[2])
        if self.budget is not None and layer_idx == 0:
            make_way = push_out if self.pager is not None else check if self.policy is None else prepare
            make_way(self, key_states.shape[0], key_states.shape[2])
        try:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except FloatingPointError:
            self.take_back(layer_idx, key_states.shape[2])
            raise

    def report(self) -> list[dict]:
        """One dict a layer: tokens (of each sequence), pages by format (finest first), bytes (on the device, without the staging buffers
        of offload), host_bytes, effective_bits (of both, ·8 / elements)."""
        g = self.geometry
        rows = []
        for layer in self.layers:
            lengths = layer.lengths()
            seen = sum(min(n, layer.sliding or n) for n in lengths)
            elements = 2 * g.num_kv_heads * g.head_dim * seen
            counts = layer.pool.counts if layer.is_initialized else [0] * len(layer.rungs)
            if layer.shares_pool:  # a fork, which has one rung
                counts = [layer.num_pages()]
            names = [f"K {rung.key.format} | V {rung.value.format}" for rung in layer.rungs]
            rows.append(
                {
                    "tokens": lengths,
                    "pages": dict(reversed(list(zip(names, counts, strict=True)))),
                    "bytes": layer.nbytes,
                    "host_bytes": layer.host_nbytes,
                    "effective_bits": 8 * (layer.nbytes + layer.host_nbytes) / elements if elements else 0.0,
                }
            )
        return rows

    @neutrally
    def reset(self) -> None:
        super().reset()
        self.padding.columns = []
        self.padding.scratch.pop(marks.NAME, None)
        self.padding.scratch.pop(marks.ASKED, None)
        self.graph, self.quiet, self.torn = None, 0, False
        if self.pager is not None:  # forks go on with the old one
            self.pager.fixed.pop(self, None)
            self.pager = self.pager.new()
            for layer in self.layers:
                layer.pager = self.pager

    @neutrally
    def crop(self, *args, **kwargs) -> None:
        super().crop(*args, **kwargs)
        marks.unmark(self)
        self._set_segments()

    @neutrally
    def reorder_cache(self, beam_idx: Tensor) -> None:
        marks.look(self)
        make_room(self, len(beam_idx))
        self.graph, self.quiet = None, 0  # it holds the tensors of another batch
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._select_padding(beam_idx.tolist())

    @neutrally
    def batch_select_indices(self, indices: Tensor) -> None:
        chosen = (indices.nonzero().flatten() if indices.dtype == torch.bool else indices).tolist()
        marks.look(self)
        make_room(self, len(chosen))
        self.graph, self.quiet = None, 0  # it holds the tensors of another batch
        super().batch_select_indices(indices)
        self._select_padding(chosen)

    @neutrally
    def batch_repeat_interleave(self, repeats: int) -> None:
        marks.look(self)
        make_room(self, self.layers[0].batch_size * repeats if self.layers[0].is_initialized else 0)
        self.graph, self.quiet = None, 0  # it holds the tensors of another batch
        super().batch_repeat_interleave(repeats)
        self._select_padding([b for b in range(len(self.padding.columns)) for _ in range(repeats)])

    def _select_padding(self, indices: list[int]) -> None:
        if self.padding.columns:
            self.padding.columns = [self.padding.columns[i] for i in indices]
        self._set_segments()

    def _set_segments(self) -> None:
        for layer in self.layers:
            if layer.is_initialized:
                set_segments(layer)
