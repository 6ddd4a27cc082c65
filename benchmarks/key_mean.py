"""What taking the rotating mean off keys saves, and what its cheaper forms would: distortion at
equal bits, against a constant mean.

python benchmarks/key_mean.py MODEL [--bits 2.0] [--steps 1,2,4]

For each layer the keys of some calibration text, at interpolated positions, lose a mean: none
turned (the mean after RoPE, as format version 1 had it); R(t)·b exactly; held for runs of 4, 32 or
128 tokens; and as kernels/key_mean.py defines it. What is left goes through the search's own
water-filling in the queries' metric. A number is the best distortion at that many bits divided by
that with the constant mean; the last row is the geometric mean over layers.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvfold.compress.models import load_model, read_config, resolve_model
from kvfold.compress.models.attention_hook import NAME, tapped
from kvfold.compress.models.layerwise import LayerRunner
from kvfold.compress.models.rope import frequencies, rotate_on, turns
from kvfold.compress.recipe import CalibrationRecipe
from kvfold.compress.text import calibration_sequences
from kvfold.compress.transforms.whiten import CLASS_LEVELS, compositions, eigenbasis
from kvfold.exports.architectures import architecture_of, head_dim_of, num_kv_heads_of
from kvfold.kernels.key_mean import STEP, turn_tables
from kvfold.kernels.kinds.levels import GAUSSIAN_MSE, PLANE_WIDTHS
from kvfold.pretrained import tokenizer_from_pretrained

SKIP = 8  # first tokens, which are outliers and stay in 16 bits
RUNS = (1, 4, 32, 128)  # tokens that a mean is held for


def least_distortion(moment: Tensor, metric: Tensor, bits: float) -> float:
    """Of the best cut into classes with `bits` code bits in the mean: float64 [Hkv, D, D] moments
    of keys and queries."""
    variances = eigenbasis(moment, metric)[1]
    sizes = compositions(variances.shape[-1])
    width = np.array([sum(PLANE_WIDTHS[n]) for n in CLASS_LEVELS])
    mean = (sizes * width).sum(1) / variances.shape[-1]
    sizes = sizes[(mean <= bits + 1e-9) & (mean > 0)]
    edges = np.concatenate([np.zeros((len(sizes), 1), int), sizes.cumsum(1)], 1)
    roots = torch.cat((torch.zeros(len(variances), 1), variances.sqrt()), 1).cumsum(1).numpy()
    mse = np.array([GAUSSIAN_MSE[n] for n in CLASS_LEVELS])
    mass = roots[:, edges[:, 1:]] - roots[:, edges[:, :-1]]  # [Hkv, cuts, classes]
    return float((mse * mass**2 / np.maximum(sizes, 1)).sum((0, 2)).min())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument(
        "--steps", default="1,2,4", help="between the positions of each sequence's tokens"
    )
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    steps = [int(step) for step in options.steps.split(",")]
    path = Path(resolve_model(options.model).path)
    config = read_config(path)
    arch = architecture_of(config)
    model = load_model(path, torch.float32, torch.device("cpu"), NAME)
    recipe = CalibrationRecipe(num_sequences=len(steps), seq_len=options.tokens)
    tokenizer = tokenizer_from_pretrained(path)
    sequences = calibration_sequences(tokenizer, None, recipe, config.max_position_embeddings, 0)[1]
    heads, dim = num_kv_heads_of(config), head_dim_of(config)
    runners = [LayerRunner(model, arch, ids) for ids in sequences]
    hidden = [runner.embedded for runner in runners]
    names = [*(f"held for {n}" if n > 1 else "exact" for n in RUNS), "as stored"]
    print("| layer | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    logs = []
    for index, layer in enumerate(arch.decoder_layers(model)):
        attention, seen = layer.get_submodule(arch.attention), []

        def tap(module, query, key, value, mask, scaling, seen=seen, **extras) -> None:
            seen.append((query, key))

        after = []
        for runner, state in zip(runners, hidden, strict=True):
            with tapped(attention, tap):
                after.append(runner.run(index, state))
        hidden = after
        omega = frequencies(model, arch, index, max(steps) * options.tokens)
        if omega is None:
            continue
        tables = turn_tables(tuple(omega.tolist()), dim, 0, torch.device("cpu"))
        number = torch.arange(options.tokens)
        near = turns(model, arch, index, number[None])
        assert near is not None
        center = torch.cat(
            [rotate_on(k, near, torch.ones_like(near))[0, :, SKIP:] for _, k in seen], 1
        ).mean(1)
        metric, moments = (
            torch.zeros(heads, dim, dim, dtype=torch.float64),
            [0.0] * (len(names) + 1),
        )
        total = torch.zeros(heads, dim, dtype=torch.float64)
        for (query, key), step in zip(seen, steps, strict=True):
            far = turns(model, arch, index, number[None] * step)
            q, k = (rotate_on(x, near, far)[0, :, SKIP:].double() for x in (query, key))
            q = q.unflatten(0, (heads, -1)).flatten(1, 2)
            metric += q.mT @ q
            total += k.sum(1)
            exact = torch.polar(torch.ones(()), number[:, None] * step * tables.omega.float())
            means = [torch.zeros_like(k)]
            for (
                run
            ) in RUNS:  # the token's number says where in a run it stands, so that all places occur
                back = torch.polar(
                    torch.ones(()), -(number % run - (run - 1) / 2)[:, None] * tables.omega.float()
                )
                means.append(tables._turned(center, exact * back)[:, SKIP:].double())
            means.append(tables.mean_at(center, number * step, number % STEP)[:, SKIP:].double())
            for i, mean in enumerate(means):
                rest = k - mean
                moments[i] = moments[i] + rest.mT @ rest
        count = len(seen) * (options.tokens - SKIP)
        moments = [moment / count for moment in moments]
        constant = total / count
        moments[0] = moments[0] - constant[:, :, None] * constant[:, None]
        found = [least_distortion(moment, metric / count, options.bits) for moment in moments]
        logs.append([math.log(x / found[0]) for x in found[1:]])
        print(
            f"| {index} | " + " | ".join(f"{math.exp(x):.3f}" for x in logs[-1]) + " |", flush=True
        )
    means = [math.exp(sum(column) / len(logs)) for column in zip(*logs, strict=True)]
    print("| all | " + " | ".join(f"**{x:.3f}**" for x in means) + " |")


if __name__ == "__main__":
    main()
