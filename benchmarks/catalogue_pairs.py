"""Chooses the pairs of formats of kernels/catalogue.py, by what each costs real models, and says what the choice costs.

usage: python benchmarks/catalogue_pairs.py MODEL [MODEL …] [--bits 2.25] [--size 16] [--limit 6] [--losses] [--check]
                                            [--device auto] [--out artifacts/catalogue]

An attention kernel is compiled for a pair (key format, value format). All pairs of the catalogue's formats are many hundred, so an
artifact of other bits would find none of its own compiled; from a short list that all head_dims share it finds them.

Every model's losses are measured as `kvfold compress` does it, around --bits of payload, and kept in --out (--losses stops there). A list
is then judged by the allocations that it allows at each of BUDGETS: the mean over models and budgets of log(loss / the least loss of all
pairs). Beside the smallest pair and those of the ladder it has --size, added one by one, each time the best, and exchanged for as long as
that helps. --check judges the catalogue's own list instead. Prints, for each model and budget, the loss over that of all pairs: with the whole list, with at most
--limit of it, and with --limit of all pairs.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from runs import budget_for_payload, comparable

from kvfold.compress.allocate import Choice
from kvfold.compress.allocate_shared import allocate_shared
from kvfold.compress.models import quiet_transformers
from kvfold.compress.pipeline import calibrated_by
from kvfold.compress.plan import make_plan, pick_device
from kvfold.compress.recipe import Recipe
from kvfold.compress.search import measure
from kvfold.compress.work import fingerprint
from kvfold.kernels.catalogue import LADDER, PAIRS, named_keys, named_values

BUDGETS = (1.5, 1.75, 1.93, 2.1, 2.25, 2.5, 2.75, 3.2, 3.7, 4.2, 5.0, 6.5)  # bits of payload
HALVINGS = 40  # of the interval that the price of a bit lies in
UNIT = 1 << 20  # bytes of a bit, where whole numbers are asked for


@dataclass(frozen=True)
class Table:
    """One model's losses of every pair: float64 [layers, pairs], with the pairs' payload bits, keys and values together: [pairs]."""

    model: str
    names: list[str]
    loss: np.ndarray
    bits: np.ndarray


def losses_of(model: str, bits: float, device: str, out: Path) -> dict:
    """Losses of every format of each layer's keys and values, by the catalogue's names; read where an earlier run left them."""
    recipe = comparable(Recipe())
    plan, target = make_plan(model, budget_for_payload(model, recipe, bits), None, recipe, None), pick_device(device)
    path = out / f"losses-{Path(model).name}-{bits:g}.json"
    if path.is_file():
        return json.loads(path.read_text())
    work = out / fingerprint(calibrated_by(plan, target))[:16]
    work.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        found = measure(plan, work, target)
    dim = plan.geometry.head_dim
    sides = {}
    groups = (
        ("key", found.keys, found.key_losses, named_keys(dim)),
        ("value", found.values, found.value_losses, named_values(dim)),
    )
    for side, candidates, losses, names in groups:
        name = {fmt: name for name, fmt in names.items()}
        sides[side] = [
            {name[c.spec.format]: loss for c, loss in zip(row, own, strict=True)}
            for row, own in zip(candidates, losses, strict=True)
        ]
    table = {"head_dim": dim, **sides}
    path.write_text(json.dumps(table), encoding="utf-8")
    return table


def table_of(model: str, losses: dict) -> Table:
    keys, values = (
        {name: fmt.payload_bits for name, fmt in named(losses["head_dim"]).items()}
        for named in (named_keys, named_values)
    )
    pairs = [(k, v) for k in losses["key"][0] for v in losses["value"][0]]
    loss = [
        [own_k[k] + own_v[v] for k, v in pairs] for own_k, own_v in zip(losses["key"], losses["value"], strict=True)
    ]
    bits = [keys[k] + values[v] for k, v in pairs]
    return Table(Path(model).name, [f"{k}/{v}" for k, v in pairs], np.array(loss), np.array(bits))


def priced(loss: np.ndarray, bits: np.ndarray, target: float) -> tuple[float, float, float]:
    """(the Lagrangian bound of the least mean loss with at most `target` mean bits, the price of a bit, mean loss at 0 bits' price)."""
    low, high, best = 0.0, 1.0, -np.inf
    if bits.min() > target:
        return np.inf, 0.0, np.inf
    while _mean_bits(loss, bits, high) > target:
        high *= 4
    price = high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _mean_bits(loss, bits, middle) > target:
            low = middle
        else:
            high = middle
    for at in (low, high):
        bound = (loss + at * bits).min(1).mean() - at * target
        if bound > best:
            best, price = bound, at
    return float(best), float(price), float(loss.min(1).mean())


def _mean_bits(loss: np.ndarray, bits: np.ndarray, price: float) -> float:
    return float(bits[(loss + price * bits).argmin(1)].mean())


class Judge:
    """What lists of pairs cost, over models and budgets."""

    def __init__(self, tables: list[Table]) -> None:
        self.tables = tables
        self.names = [name for name in tables[0].names if all(name in t.names for t in tables)]
        self.problems = []
        for table in tables:
            place = {name: i for i, name in enumerate(table.names)}
            order = [place[name] for name in self.names]
            for target in BUDGETS:
                loss, bits = table.loss[:, order], table.bits[order]
                self.problems.append((loss, bits, 2 * target, priced(loss, bits, 2 * target)[0]))

    def cost(self, used: list[int]) -> float:
        """Mean logarithm of the loss over the least loss; where a budget is out of reach, of what 20 bits more would cost."""
        return float(np.mean([self._log(problem, used) for problem in self.problems]))

    @staticmethod
    def _log(problem: tuple, used: list[int]) -> float:
        loss, bits, target, least = problem
        found = priced(loss[:, used], bits[used], target)[0]
        return 3.0 if not np.isfinite(found) else float(np.log(max(found, 1e-12) / max(least, 1e-12)))

    def gains(self, used: list[int]) -> np.ndarray:
        """How much lower the cost's bound is with one pair more, at the prices of now: float64 [pairs]."""
        gain = np.zeros(len(self.names))
        for loss, bits, target, _ in self.problems:
            value, price, _ = priced(loss[:, used], bits[used], target)
            if not np.isfinite(value):
                gain += np.where(bits <= target, 1.0, 0.0)
                continue
            all_cells = loss + price * bits
            now = all_cells[:, used].min(1, keepdims=True)
            after = np.minimum(all_cells, now).mean(0) - price * target
            gain += np.log(max(value, 1e-12) / np.maximum(after, 1e-3 * max(value, 1e-12)))
        return gain / len(self.problems)


def chosen(judge: Judge, size: int, fixed: list[int], tries: int = 24) -> list[int]:
    """`size` pairs beside the `fixed` ones: added one by one, then exchanged."""
    used = list(fixed)

    def best_addition(now: list[int]) -> tuple[float, int]:
        order = np.argsort(-judge.gains(now), kind="stable")[:tries]
        return min((judge.cost([*now, int(p)]), int(p)) for p in order if p not in now)

    while len(used) < len(fixed) + size:
        used.append(best_addition(used)[1])
    cost = judge.cost(used)
    improved = True
    while improved:
        improved = False
        for out in [p for p in used if p not in fixed]:
            rest = [p for p in used if p != out]
            found, p = best_addition(rest)
            if found < cost - 1e-5:
                used, cost, improved = [*rest, p], found, True
    return used


def limited(problem: tuple, used: list[int], limit: int) -> float:
    """The least mean loss with at most `limit` of the used pairs: the search's own allocation."""
    loss, bits, target, _ = problem
    rows = [[Choice(int(b * UNIT), float(x)) for b, x in zip(bits[used], row[used], strict=True)] for row in loss]
    found = allocate_shared(rows, [used] * len(loss), int(target * UNIT * len(loss)), limit)
    return float(np.mean([row[c].loss for row, c in zip(rows, found, strict=True)]))


def report(judge: Judge, used: list[int], limit: int) -> str:
    """Markdown: losses over those of all pairs."""
    lines = [
        f"| model | bits | {len(used)} pairs | at most {limit} of them | {limit} of all |",
        "|---|---|---|---|---|",
    ]
    places = [(t.model, b) for t in judge.tables for b in BUDGETS]
    everything, logs = list(range(len(judge.names))), []
    for (model, target), problem in zip(places, judge.problems, strict=True):
        least = problem[3]
        row = [priced(problem[0][:, used], problem[1][used], problem[2])[0], limited(problem, used, limit)]
        row.append(limited(problem, everything, limit))
        logs.append([np.log(x / least) for x in row])
        lines.append(f"| {model} | {target:g} | " + " | ".join(f"{x / least:.3f}" for x in row) + " |")
    mean = np.exp(np.mean(logs, 0))
    lines.append("| mean | | " + " | ".join(f"{x:.3f}" for x in mean) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--bits", type=float, default=2.25)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--limit", type=int, default=6)
    parser.add_argument("--losses", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("artifacts/catalogue"))
    options = parser.parse_args()
    quiet_transformers()
    options.out.mkdir(parents=True, exist_ok=True)
    losses = {model: losses_of(model, options.bits, options.device, options.out) for model in options.models}
    if options.losses:
        return
    judge = Judge([table_of(model, found) for model, found in losses.items()])
    place = {name: i for i, name in enumerate(judge.names)}
    if options.check:
        used = [place[name] for name in PAIRS]
    else:
        smallest = int(np.argmin(judge.problems[0][1]))
        used = chosen(judge, options.size, [smallest, *(place[name] for name in LADDER if name in place)])
        used.sort(key=lambda p: judge.problems[0][1][p])
        print("\n".join(f'    "{judge.names[p]}",' for p in used))
    print(report(judge, used, options.limit))


if __name__ == "__main__":
    main()
