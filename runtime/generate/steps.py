"""The host's part of a decoding step by kernels, done for all layers before any of them runs.

All that changes from step to step lies on the device: lengths, pages and their addresses, which pages stand on which rung. The
host adds what the step will need: where a page comes due, its memory and its entries, for all layers in one copy. Between two
steps it may lower pages. Most steps need none of that, and of those the host only counts (`quiet`): then a captured step is
replayed and nothing else happens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfold.exports.account import table_entries
from kvfold.runtime.budget.lower import check, floor_nbytes, prepare
from kvfold.runtime.cache.nan_check import asked_before, look_before_packing
from kvfold.runtime.cache.pages import set_segments
from kvfold.runtime.cache.upload import Upload
from kvfold.runtime.cache.view import Padding

if TYPE_CHECKING:
    from kvfold.runtime.cache.cache import QuantizedKVCache
    from kvfold.runtime.cache.layer import PackedLayer

NAME = "due rungs"  # in Padding.scratch: like the marks, no part of what is cached


def due_in(layer: "PackedLayer") -> list[int]:
    """Sequences whose next token brings a page."""
    g = layer.geometry
    return [
        b for b, (n, ids) in enumerate(zip(layer.length, layer.pages, strict=True)) if g.num_pages(n + 1) > len(ids)
    ]


def due_rungs(layer: "PackedLayer") -> tuple[Tensor | None, list[int]]:
    """The rung that the page which comes due next is written on, of each sequence: int32 [B] on the device, which stays where it
    is, as a CUDA graph needs, and the same on the host. (None, []) where pages have one format."""
    if len(layer.rungs) == 1:
        return None, []
    held = layer.padding.scratch.setdefault(NAME, {})
    if len(held.get(layer.layer_idx, (None, []))[1]) != layer.batch_size:
        last = len(layer.rungs) - 1
        there = torch.full((layer.batch_size,), last, dtype=torch.int32, device=layer.device)
        held[layer.layer_idx] = (there, [last] * layer.batch_size)
    return held[layer.layer_idx]


def take_pages(layers: Sequence["PackedLayer"], due: list[int]) -> None:
    """Before a step by kernels: gives the sequences `due` a page in each of these layers, and the device, in one copy, what it must
    know of that and of what was lowered."""
    if not due and all(len(layer.rungs) == 1 for layer in layers):
        return
    news = Upload(layers[0].device)
    for layer in layers:
        for b in due:
            layer.pages[b] += layer.pool.allocate(1, layer.due[b][0] if layer.due and layer.due[b] else -1)
        if due and table_entries(max(map(len, layer.pages))) != layer.block_table.shape[1]:
            layer._fit_table(0)
        else:
            for b in due:
                at = len(layer.pages[b]) - 1
                news.add(layer.block_table[b, at : at + 1], layer.pool.addresses(layer.pages[b][-1:]))
        set_segments(layer, news)
        there, here = due_rungs(layer)
        wanted = [layer.pool.rung(layer.pages[b][-1]) if b in due else rung for b, rung in enumerate(here)]
        if there is not None and wanted != here:
            here[:] = wanted
            news.add(there, wanted)
    news.send()


def begin(cache: "QuantizedKVCache") -> bool:
    """Before a step of one token a sequence: all that the host does for it. False: it must be run a layer at a time.

    Raises:
        KVBudgetExceeded, FloatingPointError: as QuantizedKVCache.update, before anything has changed.
    """
    if cache.quiet:
        cache.quiet -= 1
        cache.padding.steps += 1
        return True
    cache.check_whole()
    look_before_packing(cache, 1)
    first, batch_size = cache.layers[0], cache.layers[0].batch_size
    due, settled = due_in(first), True
    if cache.budget is not None and cache.policy is not None:
        settled = prepare(cache, batch_size, 1)
    elif cache.budget is not None:
        check(cache, batch_size, 1)
        more = [int(b in due) for b in range(batch_size)]
        # layers that slide give pages back as they go: all new ones at once may be more than the budget has room for
        if due and any(cache.geometry.sliding) and floor_nbytes(cache, batch_size, more) > cache.budget:
            return False
    take_pages(cache.layers, due)
    cache.padding.steps += 1
    cache.settled = settled
    return True


def finish(cache: "QuantizedKVCache") -> None:
    """After such a step has been given to the device: frees what it was the last to read, and finds out how many steps are quiet."""
    if cache.quiet or cache.settled is None:
        return
    for layer in cache.layers:
        layer.release_passed()
    cache.quiet = quiet_steps(cache) if cache.settled else 0
    cache.settled = None


def quiet_steps(cache: "QuantizedKVCache") -> int:
    """Steps from here on before which no page comes due and no mark is to be asked for, and after which no page goes."""
    first, g = cache.layers[0], cache.geometry
    if g.window == 0:  # the marks are looked at after a page as well
        return 0
    steps = asked_before(cache, steps_to_page(first))
    for sliding in {layer.sliding for layer in cache.layers if layer.sliding}:
        layer = next(x for x in cache.layers if x.sliding == sliding)
        for n, passed in zip(layer.length, layer.passed, strict=True):
            # a page is passed once it is full and lies behind the window of the token that a crop may come back to
            seen = (passed + 1) * g.page_tokens + g.sinks + g.rollback
            steps = min(steps, max(seen + sliding - 1, seen + g.window, n + 1) - n)
    return max(0, steps - 1)


def steps_to_page(layer: "PackedLayer") -> int:
    """1 if the next token brings some sequence a page, 2 if the one after it does, …"""
    g = layer.geometry
    full = g.sinks + g.window + g.page_tokens
    return min(full + len(ids) * g.page_tokens - n for n, ids in zip(layer.length, layer.pages, strict=True))


@contextmanager
def stepping(padding: Padding) -> Iterator[None]:
    """Layers leave their host's state alone while this lasts."""
    padding.stepping = True
    try:
        yield
    finally:
        padding.stepping = False
