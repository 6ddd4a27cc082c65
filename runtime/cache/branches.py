"""What a whole cache does with the past: going back, forking, a longer ring for assisted decoding, and a place on disk."""

import copy
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from typing import Any, Self

from kvfold.errors import KVBudgetExceeded, KvfoldError
from kvfold.exports.account import RAW_NBYTES, Geometry
from kvfold.runtime.budget.lower import make_way
from kvfold.runtime.cache.ambient import neutrally
from kvfold.runtime.cache.nan_check import look
from kvfold.runtime.cache.view import Padding


class Branches:
    """The part of QuantizedKVCache that crops, forks and saves.

    Attributes:
        artifact: digest of the artifact that the cache belongs to; None for a cache made by hand, which can't be saved.
        lent: the cache serves one forward pass only, whose caller wants none.
    """

    layers: list[Any]
    geometry: Geometry
    padding: Padding
    budget: int | None
    pager: Any
    graph: Any
    tell: Any
    artifact: str | None = None
    lent: bool = False
    torn: bool = False  # a step failed half way
    quiet: int = 0  # steps to come before which the host has nothing to do, see runtime.steps

    @property
    def formats(self) -> list[tuple]:
        """(key format, value format) of each layer."""
        return [(layer.spec.key.format, layer.spec.value.format) for layer in self.layers]

    @property
    def tokens(self) -> int:
        """Columns that the cache holds, padding included."""
        return max(layer.columns for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last |n| tokens for n ≤ 0; for n > 0 keeps the first n columns. See PackedLayer.crop.

        Raises:
            KvfoldError: what is left would need tokens that a sliding window has left behind; nothing is removed.
        """
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        self.quiet = 0
        removed = self.layers[0]._removed(tokens_to_remove)
        exact = [layer.crop(tokens_to_remove) for layer in self.layers]
        if not all(exact):
            self.tell(
                "crop", "a crop by %d tokens went back behind a page: what stands there keeps its quantised values, and not the 16 bits "
                "of the window; load with rollback=%d, or cache.extend_rollback(%d) before they come, for crops as if they had never come",
                removed, removed, removed,
            )  # fmt: skip

    @neutrally
    def take_back(self, count: int, tokens: int) -> None:
        """Removes the latest `tokens` tokens from the first `count` layers, after a call that failed in the next one."""
        self.quiet = 0
        with suppress(KvfoldError):  # a sliding window forbids it: then check_whole refuses the cache
            for layer in self.layers[:count]:
                layer.crop(-tokens, undo=True)

    def check_whole(self) -> None:
        """Raises KvfoldError if a call that failed has left layers of different lengths."""
        found = {layer.columns for layer in self.layers if layer.columns}
        if len(found) > 1 or self.torn:
            least = max(found) - 1 if self.torn else min(found)
            raise KvfoldError(
                f"A call that failed left this cache with layers of {least} and of {max(found)} tokens; reset() it or "
                "take a new one."
            )

    @neutrally
    def extend_rollback(self, tokens: int) -> None:
        """Makes crops of up to `tokens` tokens exact from here on, if they aren't: the 16-bit ring grows.

        Raises:
            KVBudgetExceeded: there is no room for that in the budget; nothing has changed.
        """
        if tokens <= self.geometry.rollback:
            return
        geometry = replace(self.geometry, rollback=tokens)
        held = [layer for layer in self.layers if layer.is_initialized]
        if self.budget is not None and held:
            rows = geometry.raw_rows - self.geometry.raw_rows
            row = 2 * RAW_NBYTES * geometry.num_kv_heads * geometry.head_dim * held[0].batch_size
            moving = self.geometry.raw_rows if rows else 0  # one layer's old ring stands beside its new one
            more = row * (len(held) * rows + moving)
            staging = self.pager.nbytes if self.pager is not None else 0
            need = sum(layer.nbytes for layer in held) + staging + more
            if need > self.budget and not (self.pager is not None and make_way(self, more)):
                raise KVBudgetExceeded(
                    f"A rollback of {tokens} tokens needs a cache of {need} bytes, but kv_budget is {self.budget}; raise "
                    "kv_budget or draft fewer tokens at a time."
                )
        self.graph, self.quiet = None, 0  # it holds the old ring
        self.geometry = geometry
        for layer in self.layers:
            layer.extend_ring(geometry)

    @neutrally
    def fork(self, count: int) -> list[Self]:
        """`count` caches that go on from here, each by itself, and so does this one. Packed pages are shared, not copied.

        `nbytes` of each counts the pages that it reads, shared or not; `resident_nbytes` counts each page once.
        """
        if count < 1:
            raise KvfoldError(f"fork({count}) makes no cache; give 1 or more.")
        self._refuse_policy("fork")
        look(self)
        forks = []
        for _ in range(count):
            other = self._twin()
            other.layers = [layer.fork(other.padding) for layer in self.layers]
            if self.pager is not None:
                self.pager.fixed[other] = self.pager.fixed.get(self, 0)
                if not all(layer.is_initialized for layer in self.layers):
                    other.reset()  # layers that have no pool yet would each bring their own to one pager
            forks.append(other)
        return forks

    @neutrally
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A cache that goes on from here by itself, with pages of its own; where pages may go to host memory, a fork, which shares them."""
        if self.pager is not None:
            (other,) = self.fork(1)
        else:
            look(self)
            other = self._twin()
            other.layers = [layer.duplicate(other.padding) for layer in self.layers]
        memo[id(self)] = other
        return other

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # two caches can't share layers: each counts its own steps

    def _twin(self) -> Any:
        """A cache without layers, and else as this one, but for tensors that steps of it run on."""
        other: Any = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.padding = replace(self.padding, columns=list(self.padding.columns), scratch={})
        other.graph, other.quiet, other.settled = None, 0, None
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise KvfoldError(
            "A packed cache can't be pickled, because its block tables are addresses; write it with cache.save(path) and read it with "
            "runtime.load_cache(path, model)."
        )

    def _refuse_policy(self, what: str) -> None:
        """A policy that rewrites pages in place would change them under another cache's hands."""
        if getattr(self, "policy", None) is not None:
            raise KvfoldError(f"{what}() needs pages that stay as they are; load with policy='floor'.")

    @neutrally
    def save(self, path: str | PathLike) -> None:
        """Writes the cache to a file that `runtime.load_cache` restores; see runtime/cache/storage.py."""
        from kvfold.runtime.cache.storage import save_cache

        self._refuse_policy("save")
        look(self)
        save_cache(self, path)


def resident_nbytes(caches: list[Any]) -> int:
    """Bytes of several caches on the device, each tensor that they share once."""
    tensors = {t.data_ptr(): t for cache in caches for layer in cache.layers for t in layer.tensors() if t.numel()}
    staging = {id(cache.pager): cache.pager.nbytes for cache in caches if cache.pager is not None}
    return sum(t.nbytes for t in tensors.values()) + sum(staging.values())
