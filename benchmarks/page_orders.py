"""Orders in which single pages go down a layer's ladder, for benchmarks/salience.py: by age, and by
what queries attend to.

`Watched` is the reference backend, which adds up attention weights by page; `Ordered` a policy that
lowers any page of one sequence, which the product's tables and kernels can't have: there the pages
of one format lie in a run.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.attention import KeyMean
from kvfold.kernels.kinds.interface import levels_of
from kvfold.runtime.backends.base import LayerTensors, LoweredPages, RowView
from kvfold.runtime.backends.reference import Reference, read_pages
from kvfold.runtime.budget.ladder import ladder as coarse_ladder
from kvfold.runtime.budget.ladder import widened
from kvfold.runtime.budget.progressive import Progressive

PAGE_ENTRY = 4  # bytes of a page's place in an order by which kernels would find it
GONE = -1  # the rung of a page that is dropped


class Watched(Reference):
    """The reference, which adds up what queries attend to, and hides pages that are dropped.

    Attributes:
        queries: the last so many of a call are watched; 0 for none.
        seen: by layer, [3, pages]; see `page_weights`.
        hidden: by layer, page numbers of the sequence that nobody sees.
    """

    def __init__(self) -> None:
        self.queries = 0
        self.seen: dict[int, Tensor] = {}
        self.hidden: dict[int, list[int]] = {}

    def attend(self, layer, rows, query, scaling, options, mask):  # type: ignore[no-untyped-def]
        if self.queries:
            self.seen[layer.layer_idx] = page_weights(
                layer, rows[0], query[0, :, -self.queries :], scaling
            )
        if hidden := self.hidden.get(layer.layer_idx):
            g, row = layer.geometry, rows[0]
            columns = torch.arange(row.length)
            page = (columns - g.sinks).div(g.page_tokens, rounding_mode="floor")
            shown = ~torch.isin(page, torch.tensor(hidden))
            mask = ((columns <= row.positions[:, None]) & shown)[None, None]
        return super().attend(layer, rows, query, scaling, options, mask)


def page_weights(layer: LayerTensors, row: RowView, query: Tensor, scaling: float) -> Tensor:
    """What queries [num_heads, T, head_dim] of one sequence attend to, added up over queries and
    heads: weights, squared weights and squared sums of each page's weights, float32 [3, pages],
    pages that are in the window yet included."""
    g, key = layer.geometry, layer.spec.key
    before = row.pages[: row.packed_before // g.page_tokens]
    parts = [row.keys[:, : g.sinks].float()]
    if before:
        parts.append(read_pages(layer.pages, before, layer.rungs, g)[0])
    keys = torch.cat([*parts, row.keys[:, g.sinks :].float()], 1)  # [Hkv, n, D] by position
    places = torch.arange(row.length)
    q = key.apply_query(query[None])[0] * scaling
    scores = (q.view(g.num_kv_heads, -1, g.head_dim) @ keys.mT).view(*q.shape[:2], -1)
    if key.turns:
        tables = key.tables(g.sinks)
        turning = KeyMean(tables, tables.coefficients(key.offset, query) * scaling)
        scores += turning.logits(slice(None), places)
    scores.masked_fill_(places > row.positions[-query.shape[1] :, None], -torch.inf)
    weights = scores.softmax(-1)[:, :, g.sinks :]
    whole = -(-weights.shape[-1] // g.page_tokens) * g.page_tokens
    weights = torch.nn.functional.pad(weights, (0, whole - weights.shape[-1]))
    by_page = weights.unflatten(-1, (-1, g.page_tokens))
    return torch.stack(
        (
            by_page.sum((0, 1, 3)),
            by_page.square().sum((0, 1, 3)),
            by_page.sum(-1).square().sum((0, 1)),
        )
    )


def lower(layer: Any, row: list[int], known: dict[tuple[int, int], Tensor], prompt: int) -> None:
    """Lowers the pages of a layer to the rungs `row`, each at once; `known`: what the first
    `prompt` pages hold when they come from 16 bits, by page and rung, found once for all orders."""
    pool, ids, top = layer.table.pool, layer.table.sequences[0].pages, len(layer.rungs) - 1
    for source in range(top, 0, -1):
        for target in range(source):
            here = [p for p, n in enumerate(ids) if pool.rung(n) == source and row[p] == target]
            old = [pool.page(ids[p]) for p in here]
            if here:
                pool.lower([ids[p] for p in here], target)
            cached = source == top
            fresh = [j for j, p in enumerate(here) if not cached or (p, target) not in known]
            if fresh:
                parts = [old[j] for j in fresh], [pool.page(ids[here[j]]) for j in fresh]
                work = LoweredPages(*parts, layer.rungs[source], layer.rungs[target])
                layer.held.backend.lower_pages(layer.geometry, [work])
            for j, p in enumerate(here):
                if j not in fresh:
                    pool.page(ids[p]).copy_(known[p, target])
                elif cached and p < prompt:
                    known[p, target] = pool.page(ids[p]).clone()


def fine_ladder(spec: LayerSpec) -> tuple[LayerSpec, ...]:
    """The policy's ladder with a rung more above the floor, where each class has a bit more."""
    floor, *rest = coarse_ladder(spec)
    finer = []
    for side in (floor.key.format, floor.value.format):
        bits = sum(n * math.log2(max(levels, 1)) for n, levels in side.classes) / side.head_dim
        finer.append(widened(side, math.floor(bits * 4 + 1) / 4))
    key, value = finer
    first = rest[0]
    if key.payload_bits + value.payload_bits >= (
        first.key.format.payload_bits + first.value.format.payload_bits
    ):
        return floor, *rest
    return floor, LayerSpec(KeySpec(key), ValueSpec(value)), *rest


class Ordered(Progressive):
    """Lowers single pages in any order, to bytes that grow with the pages.

    Attributes:
        order: a row of salience.py; "" for pages in 16 bits.
        scores: by layer, [pages], relative to the layer's mean; later pages have the last one's.
        lost: by layer and page, what becomes of a page's part of the loss if it goes altogether,
            before the floor's error is divided out.
        losses: of each layer's keys and values on the floor, nats.
        page_nbytes: what a page of all layers together may take, entries in an order included.
        fixed_nbytes: of that, taken by tables.
        nbytes_now: what pages and entries take.
        known, prompt_pages: see `lower`.
    """

    order, prompt_pages = "", 0
    page_nbytes = fixed_nbytes = nbytes_now = 0.0
    scores: Sequence[Tensor] = ()
    lost: Sequence[list[float]] = ()
    losses: Sequence[tuple[float, float]] = ()
    known: dict[int, dict[tuple[int, int], Tensor]]

    def copy(self) -> "Ordered":
        other = Ordered(self.limit, self.ladders)
        other.__dict__.update(self.__dict__)
        return other

    def admit(self, layers, batch_size, tokens):  # type: ignore[no-untyped-def]
        for layer in layers:
            layer.plan([])
        if not self.order:
            return True
        g = layers[0].geometry
        have = len(layers[0].table.sequences[0].pages)
        total = max(have, g.num_pages(layers[0].get_seq_length() + tokens))
        hidden = layers[0].backend.hidden
        rungs = [
            [
                GONE if p in hidden.get(i, ()) else layer.table.pool.rung(number)
                for p, number in enumerate(layer.table.sequences[0].pages)
            ]
            + [len(layer.rungs) - 1] * (total - have)
            for i, layer in enumerate(layers)
        ]
        self.nbytes_now = self.lower(rungs, self.page_nbytes * total - self.fixed_nbytes)
        for i, (layer, row) in enumerate(zip(layers, rungs, strict=True)):
            lower(
                layer,
                [max(rung, 0) for rung in row],
                self.known.setdefault(i, {}),
                self.prompt_pages,
            )
            hidden[i] = [p for p, rung in enumerate(row) if rung == GONE]
            layer.table._cuts = None
            layer.plan([[max(rung, 0) for rung in row[have:]]])
        return True

    def lower(self, rungs: list[list[int]], limit: float) -> float:
        """Takes pages down, in `rungs` [layer][page], until they fit; returns their bytes."""
        sizes = self.ladders.sizes
        total = sum(
            sizes[i][r] + PAGE_ENTRY for i, row in enumerate(rungs) for r in row if r != GONE
        )
        for _, above, i, p in sorted(self.steps(rungs)):
            if total <= limit:
                break
            r = -above
            if rungs[i][p] != r:
                continue
            rungs[i][p] = r - 1
            total -= sizes[i][r] - sizes[i][r - 1] if r else sizes[i][0] + PAGE_ENTRY
        return total

    def steps(self, rungs: list[list[int]]) -> list[tuple[float, int, int, int]]:
        """(key, − rung to leave, layer, page) of all steps; the least go first."""
        found = []
        for place, step in enumerate(self.ladders.order):
            i, r, count = step.layer, step.rung, len(rungs[step.layer])
            known = self.scores[i]
            late = known[-1:].expand(max(0, count - len(known)))
            score = torch.cat((known, late))[:count].tolist()
            if self.order in ("age", "uniform"):
                keys = [place + p / count for p in range(count)]
            else:
                keys = [step.harm * x for x in score]
                if self.order.startswith("monotone"):
                    keys = rising_means(keys)
            found += [(key, -r, i, p) for p, key in enumerate(keys)]
            if self.order == "drop" and r == 1:
                gone = self.drop_harm(i)
                lost = self.lost[i] + self.lost[i][-1:] * count
                found += [(max(gone * lost[p], keys[p]), 0, i, p) for p in range(count)]
        return found

    def drop_harm(self, i: int) -> float:
        """Nats per freed byte of a layer's floor pages that go altogether: 0 bits have an error of
        1, the floor's is known."""
        floor = self.ladders.rungs[i][0]
        more = 0.0
        for fmt, loss in zip((floor.key.format, floor.value.format), self.losses[i], strict=True):
            inverse = [1 / fmt.kind.error(levels) for levels in levels_of(fmt)]
            more += loss * (sum(inverse) / len(inverse) - 1)
        return more / self.ladders.sizes[i][0]


def rising_means(keys: Sequence[float]) -> list[float]:
    """Keys in an order that takes older pages first: pages that must go together with a younger one
    have the mean of both (isotonic regression)."""
    blocks: list[tuple[float, int]] = []
    for key in keys:
        mean, count = key, 1
        while blocks and blocks[-1][0] >= mean:
            last, n = blocks.pop()
            mean, count = (mean * count + last * n) / (count + n), count + n
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]
