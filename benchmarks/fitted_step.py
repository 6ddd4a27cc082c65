"""Does a step fitted to each class and head beat the Gaussian optimum? Fits on half of the
calibration sample, judges on the other.

usage: python benchmarks/fitted_step.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from kvfold.compress.calibrate import LayerStats, calibrate
from kvfold.compress.models import load_model, quiet_transformers
from kvfold.compress.models.attention_hook import NAME
from kvfold.compress.plan import make_plan
from kvfold.compress.recipe import Recipe
from kvfold.compress.transforms import Request
from kvfold.compress.transforms.whiten import water_fill, whiten, whitened
from kvfold.exports.spec import KeySpec
from kvfold.kernels.formats import Format
from kvfold.kernels.quantizer import round_trip, to_float16

FACTORS = (0.8, 0.88, 0.94, 1.06, 1.12, 1.2)
BITS = (1.5, 2.0, 3.0)


def logit_error(stats: LayerStats, matrix: Tensor, fmt: Format, tokens: slice) -> Tensor:
    """Mean squared error of a logit, float64 [Hkv], with keys in `matrix`'s basis."""
    z = to_float16(KeySpec(fmt, (), matrix.float()).transform(stats.rest_sample)).float()[:, tokens]
    inverse = torch.linalg.inv(matrix)
    delta = (round_trip(z, fmt) - z).double()
    return (
        torch.einsum("hti,hij,htj->h", delta, inverse.mT @ stats.query_moment @ inverse, delta)
        / z.shape[1]
    )


def fit(stats: LayerStats, matrix: Tensor, fmt: Format, tokens: slice) -> Tensor:
    """`matrix` with each class's rows scaled by the best product of FACTORS that two sweeps
    find."""
    best = logit_error(stats, matrix, fmt, tokens)
    for _ in range(2):
        start = 0
        for channels, levels in fmt.classes:
            for factor in FACTORS if levels else ():
                tried = matrix.clone()
                tried[:, start : start + channels] *= factor
                error = logit_error(stats, tried, fmt, tokens)
                matrix = torch.where((error < best)[:, None, None], tried, matrix)
                best = torch.minimum(best, error)
            start += channels
    return matrix


def main() -> None:
    quiet_transformers()
    plan = make_plan(
        sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", "2.5", None, Recipe(), None
    )
    with torch.no_grad(), tempfile.TemporaryDirectory() as work:
        model = load_model(plan.source.path, torch.float32, torch.device("cpu"), NAME)
        stats = calibrate(model, plan.arch, plan.sequences, plan.steps, 1024, Path(work))
        ratios = []
        print("layer, bits, fitted error over the Gaussian step's on unseen tokens")
        for layer in range(0, len(stats), 3):
            for fmt, bits in zip(water_fill(whitened(stats[layer])[1], BITS), BITS, strict=True):
                matrix = whiten(stats[layer], Request(fmt, seed=layer)).online
                assert matrix is not None
                fitted = fit(stats[layer], matrix, fmt, slice(0, None, 2))
                unseen = slice(1, None, 2)
                before, after = (
                    logit_error(stats[layer], m, fmt, unseen).sum() for m in (matrix, fitted)
                )
                ratios.append(float(after / before))
                print(f"{layer}, {bits}, {ratios[-1]:.3f}", flush=True)
        print(f"mean {sum(ratios) / len(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
