"""The packed KV cache as a transformers `Cache`."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from kvfold.errors import KVBudgetExceeded, KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.hybrids import Hybrid
from kvfold.exports.spec import LayerSpec
from kvfold.runtime.backends.base import Backend
from kvfold.runtime.backends.reference import REFERENCE
from kvfold.runtime.budget.base import rollback_nbytes
from kvfold.runtime.budget.choose import choose
from kvfold.runtime.budget.ladder import Ladders
from kvfold.runtime.cache.ambient import neutral, neutrally
from kvfold.runtime.cache.layer import PackedLayer
from kvfold.runtime.cache.nan_check import Bad, not_finite
from kvfold.runtime.cache.pager import Pager
from kvfold.runtime.cache.shared import SharedState, say
from kvfold.runtime.cache.sized_cache import SizedCache
from kvfold.runtime.cache.stateful import places_of
from kvfold.runtime.cache.states import States
from kvfold.runtime.cache.storage import save_layers
from kvfold.runtime.generate.steps import HostSteps

AHEAD = "go back to a fork(n) that was taken before they came, or reset() and run what stays"


class QuantizedKVCache(SizedCache):
    """Keys and values of all layers that attend: sinks and window in 16 bits, everything between
    packed in pages. Layers that keep states keep them as with transformers' own cache.

    Args:
        specs: one LayerSpec for each layer that attends.
        geometry: sinks, window, page size and head shape.
        budget: bytes that `nbytes` may never pass; None for no limit.
        backend: reads and writes the tensors (runtime.backends.base); plain torch by default.
        ladders: pages start in 16 bits and go down them as the budget fills; None stores at the
            searched bits at once.
        offload: old pages go to host memory as the budget, then of bytes on the device, fills; None
            keeps all on the device.
        batch_invariant: attention gives a sequence the same bits in any batch.
        artifact: digest of the artifact that the cache belongs to; None for a cache made by hand,
            which can't be saved.
        ephemeral: made for one forward pass with use_cache=False, and not returned.
        tell: says a warning, by a word that it is said once for.
        hybrid: which layers of the model attend and keep states; None where all attend.
    Raises:
        KvfoldError: ladders or offload without a budget, or both.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        geometry: Geometry,
        budget: int | None = None,
        backend: Backend = REFERENCE,
        ladders: Ladders | None = None,
        offload: Pager | None = None,
        *,
        batch_invariant: bool = False,
        artifact: str | None = None,
        ephemeral: bool = False,
        tell: Callable[..., None] = say,
        hybrid: Hybrid | None = None,
    ) -> None:
        self.policy, self.places = choose(budget, ladders, offload), places_of(hybrid)
        self.shared = SharedState(geometry, batch_invariant=batch_invariant, states=States(hybrid))
        layers = [
            PackedLayer(rungs, self.shared, i, backend, self.policy.new_pool)
            for i, rungs in enumerate(self.policy.specs(specs))
        ]
        super().__init__(layers=layers)  # type: ignore[arg-type]
        self.artifact, self.ephemeral, self.tell = artifact, ephemeral, tell
        self.steps = HostSteps()

    def note_padding(
        self, attention_mask: Tensor | None, batch_size: int, tokens: int | None = None
    ) -> None:
        """Learns each sequence's left padding, and whether anything else is hidden, before the
        forward pass that it belongs to.

        Args:
            attention_mask: [B, columns seen so far and new], 0 where hidden from all; None hides
                the padding that is known.
            batch_size: B.
            tokens: new columns; None for what the mask has beyond those seen.
        Raises:
            KvfoldError: the mask has another batch, or shows columns that an earlier one said are
                padding.
        """
        self.shared.note_padding(attention_mask, batch_size, self.get_seq_length(), tokens)

    @neutrally
    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Positions int64 [B, tokens] of the next tokens, counted from each sequence's first real
        one."""
        return self.shared.positions(self.get_seq_length(), tokens, device)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Takes one layer's keys and values and returns the handle to attend with, twice. They are
        stored now, or, in a decoding step by kernels, when the handle attends; see
        PackedLayer.update.

        Raises:
            KVBudgetExceeded: the tokens would take the whole cache past its budget; nothing is
                stored.
            FloatingPointError: a key or value is NaN or infinite; what earlier layers have stored
                of the call is taken back. A decoding step by kernels waits for nothing: its keys
                and values are reported before the next page is packed.
        """
        layer_idx = self.place_of(layer_idx)
        if self.shared.stepping:  # all of this is done (runtime.generate.steps)
            return self.layers[layer_idx].update(key_states, value_states)
        sources = (key_states, value_states) if torch.is_grad_enabled() else ()
        with neutral():
            view, _ = self._update(
                key_states.detach(), value_states.detach(), layer_idx, *args, **kwargs
            )
        view = view.with_sources(sources)
        return view, view

    def _update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        if layer_idx == 0:
            self.steps.disturb()
            self.steps.check_whole(self.layers)
            self._check_marks_before(key_states.shape[2])
            self.policy.admit(self.layers, key_states.shape[0], key_states.shape[2])
        try:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except FloatingPointError:
            self.take_back(layer_idx, key_states.shape[2])
            raise

    def begin_step(self) -> bool:
        """Before a decoding step of one token a sequence by kernels: all that the host does for it.
        False: it must be run a layer at a time, by `update`.

        Raises:
            KVBudgetExceeded, FloatingPointError: as `update`, before anything has changed.
        """
        if self.steps.quiet:
            self.steps.count_quiet(self.shared.clock)
            return True
        self.steps.check_whole(self.layers)
        self._check_marks_before(1)
        return self.steps.begin(self.layers, self.policy)

    def step(self) -> AbstractContextManager[None]:
        """While this lasts, `update` and attention leave the host's state alone: for a step that
        `begin_step` has prepared."""
        return self.shared.step()

    def finish_step(self) -> None:
        """After such a step has been given to the device."""
        if not self.steps.quiet:
            self.steps.finish(self.layers)

    def finish_call(self) -> None:
        """After a call of the model: layers that others read too give back what only its queries
        saw."""
        for layer in self.layers:
            if layer.is_shared:
                layer.release_passed()

    def _check_marks_before(self, tokens: int) -> None:
        """Reports what is marked before the next `tokens` columns pack it."""
        if self.layers[0].is_initialized:
            shared, lengths = self.shared, self.layers[0].lengths()
            self._raise_marked(
                shared.marks.before_packing(self.geometry, lengths, tokens, self.tokens)
            )

    def look(self) -> None:
        """Waits for the device and reports marks of all steps so far.

        Raises:
            FloatingPointError: a key or value was NaN or infinite. The cache ends before the column
                that had it, as if nothing had come since; if a sliding window has left behind what
                that takes, or layers keep states, it must be reset.
        """
        self._raise_marked(self.shared.marks.look())

    def _raise_marked(self, found: list[Bad]) -> None:
        """Raises what `look` says if something is marked."""
        if not found:
            return
        pads = self.shared.padding or [0] * self.layers[0].batch_size
        column, _, bad = min((bad.token + pads[bad.sequence], bad.sequence, bad) for bad in found)
        remove = self.tokens - column
        end = (
            "states of other layers have gone on, so reset() the cache or take a new one."
            if self.states
            else ""
        )
        try:
            for layer in self.layers:
                layer.check_crop(-remove)
            self.take_back(len(self.layers), remove)
            self.shared.marks.unmark(self.layers[0].lengths())
        except KvfoldError:
            end = "a sliding window has left behind what going back takes, so reset() the cache or take a new one."
        raise not_finite(self.states.number_of(bad.layer), bad.name, column, bad.sequence, end)

    @neutrally
    def reset(self) -> None:
        super().reset()
        self.shared.set_padding([])
        self.shared.marks.clear()
        self.states.reset()
        self.steps.reset()
        self.policy.begin_anew()

    @neutrally
    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last |n| tokens for n ≤ 0; for n > 0 keeps the first n columns. See PackedLayer.crop.

        Raises:
            KvfoldError: what is left would need tokens that a sliding window has left behind, or
                layers keep states; nothing is removed.
        """
        if self.layers[0].removed(tokens_to_remove):
            self.states.refuse(f"crop({tokens_to_remove})", AHEAD)
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        self.steps.disturb()
        removed = self.layers[0].removed(tokens_to_remove)
        exact = [layer.crop(tokens_to_remove) for layer in self.layers]
        if not all(exact):
            self.tell(
                "crop", "a crop by %d tokens went back behind a page: what stands there keeps its "
                "quantised values, and not the 16 bits "
                "of the window; load with rollback=%d, or cache.extend_rollback(%d) before they "
                "come, for crops as if they had never come",
                removed, removed, removed,
            )  # fmt: skip
        self.shared.marks.unmark(self.layers[0].lengths())
        self._publish()

    @neutrally
    def take_back(self, count: int, tokens: int) -> None:
        """Removes the latest `tokens` tokens from the first `count` layers, after a call that
        failed in the next one."""
        self.steps.disturb()
        self.states.spoil()
        # where a sliding window forbids it, check_whole refuses the cache
        with suppress(KvfoldError):
            for layer in self.layers[:count]:
                layer.crop(-tokens, undo=True)

    @neutrally
    def extend_rollback(self, tokens: int) -> None:
        """Makes crops of up to `tokens` tokens exact from here on, if they aren't: the 16-bit ring
        grows.

        Raises:
            KVBudgetExceeded: there is no room for that in the budget; nothing has changed.
        """
        if tokens <= self.geometry.rollback:
            return
        self.states.refuse(f"extend_rollback({tokens})", AHEAD)
        more = rollback_nbytes(self.layers, tokens)
        need = self.nbytes + more
        if more and not self.policy.spare(self.layers, more):
            raise KVBudgetExceeded(
                f"A rollback of {tokens} tokens needs a cache of {need} bytes, but kv_budget is {self.budget}; raise "
                "kv_budget or draft fewer tokens at a time."
            )
        self.steps.drop()
        self.shared.extend_rollback(tokens)
        for layer in self.layers:
            layer.extend_ring()

    @neutrally
    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._regroup(beam_idx.tolist(), partial(super().reorder_cache, beam_idx))  # type: ignore[arg-type]

    @neutrally
    def batch_select_indices(self, indices: Tensor) -> None:
        chosen = (indices.nonzero().flatten() if indices.dtype == torch.bool else indices).tolist()
        self._regroup(chosen, partial(super().batch_select_indices, indices))

    @neutrally
    def batch_repeat_interleave(self, repeats: int) -> None:
        first = self.layers[0]
        batch_size = first.batch_size if first.is_initialized else len(self.shared.padding)
        chosen = [b for b in range(batch_size) for _ in range(repeats)]
        self._regroup(chosen, partial(super().batch_repeat_interleave, repeats))

    def _regroup(self, chosen: list[int], regroup_layers: Callable[[], None]) -> None:
        """Puts the batch together anew from these of its sequences."""
        self.look()
        self.policy.regroup(self.layers, len(chosen))
        self.steps.drop()
        regroup_layers()
        self.states.select(chosen)
        if self.shared.padding:
            self.shared.set_padding([self.shared.padding[b] for b in chosen])
        self._publish()

    def _publish(self) -> None:
        for layer in self.layers:
            if layer.is_initialized:
                layer.table.publish()

    @neutrally
    def fork(self, count: int) -> "list[QuantizedKVCache]":
        """`count` caches that go on from here, each by itself, and so does this one. Packed pages
        are shared, not copied.

        `nbytes` of each counts the pages that it reads, shared or not; `resident_nbytes` counts
        each page once.
        """
        if count < 1:
            raise KvfoldError(f"fork({count}) makes no cache; give 1 or more.")
        self._refuse_policy("fork")
        self.look()
        return [self._twin(shares_pages=True) for _ in range(count)]

    @neutrally
    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedKVCache":
        """A cache that goes on from here by itself, with pages of its own; where pages may go to
        host memory, a fork, which shares them."""
        if self.policy.moves_pages:
            (other,) = self.fork(1)
        else:
            self.look()
            other = self._twin(shares_pages=False)
        memo[id(self)] = other
        return other

    def __copy__(self) -> "QuantizedKVCache":
        return copy.deepcopy(self)  # two caches can't share layers: each counts its own steps

    def _twin(self, shares_pages: bool) -> "QuantizedKVCache":
        """A cache as this one, but for tensors that steps of it run on."""
        steps, shared, policy = self.steps.twin(), self.shared.copy(), self.policy.copy()
        layers = [layer.copy(shared, policy.new_pool, shares_pages) for layer in self.layers]
        other: QuantizedKVCache = object.__new__(type(self))
        other.__dict__.update(
            self.__dict__, steps=steps, shared=shared, policy=policy, layers=layers
        )
        if policy.moves_pages and not all(layer.is_initialized for layer in layers):
            other.reset()  # layers that have no pool yet would each bring their own to one pager
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise KvfoldError(
            "A packed cache can't be pickled, because its block tables are addresses; write it "
            "with cache.save(path) and read it with "
            "runtime.load_cache(path, model)."
        )

    def _refuse_policy(self, what: str) -> None:
        """A policy that rewrites pages in place would change them under another cache's hands."""
        if not self.policy.keeps_pages:
            raise KvfoldError(
                f"{what}() needs pages that stay as they are; load with policy='floor'."
            )

    @neutrally
    def save(self, path: str | PathLike, *, entropy_coded: bool = False) -> None:
        """Writes the cache to a file that `runtime.load_cache` restores; see
        runtime/cache/storage.py.

        Args:
            entropy_coded: a file about a seventh smaller, of the same contents to the bit, which
                takes about ten times as long to write and which a kvfold of before can't read.
        Raises:
            KvfoldError: the cache holds no tokens, was made by hand, or `path` can't be written.
        """
        self._refuse_policy("save")
        self.look()
        save_layers(path, self.layers, self.artifact, entropy_coded)
