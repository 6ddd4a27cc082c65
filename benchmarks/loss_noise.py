"""How a search's second-order losses depend on the positions that are added up before squaring, and how
they scatter.

usage: python benchmarks/loss_noise.py MODEL [--budget 2.5] [--layers 12] [--directions 64]

For the candidates that a search measures, of the last layers, on two passages of 1024 tokens: the
geometric mean of their losses from all directions over those from products that are added up over
whole passages, and the standard deviation of the losses' logarithm from groups of four and of eight
directions, for spans of several lengths (compress/search/fisher.py).
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfold.compress.models import quiet_transformers
from kvfold.compress.plan import make_plan, pick_device
from kvfold.compress.recipe import Recipe, load_recipe
from kvfold.compress.search import measure, target_bits
from kvfold.compress.search.extrapolation import layer_jobs
from kvfold.compress.search.fisher import Sweep
from kvfold.compress.search.sensitivity import specs_of

SPANS = (1, 16, 32, 64, 1024)
GROUPS = (4, 8)


def losses(products: list[Tensor], span: int) -> Tensor:
    """Nats of one candidate, summed over positions and heads, by direction: float64 [directions].

    Args:
        products: of each passage, float32 [directions, Hkv, n].
        span: positions that are added up before squaring.
    """
    spans = [pad(x, (0, -x.shape[-1] % span)).unflatten(-1, (-1, span)) for x in products]
    each = [x.sum(-1).double().square().sum((1, 2)) / 2 for x in spans]
    return torch.stack(each).sum(0)


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--budget", default="2.5")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--directions", type=int, default=64)
    o = parser.parse_args()
    quiet_transformers()
    recipe = load_recipe().model_dump(mode="json")
    recipe["calibration"] |= {"num_sequences": 2, "seq_len": 1024}
    recipe["sensitivity"] |= {"num_sequences": 2, "directions": 1, "conversations": 0}
    plan = make_plan(o.model, o.budget, None, Recipe.model_validate(recipe), None)
    with tempfile.TemporaryDirectory() as work:
        x = measure(plan, Path(work), pick_device("auto"))
    sweep = Sweep(x.probe, x.near, o.directions, plan.recipe.seed)
    found: dict[int, list[Tensor]] = {span: [] for span in SPANS}
    for layer in range(plan.num_layers)[: -o.layers - 1 : -1]:
        seen = sweep.at(layer)
        jobs = layer_jobs(layer, x.keys[layer], x.values[layer], target_bits(plan), 2)
        for side, _, c in jobs:
            specs = specs_of(side, x.keys, x.values, layer, c)
            specs = {name: part.to(x.probe.device) for name, part in specs.items()}
            products = [one.products(x.near, specs) for one in seen]
            for span in SPANS:
                found[span].append(losses(products, span))
    means = {span: torch.stack(rows) for span, rows in found.items()}  # [candidates, directions]
    whole = means[SPANS[-1]].mean(1).log()
    titles = " | ".join(f"scatter from {count}" for count in GROUPS)
    print(f"| positions | loss over whole | {titles} |\n|{'---|' * (2 + len(GROUPS))}")
    for span, rows in means.items():
        ratio = float((rows.mean(1).log() - whole).mean().exp())
        logs = [rows.unflatten(1, (-1, count)).mean(-1).log() for count in GROUPS]
        scatter = " | ".join(f"{float(x.std(1).square().mean().sqrt()):.2f}" for x in logs)
        print(f"| {'all' if span == SPANS[-1] else span} | {ratio:.2f} | {scatter} |")


if __name__ == "__main__":
    main()
