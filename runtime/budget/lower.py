"""Makes room in a cache under a byte budget: what the floor policy checks, and what the progressive policy lowers."""

from typing import TYPE_CHECKING, Any

from kvfold.errors import KVBudgetExceeded
from kvfold.exports.account import batch_nbytes, table_entries
from kvfold.runtime.budget.ladder import Plan
from kvfold.runtime.cache.pages import lower, oldest

if TYPE_CHECKING:
    from kvfold.runtime.cache.cache import QuantizedKVCache
    from kvfold.runtime.cache.layer import PackedLayer

GROUP_TOKENS = 1024  # re-quantised at a time while a prompt waits


def check(cache: "QuantizedKVCache", batch_size: int, tokens: int) -> None:
    """Refuses columns that a budget has no room for, all pages on the floor; changes nothing.

    Raises:
        KVBudgetExceeded: in a sentence with the numbers.
    """
    if cache.budget is None:
        return
    seen = cache.get_seq_length()
    if cache.pager is not None:
        need = sum(offload_nbytes(cache, batch_size, tokens))
    elif cache.policy is None:
        pads = cache.padding.columns or [0] * batch_size
        need = batch_nbytes(cache.geometry, cache.formats, [max(0, seen + tokens - pad) for pad in pads], tokens)
    else:
        need = floor_nbytes(cache, batch_size, _due(cache, batch_size, tokens)[2])
    if need > cache.budget:
        raise exceeded(cache, seen + tokens, batch_size, need)


def exceeded(cache: "QuantizedKVCache", tokens: int, batch_size: int, need: int) -> KVBudgetExceeded:
    """The error that says what did not fit."""
    floor = " with all pages at the lowest bits" if cache.policy is not None else ""
    if cache.pager is not None:
        floor = " on the device, with all pages in host memory"
    return KVBudgetExceeded(
        f"{tokens} tokens in {batch_size} sequence(s) need a cache of {need} bytes{floor}, but kv_budget is {cache.budget}; "
        "raise kv_budget, shorten the prompt or make the batch smaller."
    )


def offload_nbytes(cache: "QuantizedKVCache", batch_size: int, tokens: int) -> tuple[int, int]:
    """The least bytes on the device once `tokens` columns have come to a cache whose pages may go to host memory: (fixed, pages and
    staging buffers)."""
    assert cache.pager is not None
    due = _due(cache, batch_size, tokens)[2]
    fixed = sum(_fixed_nbytes(layer, batch_size, due) for layer in cache.layers)
    others = [nbytes for other, nbytes in cache.pager.fixed.items() if other is not cache]
    waiting = sum(due) if tokens == 1 else min(1, sum(due))  # the kernel of a step fills all pages at once
    return max([fixed, *others]), cache.pager.needed(sum(due), waiting)


def push_out(cache: "QuantizedKVCache", batch_size: int, tokens: int) -> None:
    """Before `tokens` columns come to a cache whose pages may go to host memory: moves as many as must go.

    Raises:
        KVBudgetExceeded: it would be too much with all pages in host memory; nothing was changed.
    """
    assert cache.pager is not None and cache.budget is not None
    check(cache, batch_size, tokens)
    due = _due(cache, batch_size, tokens)[2]
    fixed = sum(_fixed_nbytes(layer, batch_size, due) for layer in cache.layers)
    cache.pager.admit(cache, fixed, cache.budget, sum(due))


def make_way(cache: Any, nbytes: int) -> bool:
    """Moves pages to host memory until the cache has `nbytes` left in its budget; False if that can't be."""
    assert cache.pager is not None and cache.budget is not None
    fixed = sum(t.nbytes for layer in cache.layers if layer.is_initialized for t in layer.own_tensors())
    cache.pager.fixed[cache] = fixed
    cache.pager.limit = cache.budget - max(cache.pager.fixed.values())
    if cache.pager.allotted + nbytes <= cache.pager.limit:
        return True
    # with few layers to a buffer all pages in host memory may take more than some: then nothing moves
    return cache.pager.needed(0, 0) + nbytes <= cache.pager.limit and cache.pager.make_room(nbytes)


def prepare(cache: "QuantizedKVCache", batch_size: int, tokens: int) -> bool:
    """Before the progressive policy's cache takes `tokens` columns: lowers pages until they fit, and says which rungs the pages
    that come due are written on. A call that takes no memory, as most decoding steps, lowers ahead for the next page: as many pages as there
    are layers, more only where the steps that are left could not do it else.

    Returns:
        whether nothing is left to be lowered for the pages that come due next.
    Raises:
        KVBudgetExceeded: not even the floor has room; nothing was changed.
    """
    assert cache.policy is not None and cache.budget is not None
    check(cache, batch_size, tokens)
    g, layers = cache.geometry, cache.layers
    have, total, due = _due(cache, batch_size, tokens)
    ahead = [count + 1 for count in due]
    for layer in layers:
        layer.due = []
    takes = any(due) or not layers[0].is_initialized  # memory, in this call
    plan = _plan(cache, batch_size, ahead) if tokens > 1 or not takes else None
    if takes:
        wanted = ahead if plan is not None else due
        plan = plan or _plan(cache, batch_size, due)
        assert plan is not None  # `check` has seen that the floor fits
        for layer, fresh in zip(layers, plan.fresh, strict=True):
            layer.due = rungs_of(fresh, wanted) if any(fresh[:-1]) else []
        carry_out(cache, plan, None)
        return cache.policy.whole_layers
    if plan is None or cache.policy.whole_layers:
        return True
    full = [g.sinks + g.window + (pages + 1) * g.page_tokens for pages in have]
    steps = min(end - n for n, end in zip(total, full, strict=True))  # up to the one that takes the next page
    left = sum(map(sum, plan.moves))
    limit = max(len(layers), -(-left // steps))
    carry_out(cache, plan, limit)
    return left <= limit


def _due(cache: "QuantizedKVCache", batch_size: int, tokens: int) -> tuple[list[int], list[int], list[int]]:
    """Pages that each sequence has, its tokens once `tokens` columns have come, and the pages that it takes for them."""
    first = cache.layers[0]
    lengths = first.length if first.is_initialized else [0] * batch_size
    have = [len(ids) for ids in first.pages] if first.is_initialized else [0] * batch_size
    pads = cache.padding.columns or [0] * batch_size
    total = [n + tokens - min(max(pad - first.columns, 0), tokens) for n, pad in zip(lengths, pads, strict=True)]
    return have, total, [max(0, cache.geometry.num_pages(n) - pages) for n, pages in zip(total, have, strict=True)]


def _plan(cache: "QuantizedKVCache", batch_size: int, pages: list[int]) -> Plan | None:
    assert cache.policy is not None and cache.budget is not None
    counts = [
        layer.pool.counts if layer.is_initialized else [0] * len(rungs)
        for layer, rungs in zip(cache.layers, cache.policy.rungs, strict=True)
    ]
    fixed = sum(_fixed_nbytes(layer, batch_size, pages) for layer in cache.layers)
    resident = sum(layer.pool.nbytes for layer in cache.layers if layer.is_initialized)
    return cache.policy.plan(counts, sum(pages), fixed + resident, cache.budget)


def _fixed_nbytes(layer: "PackedLayer", batch_size: int, pages: list[int]) -> int:
    """Bytes of a layer besides pages, once sequences have so many pages more."""
    g = layer.geometry
    have = [len(ids) for ids in layer.pages] if layer.is_initialized else [0] * batch_size
    entries = max(n + more for n, more in zip(have, pages, strict=True))
    room = table_entries(entries)
    if layer.is_initialized:
        room = max(room, layer.block_table.shape[1])
    return batch_size * (g.table_nbytes(room) + g.segments_nbytes(len(layer.rungs)))


def floor_nbytes(cache: "QuantizedKVCache", batch_size: int, pages: list[int]) -> int:
    """Bytes of the cache with so many more pages a sequence and all of them on the floor."""
    total = sum(_fixed_nbytes(layer, batch_size, pages) for layer in cache.layers)
    for layer in cache.layers:
        if layer.is_initialized:
            total += (sum(pages) + len(layer.pool)) * layer.pool.sizes[0]
        else:
            floor = layer.rungs[0]
            total += sum(pages) * layer.geometry.pair_nbytes(floor.key.format, floor.value.format)
    return total


def rungs_of(fresh: list[int], pages: list[int]) -> list[list[int]]:
    """The rungs of each sequence's new pages: the first of each take the lowest.

    Args:
        fresh: new pages by rung.
        pages: new pages of each sequence, as many in all.
    """
    rungs = iter([rung for rung, count in enumerate(fresh) for _ in range(count)])
    found: list[list[int]] = [[] for _ in pages]
    for i in range(max(pages, default=0)):
        for row, count in zip(found, pages, strict=True):
            if i < count:
                row.append(next(rungs))
    return found


def carry_out(cache: "QuantizedKVCache", plan: Plan, limit: int | None) -> None:
    """Lowers a plan's resident pages in the policy's order; `limit`: pages at the most, None for all."""
    assert cache.policy is not None and cache.budget is not None
    if not any(map(any, plan.moves)):
        return
    left = sum(map(sum, plan.moves)) if limit is None else limit
    room = cache.budget - cache.nbytes
    for step in cache.policy.order:
        if not left:
            break
        layer, count = cache.layers[step.layer], min(left, plan.moves[step.layer][step.rung])
        left -= count
        before, after = layer.pool.sizes[step.rung], layer.pool.sizes[step.rung - 1]
        while count:
            group = max(1, min(count, room // after, GROUP_TOKENS // layer.geometry.page_tokens))
            lower(layer, oldest(layer, step.rung, group))
            room += group * (before - after)
            count -= group


def make_room(cache: "QuantizedKVCache", sequences: int) -> None:
    """Before a batch is put together anew from `sequences` of its own: a layer's 16-bit rows and tables then stand twice.

    Raises:
        KVBudgetExceeded: they don't fit; nothing was changed.
    """
    if cache.budget is None or not cache.layers[0].is_initialized:
        return
    own = [sum(t.nbytes for t in layer.own_tensors()) for layer in cache.layers]
    before = cache.layers[0].batch_size
    after = [nbytes // before * sequences for nbytes in own]
    more = sum(after) - sum(own) if sequences > before else 0
    peak = more + max(map(min, own, after))
    tokens = cache.get_seq_length()
    if cache.pager is not None:
        if not make_way(cache, peak) and sequences > before:
            raise exceeded(cache, tokens, sequences, cache.nbytes + peak)
        return
    if cache.policy is None:
        if sequences > before and cache.nbytes + peak > cache.budget:
            raise exceeded(cache, tokens, sequences, cache.nbytes + peak)
        return
    counts = [layer.pool.counts for layer in cache.layers]
    plan = cache.policy.plan(counts, 0, cache.nbytes + peak, cache.budget)
    if plan is None:
        raise exceeded(cache, tokens, sequences, floor_nbytes(cache, before, [0] * before) + peak)
    carry_out(cache, plan, None)
