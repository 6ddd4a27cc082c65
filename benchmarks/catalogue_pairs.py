"""Chooses the pairs of formats of kernels/catalogue.py, by what real models take, and says what the
list costs.

usage: python benchmarks/catalogue_pairs.py MODEL [MODEL …] [--bits 2.25] [--size 48] [--limit 8] [--losses] [--check]
                                            [--device auto] [--out artifacts/catalogue]

An attention kernel is compiled for a pair (key format, value format). All pairs of the catalogue's
formats are many hundred, so an artifact of other bits would find none of its own compiled; from a
short list that all head_dims share it finds them.

Every model's losses are measured as `kvfold compress` does it, around --bits of payload, and kept
in --out (--losses stops there). At each of BUDGETS the search's own allocation takes the best
CHOSEN of all pairs for each model; the list has the --size pairs that the most layers take so, the
smallest pair with the fewest channels left out, and those of the ladder. --check judges the
catalogue's own list instead. Prints, for each model and budget, the loss over that of any number of
all pairs: with at most --limit of the list, and of all.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kvfold.compress.bench.runs import budget_for_payload, comparable
from kvfold.compress.models import quiet_transformers
from kvfold.compress.pipeline import calibrated_by, statistics_folder
from kvfold.compress.plan import make_plan, pick_device
from kvfold.compress.recipe import Recipe
from kvfold.compress.search import measure
from kvfold.compress.search.allocate import Choice, allocate
from kvfold.compress.search.allocate_shared import allocate_shared
from kvfold.kernels.catalogue import LADDER, PAIRS, named_keys, named_values
from kvfold.kernels.formats import Format

BUDGETS = (1.5, 1.93, 2.25, 2.5, 3.2, 4.2, 6.5)  # bits of payload that lists are chosen for
BETWEEN = (1.75, 2.1, 2.75, 3.7, 5.0)  # and that they are judged at besides
CHOSEN = 6
UNIT = 1 << 20  # bytes of a bit, where whole numbers are asked for


@dataclass(frozen=True)
class Table:
    """One model's losses of every pair: float64 [layers, pairs], with the pairs' payload bits, keys
    and values together: [pairs]."""

    model: str
    names: list[str]
    loss: np.ndarray
    bits: np.ndarray


def losses_of(model: str, bits: float, device: str, out: Path) -> dict:
    """Losses of every format of each layer's keys and values, by the catalogue's names; read where
    an earlier run left them."""
    recipe = comparable(Recipe())
    plan, target = (
        make_plan(model, budget_for_payload(model, recipe, bits), None, recipe, None),
        pick_device(device),
    )
    path = out / f"losses-{Path(model).name}-{bits:g}.json"
    if path.is_file():
        return json.loads(path.read_text())
    work = statistics_folder(calibrated_by(plan, target), out)
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
        [own_k[k] + own_v[v] for k, v in pairs]
        for own_k, own_v in zip(losses["key"], losses["value"], strict=True)
    ]
    bits = [keys[k] + values[v] for k, v in pairs]
    return Table(Path(model).name, [f"{k}/{v}" for k, v in pairs], np.array(loss), np.array(bits))


def allocation(table: Table, used: list[int], bits: float, limit: int) -> list[int]:
    """The pair of each layer in the search's own allocation: at most `limit` of the used ones, 0
    for any number."""
    rows = [
        [Choice(int(b * UNIT), float(x)) for b, x in zip(table.bits[used], row[used], strict=True)]
        for row in table.loss
    ]
    room = int(2 * bits * UNIT * len(rows))
    found = (
        allocate_shared(rows, [used] * len(rows), room, limit) if limit else allocate(rows, room)
    )
    return [used[c] for c in found]


def cost(table: Table, found: list[int]) -> float:
    return float(table.loss[np.arange(len(found)), found].sum())


def smallest(head_dim: int) -> str:
    """The pair of the fewest bits, and of those that with the fewest channels left out."""

    def size(name: str, named: dict[str, Format]) -> tuple[float, int]:
        fmt = named[name]
        return fmt.payload_bits, sum(channels for channels, levels in fmt.classes if not levels)

    return "/".join(
        min(named, key=lambda n, named=named: size(n, named))
        for named in (named_keys(head_dim), named_values(head_dim))
    )


def chosen(tables: list[Table], size: int) -> list[str]:
    """The list's names, bits rising; pairs that one of the models lacks are left out."""
    taken: Counter[str] = Counter()
    for table in tables:
        every = list(range(len(table.names)))
        for bits in BUDGETS:
            found = allocation(table, every, bits, CHOSEN)
            for p in found:
                taken[table.names[p]] += 1 / len(found)
    names = [name for name, _ in taken.most_common(size)]
    names += [
        name for name in (smallest(64), *LADDER) if name in tables[0].names and name not in names
    ]
    bits = dict(zip(tables[0].names, tables[0].bits.tolist(), strict=True))
    return sorted(names, key=lambda name: (bits[name], name))


def report(tables: list[Table], names: list[str], limit: int) -> str:
    """Markdown: losses over those of any number of all pairs."""
    lines = [
        f"| model | bits | at most {limit} of the {len(names)} | at most {limit} of all |",
        "|---|---|---|---|",
    ]
    logs = []
    for table in tables:
        every, place = (
            list(range(len(table.names))),
            {name: i for i, name in enumerate(table.names)},
        )
        listed = [place[name] for name in names]
        for bits in sorted((*BUDGETS, *BETWEEN)):
            least = cost(table, allocation(table, every, bits, 0))
            row = [
                cost(table, allocation(table, used, bits, limit)) / least
                for used in (listed, every)
            ]
            logs.append(np.log(row))
            lines.append(
                f"| {table.model} | {bits:g} | " + " | ".join(f"{x:.3f}" for x in row) + " |"
            )
    lines.append("| mean | | " + " | ".join(f"{x:.3f}" for x in np.exp(np.mean(logs, 0))) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--bits", type=float, default=2.25)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--losses", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("artifacts/catalogue"))
    options = parser.parse_args()
    quiet_transformers()
    options.out.mkdir(parents=True, exist_ok=True)
    losses = {
        model: losses_of(model, options.bits, options.device, options.out)
        for model in options.models
    }
    if options.losses:
        return
    tables = [table_of(model, found) for model, found in losses.items()]
    names = list(PAIRS) if options.check else chosen(tables, options.size)
    if not options.check:
        print(" ".join(names))
    print(report(tables, names, options.limit))


if __name__ == "__main__":
    main()
