"""The progressive policy: pages start in 16 bits and go down their layers' ladders as the budget
fills."""

from collections.abc import Sequence

from kvfold.exports.spec import LayerSpec
from kvfold.runtime.budget.base import (
    Layers,
    Policy,
    coming,
    fixed_nbytes,
    floor_nbytes,
    pages_nbytes,
    regroup_nbytes,
)
from kvfold.runtime.budget.ladder import Ladders, Plan
from kvfold.runtime.cache.store import Lowering

GROUP_TOKENS = 1024  # of a layer, re-quantised at a time by the reference


class Progressive(Policy):
    """Lowers pages, the least harmful first.

    Args:
        budget: bytes that the cache may never pass.
        ladders: of its layers, and the order in which pages go down them.
    """

    keeps_pages = False
    floor = " with all pages at the lowest bits"

    def __init__(self, budget: int, ladders: Ladders) -> None:
        super().__init__(budget)
        self.ladders = ladders

    @property
    def limit(self) -> int:
        """The budget, of which this policy always has one."""
        assert self.budget is not None
        return self.budget

    def specs(self, specs: Sequence[LayerSpec]) -> list[tuple[LayerSpec, ...]]:
        return self.ladders.rungs

    def copy(self) -> Policy:
        return Progressive(self.limit, self.ladders)

    def need(self, layers: Layers, batch_size: int, tokens: int) -> int:
        return floor_nbytes(layers, batch_size, coming(layers, batch_size, tokens)[2])

    def admit(self, layers: Layers, batch_size: int, tokens: int) -> bool:
        """Lowers pages until the new ones fit, and plans which rungs those are written on. Steps
        that allocate nothing, as most do, lower a few pages ahead (about one a layer), so that the
        next allocation does not stall; more only where the steps that are left could not do it
        else."""
        self.check(layers, batch_size, tokens)
        g = layers[0].geometry
        have, total, due = coming(layers, batch_size, tokens)
        ahead = [count + 1 for count in due]
        for layer in layers:
            layer.plan([])
        takes = any(due) or not layers[0].is_initialized  # memory, in this call
        plan = self._plan(layers, batch_size, ahead) if tokens > 1 or not takes else None
        if takes:
            wanted = ahead if plan is not None else due
            plan = plan or self._plan(layers, batch_size, due)
            assert plan is not None  # `check` has seen that the floor fits
            for layer, fresh in zip(layers, plan.fresh, strict=True):
                layer.plan(rungs_of(fresh, wanted) if any(fresh[:-1]) else [])
            self._carry_out(layers, plan, None)
            return self.ladders.whole_layers
        if plan is None or self.ladders.whole_layers:
            return True
        full = [g.sinks + g.window + (pages + 1) * g.page_tokens for pages in have]
        steps = min(
            end - n for n, end in zip(total, full, strict=True)
        )  # up to the one that takes the next page
        left = sum(map(sum, plan.moves))
        limit = max(len(layers), -(-left // steps))
        self._carry_out(layers, plan, limit)
        return left <= limit

    def regroup(self, layers: Layers, sequences: int) -> None:
        if not layers[0].is_initialized:
            return
        peak = regroup_nbytes(layers, sequences)
        counts = [layer.table.pool.counts for layer in layers]
        plan = self.ladders.plan(counts, 0, self.nbytes(layers) + peak, self.limit)
        if plan is None:
            before = layers[0].batch_size
            need = floor_nbytes(layers, before, [0] * before) + peak
            raise self.exceeded(layers, layers[0].get_seq_length(), sequences, need)
        self._carry_out(layers, plan, None)

    def _plan(self, layers: Layers, batch_size: int, pages: list[int]) -> Plan | None:
        counts = [
            layer.table.pool.counts if layer.is_initialized else [0] * len(rungs)
            for layer, rungs in zip(layers, self.ladders.rungs, strict=True)
        ]
        nbytes = fixed_nbytes(layers, batch_size, pages) + pages_nbytes(layers)
        return self.ladders.plan(counts, sum(pages), nbytes, self.limit)

    def _carry_out(self, layers: Layers, plan: Plan, limit: int | None) -> None:
        """Lowers a plan's resident pages in the ladders' order, as many together as there is room
        for; `limit`: pages at the most, None for all. What goes down several rungs at once, as
        before a long prompt's next chunk, is re-quantised once."""
        left = sum(map(sum, plan.moves))
        if not left:
            return
        left = left if limit is None else min(left, limit)
        wanted: list[tuple[int, int, int]] = []  # layer, rung, pages
        moves = [[0] * len(row) for row in plan.moves]
        for step in self.ladders.order:
            count = min(left, plan.moves[step.layer][step.rung])
            if count:
                wanted.append((step.layer, step.rung, count))
                moves[step.layer][step.rung] = count
                left -= count
        batch_size = layers[0].batch_size
        fixed = fixed_nbytes(layers, batch_size, [0] * batch_size)
        room = self.limit - fixed - pages_nbytes(layers)
        most = GROUP_TOKENS // layers[0].geometry.page_tokens
        far = {
            i
            for i, row in enumerate(moves)
            if any(
                row[rung] and row[rung - 1] > layers[i].table.pool.counts[rung - 1]
                for rung in range(2, len(row))
            )
        }
        with Lowering() as lowering:

            def lower(layer: int, ids: list[int], to: int) -> None:
                nonlocal room
                held, after = layers[layer].held, self.ladders.sizes[layer][to]
                while ids:
                    if room < after:
                        room += lowering.carry_out()
                    group = max(1, min(len(ids), room // after, most))
                    room += lowering.add(held, ids[:group], to) - group * after
                    ids = ids[group:]

            for layer in far:
                for _, to, ids in layers[layer].table.descents(moves[layer]):
                    lower(layer, ids, to)
            for layer, rung, count in wanted:
                if layer not in far:
                    lower(layer, layers[layer].table.oldest(rung, count), rung - 1)


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
