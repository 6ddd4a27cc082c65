"""Chooses the cuts of kernels/catalogue.py by the spectra of real models, and says what they cost
against each layer's own.

usage: python benchmarks/catalogue.py MODEL [MODEL …] [--head-dims 64,80,96,128,256] [--cuts 2]
                                      [--out artifacts/catalogue]

Every model is calibrated as `kvfold compress` does it (kept in --out, so that a second run takes
seconds). A cut's distortion in a layer counts as a part of the layer's own best at the same mean
bits, which reverse water-filling finds; for each mean number of bits the cuts are those with the
least mean logarithm of that ratio, each layer taking the better one. Models count alike; where some
have the head_dim, the others, whose sorted spectra λ(i/D) are interpolated to it, count FOREIGN as
much. Among cuts within SLACK of the best that with the fewest planes is taken: a kernel unrolls
them.

Prints the table's lines, and for each mean number of bits and model the mean and the worst layer's
ratio. Only head_dims of the given models are measured; for the others these figures are those of
interpolated spectra, and are marked so. With --check nothing is chosen: the ratios are those of the
catalogue as it is.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kvfold.compress.calibrate import calibrate
from kvfold.compress.models import load_model, quiet_transformers
from kvfold.compress.models.attention_hook import NAME
from kvfold.compress.pipeline import calibrated_by, statistics_folder
from kvfold.compress.plan import make_plan, pick_device
from kvfold.compress.recipe import Recipe
from kvfold.compress.transforms.whiten import (
    CLASS_LEVELS,
    code_bits,
    compositions,
    cut_distortions,
    eigenbasis,
    value_moment,
    whitened,
)
from kvfold.kernels.catalogue import HEAD_DIMS, KEY_BITS, VALUE_BITS, key_formats, value_formats
from kvfold.kernels.catalogue import code_bits as cut_bits
from kvfold.kernels.formats import Format
from kvfold.kernels.kinds.levels import PLANE_WIDTHS

BUDGET = "2.5"  # only its length matters: how far positions are spread
FOREIGN = 0.25
SLACK = 0.003  # of the mean ratio
BITS = {"K": KEY_BITS, "V": VALUE_BITS}
SHORT_LIST = 1000  # cuts that are tried in pairs
FIRSTS = 300  # of them, as the first of a pair


@dataclass(frozen=True)
class Spectra:
    """One model's λ of every layer and KV head, falling: float64 [layers, Hkv, D] of each side."""

    name: str
    sides: dict[str, np.ndarray]

    @property
    def head_dim(self) -> int:
        return self.sides["K"].shape[-1]


def spectra_of(model: str, out: Path, device: str) -> Spectra:
    """Calibrates a model, or reads what an earlier run left in `out`."""
    plan, target = make_plan(model, BUDGET, None, Recipe(), None), pick_device(device)
    work = statistics_folder(calibrated_by(plan, target), out)
    loaded = load_model(plan.source.path, torch.float32, target, NAME)
    with torch.no_grad():
        stats = calibrate(
            loaded,
            plan.arch,
            plan.sequences,
            plan.steps,
            plan.recipe.calibration.sample_tokens,
            work,
        )
        keys = [whitened(x)[1] for x in stats]
        values = [eigenbasis(value_moment(x), x.output_metric)[1] for x in stats]
    return Spectra(
        Path(model).name, {"K": torch.stack(keys).numpy(), "V": torch.stack(values).numpy()}
    )


def resampled(variances: np.ndarray, head_dim: int) -> np.ndarray:
    """Sorted spectra [..., D] at head_dim channels: log λ over (i + ½)/D, interpolated."""
    own = variances.shape[-1]
    if own == head_dim:
        return variances
    floor = 1e-12 * variances.max(-1, keepdims=True) + 1e-300
    logs = np.log(np.maximum(variances, floor)).reshape(-1, own)
    here, there = (np.arange(own) + 0.5) / own, (np.arange(head_dim) + 0.5) / head_dim
    return np.exp([np.interp(there, here, row) for row in logs]).reshape(
        *variances.shape[:-1], head_dim
    )


def planes(sizes: np.ndarray) -> np.ndarray:
    """Planes of each cut: int [cuts]."""
    return (sizes > 0) @ np.array([len(PLANE_WIDTHS[n]) for n in CLASS_LEVELS])


def chosen(logs: np.ndarray, weights: np.ndarray, count: np.ndarray, cuts: int) -> list[int]:
    """One cut or two with the least weighted mean of each layer's better logarithm.

    Args:
        logs: float64 [layers, n], log ratios; weights: float64 [layers], of sum 1; count: int [n],
            planes.
        cuts: 1 or 2.
    """

    def simplest(scores: np.ndarray) -> int:
        fair = np.flatnonzero(scores <= scores.min() + np.log1p(SLACK))
        return int(fair[np.lexsort((scores[fair], count[fair]))[0]])

    alone = weights @ logs
    if cuts == 1:
        return [simplest(alone)]
    short = np.unique([*np.argsort(alone)[:SHORT_LIST], *np.argsort(logs, axis=1)[:, :30].ravel()])
    few = logs[:, short]
    firsts = np.argsort(alone[short])[:FIRSTS]
    scores = np.array([(weights @ np.minimum(few, few[:, [a]])) for a in firsts])
    a, b = np.unravel_index(scores.argmin(), scores.shape)
    pair = [int(short[firsts[a]]), int(short[b])]
    for turn in (0, 1):
        pair[turn] = simplest(weights @ np.minimum(logs, logs[:, [pair[1 - turn]]]))
    return list(dict.fromkeys(pair))


def line_of(sizes: np.ndarray) -> str:
    """A cut as kernels/catalogue.py writes it."""
    return " ".join(
        f"{n}@{sum(PLANE_WIDTHS[levels])}"
        for n, levels in zip(sizes, CLASS_LEVELS, strict=True)
        if n
    )


def channels_of(fmt: Format) -> tuple[int, ...]:
    """Channels that a mixed format gives to each of CLASS_LEVELS."""
    found = {levels: channels for channels, levels in fmt.classes}
    return tuple(found.get(levels, 0) for levels in CLASS_LEVELS)


def measure(models: list[Spectra], head_dim: int, cuts: int, check: bool) -> None:
    """Chooses, or with `check` looks up, the cuts of one head_dim; prints them and what they
    cost."""
    sizes, bits = compositions(head_dim), code_bits(head_dim)
    rows = {tuple(row): i for i, row in enumerate(sizes.tolist())}
    count = planes(sizes)
    native = [m.head_dim == head_dim for m in models]
    share = [1.0 if own or not any(native) else FOREIGN for own in native]
    for side, grid in BITS.items():
        costs = [
            np.array([cut_distortions(x) for x in resampled(m.sides[side], head_dim)])
            for m in models
        ]
        weights = np.concatenate(
            [np.full(len(c), w / len(c)) for c, w in zip(costs, share, strict=True)]
        )
        formats = (key_formats if side == "K" else value_formats)(head_dim)
        print(f"\nhead_dim {head_dim}, {side}")
        for below, limit in zip((0.0, *grid), grid, strict=False):
            allowed = np.flatnonzero((bits <= limit + 1e-9) & (bits > 0))
            if not len(allowed):
                continue
            logs = [np.log(c[:, allowed] / c[:, allowed].min(1, keepdims=True)) for c in costs]
            if check:
                found = [
                    int(np.searchsorted(allowed, rows[channels_of(f)]))
                    for f in formats
                    if f.params == "scale" and below < cut_bits(f) <= limit
                ]
            else:
                found = chosen(np.concatenate(logs), weights / weights.sum(), count[allowed], cuts)
            if not found:
                continue
            figures = []
            for m, own, log in zip(models, native, logs, strict=True):
                ratio = np.exp(log[:, found].min(1))
                figures.append(
                    f"{m.name}{'' if own else ' (interpolated)'} {ratio.mean():.3f} {ratio.max():.2f}"
                )
            text = " | ".join(line_of(sizes[allowed[i]]) for i in found)
            print(f"        {text}  # {limit:g} bits: {'; '.join(figures)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--head-dims", default=",".join(map(str, HEAD_DIMS)))
    parser.add_argument("--cuts", type=int, choices=(1, 2), default=2)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("artifacts/catalogue"))
    options = parser.parse_args()
    quiet_transformers()
    models = [spectra_of(model, options.out, options.device) for model in options.models]
    for head_dim in map(int, options.head_dims.split(",")):
        measure(models, head_dim, options.cuts, options.check)


if __name__ == "__main__":
    main()
