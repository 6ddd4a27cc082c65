"""What it is worth to take a pair's rotating mean off keys only where that helps
(compress/centers.py): measured distortion of logits.

usage: python benchmarks/centers.py MODEL [--layers 0,1,5] [--out artifacts/centers]

The model is calibrated as `kvfold compress` does it (kept in --out). For each layer the keys'
candidates are made three times: with the mean that does not turn, with the whole rotating mean, and
with the pairs that are chosen. A number is the geometric mean, over the mixed formats of 1 to 3.5
bits of payload, of one distortion over another.
"""

import argparse
from pathlib import Path

import torch

from kvfold.compress.calibrate import LayerStats, calibrate
from kvfold.compress.centers import best_center
from kvfold.compress.models import load_model, quiet_transformers
from kvfold.compress.models.attention_hook import NAME
from kvfold.compress.pipeline import calibrated_by, statistics_folder
from kvfold.compress.plan import make_plan, pick_device
from kvfold.compress.recipe import Recipe
from kvfold.compress.search import candidates

LEAST_BITS, MOST_BITS = 1.0, 3.5
PLAIN = Recipe.model_validate({"key": {"without": ["rotation"]}})


def logs(
    stats: LayerStats, recipe: Recipe, layer: int, one_norm: bool, chosen: bool
) -> torch.Tensor:
    """Logarithms of the distortions of the mixed formats, float64 [formats]."""
    candidates.best_center = best_center if chosen else lambda stats, *_: stats
    try:
        found = candidates.key_candidates(stats, recipe, layer, one_norm)
    finally:
        candidates.best_center = best_center
    mixed = [
        c.distortion
        for c in found
        if c.spec.format.params == "scale" and LEAST_BITS <= c.spec.format.payload_bits <= MOST_BITS
    ]
    return torch.tensor(mixed, dtype=torch.float64).log()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--layers", help="numbers between commas; default: all")
    parser.add_argument("--out", type=Path, default=Path("artifacts/centers"))
    options = parser.parse_args()
    quiet_transformers()
    recipe = Recipe()
    plan, device = make_plan(options.model, "2.5", None, recipe, None), pick_device("cpu")
    work = statistics_folder(calibrated_by(plan, device), options.out)
    with torch.no_grad():
        model = load_model(plan.source.path, torch.float32, device, NAME)
        stats = calibrate(
            model, plan.arch, plan.sequences, plan.steps, recipe.calibration.sample_tokens, work
        )
        layers = (
            [int(x) for x in options.layers.split(",")] if options.layers else range(len(stats))
        )
        print(
            "| layer | whole rotating mean over a plain one | chosen over whole | chosen over plain |\n"
            "|---|---|---|---|"
        )
        rows = []
        for i in layers:
            one_norm = plan.arch.qk_norm
            plain = logs(stats[i], PLAIN, i, one_norm, False)
            whole, chosen = (logs(stats[i], recipe, i, one_norm, x) for x in (False, True))
            rows.append(
                [
                    float((a - b).mean().exp())
                    for a, b in ((whole, plain), (chosen, whole), (chosen, plain))
                ]
            )
            print(f"| {i} | " + " | ".join(f"{x:.3f}" for x in rows[-1]) + " |", flush=True)
    means = torch.tensor(rows).log().mean(0).exp().tolist()
    print("| all | " + " | ".join(f"**{x:.3f}**" for x in means) + " |")


if __name__ == "__main__":
    main()
