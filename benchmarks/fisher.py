"""How well losses to second order (compress/search/fisher.py) foretell those that a forward pass
measures.

usage: python benchmarks/fisher.py MODEL [--budget 2.5] [--layers 0,3,12] [--directions 4] [--work DIR]

For the candidates that a search of the default recipe measures, of the layers named: both losses in
nats, their ratio, and the seconds that each way took. --work keeps the calibration and all losses
for another call.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch

from kvfold.compress.models import quiet_transformers
from kvfold.compress.plan import make_plan, pick_device
from kvfold.compress.recipe import Recipe, load_recipe
from kvfold.compress.search import measure, target_bits
from kvfold.compress.search.extrapolation import probed
from kvfold.compress.search.sensitivity import measured


@torch.no_grad()
def compare(model: str, budget: str, layers: list[int], directions: int, work: Path) -> None:
    """Prints the table."""
    recipe = load_recipe().model_dump(mode="json")
    recipe["sensitivity"] |= {"method": "fisher", "directions": directions}
    plan = make_plan(model, budget, None, Recipe.model_validate(recipe), None)
    start = time.perf_counter()
    x = measure(plan, work, pick_device("auto"))
    print(
        f"all candidates to second order, calibration included: {time.perf_counter() - start:.0f} s"
    )
    bits, count = target_bits(plan), plan.recipe.sensitivity.probes
    sides = (("key", x.keys, x.key_losses), ("value", x.values, x.value_losses))
    jobs = [
        (side, i, c)
        for i in layers
        for side, groups, _ in sides
        for c in probed(groups[i], bits, count)
    ]
    start = time.perf_counter()
    found = measured(x.probe, jobs, x.keys, x.values, x.near, work)
    print(f"{len(jobs)} candidates by a forward pass each: {time.perf_counter() - start:.0f} s\n")
    print("| layer, side, format | measured | second order | ratio |\n|---|---|---|---|")
    ratios = []
    for side, groups, losses in sides:
        for job in [job for job in jobs if job[0] == side]:
            _, layer, c = job
            ratios.append(math.log(losses[layer][c] / found[job]))
            name = f"{layer}, {side}, {groups[layer][c].spec.format}"
            print(
                f"| {name} | {found[job]:.2e} | {losses[layer][c]:.2e} | {math.exp(ratios[-1]):.2f} |"
            )
    mean = sum(ratios) / len(ratios)
    spread = math.sqrt(sum((r - mean) ** 2 for r in ratios) / len(ratios))
    print(
        f"\ngeometric mean of the ratios {math.exp(mean):.2f}, spread of their logarithms {spread:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--budget", default="2.5")
    parser.add_argument("--layers", default="0,3,12")
    parser.add_argument("--directions", type=int, default=4)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    quiet_transformers()
    layers = [int(text) for text in options.layers.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        compare(options.model, options.budget, layers, options.directions, work)


if __name__ == "__main__":
    main()
