"""Calibrates a model, measures what each choice costs, chooses, and folds the choices into weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.compress.allocate import Choice, allocate, least_nbytes
from kvfold.compress.calibrate import calibrate
from kvfold.compress.candidates import KeyCandidate, ValueCandidate, key_candidates, value_basis, value_candidates
from kvfold.compress.fuse import fuse_pair_scale, fuse_values
from kvfold.compress.models import load_model
from kvfold.compress.plan import Plan, check_reach
from kvfold.compress.progress import progress, stage
from kvfold.compress.sensitivity import Probe, packing_tap, sensitivities
from kvfold.compress.tap import NAME as TAP
from kvfold.exports.architectures import Architecture


@dataclass(frozen=True)
class Layer:
    """One layer's choices: what the search found."""

    key: KeyCandidate
    value: ValueCandidate
    matrix: Tensor  # float64 [Hkv, D, D], fused into v_proj and o_proj
    key_loss: float
    value_loss: float


@dataclass(frozen=True)
class Found:
    """What the search found.

    Attributes:
        layers: the choices.
        kl: nats of KL with all of them together, on the probe sequences.
        rounding_kl: nats of KL that rounding the fused weights to the model's own type costs.
    """

    layers: list[Layer]
    kl: float
    rounding_kl: float


def search(plan: Plan, work: Path, device: torch.device) -> Found:
    """Runs calibration, sensitivities and allocation; `work` holds what an interrupted run has finished."""
    recipe, geometry, budget = plan.recipe, plan.geometry, plan.budget
    dtype: torch.dtype = plan.config.dtype or torch.float32
    stage(
        f"reading {plan.source.name}: {plan.num_layers} layers, {len(plan.sequences)} × {plan.sequences[0].shape[1]} tokens of calibration text"
    )
    model = load_model(plan.source.path, _compute_dtype(plan, device), device, TAP)
    stats = calibrate(model, plan.arch, plan.sequences, plan.spread, recipe.calibration.sample_tokens, work)
    matrices, keys, values = [], [], []
    for i, found in enumerate(progress(stats, "candidates", "layer")):
        matrices.append(value_basis(found, recipe, i))
        keys.append(key_candidates(found, recipe, i, plan.arch.qk_norm))
        values.append(value_candidates(found, recipe, matrices[-1]))
    s = recipe.sensitivity
    probe = Probe(model, plan.arch, [ids[:, : s.seq_len] for ids in plan.sequences[: s.num_sequences]], s.stride)
    fixed = plan.num_layers * geometry.fixed_nbytes(budget.at)
    packed = geometry.elements(geometry.num_pages(budget.at) * geometry.page_tokens, plan.num_layers)
    target_bits = 8 * (budget.nbytes - fixed) / max(packed, 1)
    probed_keys = [_nearest(group, target_bits) for group in keys]
    probed_values = [_nearest(group, target_bits) for group in values]
    key_kl, value_kl = sensitivities(probe, probed_keys, probed_values, matrices, geometry, work)

    def choices(group, probed, kl) -> list[Choice]:
        unit = kl / probed.distortion if probed.distortion > 0 else 0.0
        return [Choice(geometry.side_nbytes(c.spec.format, budget.at), unit * c.distortion) for c in group]

    groups = [choices(keys[i], probed_keys[i], key_kl[i]) for i in range(plan.num_layers)]
    groups += [choices(values[i], probed_values[i], value_kl[i]) for i in range(plan.num_layers)]
    check_reach(budget, geometry, plan.num_layers, fixed + least_nbytes(groups))
    chosen = allocate(groups, budget.nbytes - fixed)
    layers = []
    for i in range(plan.num_layers):
        k, v = chosen[i], chosen[plan.num_layers + i]
        losses = groups[i][k].loss, groups[plan.num_layers + i][v].loss
        layers.append(Layer(keys[i][k], values[i][v], matrices[i], *losses))
    stage("measuring all choices together, then what rounding the fused weights costs")
    taps = [packing_tap(geometry, probe.device, x.key.spec, x.value.spec, x.matrix) for x in layers]
    together = probe.whole_model(taps)
    for attention, layer in zip(plan.arch.attention_modules(model), layers, strict=True):
        set_parameters(attention, fused_parameters(attention, plan.arch, layer), dtype)
    return Found(layers, together, probe.whole_model())


def _compute_dtype(plan: Plan, device: torch.device) -> torch.dtype:
    """float32 where the weights fit in half of the device's free memory: a probe's KL drowns in bfloat16's rounding."""
    if device.type != "cuda":
        return torch.float32
    weights = sum(p.stat().st_size for p in plan.source.path.glob("*.safetensors"))
    own: torch.dtype = plan.config.dtype or torch.float32
    wide = weights * 4 // own.itemsize
    return torch.float32 if wide < torch.cuda.mem_get_info(device)[0] / 2 else own


def fused_parameters(attention: Any, arch: Architecture, layer: Layer) -> dict[str, Tensor]:
    """All parameters of an attention module that the layer's choices change, float64, by name; the module stays."""
    fused = fuse_values(attention, layer.matrix)
    if layer.key.pair_scale is not None:
        fused |= fuse_pair_scale(attention, layer.key.pair_scale, arch, fused)
    return fused


def set_parameters(attention: Any, fused: dict[str, Tensor], dtype: torch.dtype, keep: bool = False) -> None:
    """Puts parameters rounded to `dtype` into the module; `keep`: as that type, not as the module's own."""
    for name, value in fused.items():
        parameter = attention.get_parameter(name)
        rounded = value.to(dtype)
        parameter.data = rounded if keep else rounded.to(parameter.dtype)


def _nearest(group: list, bits: float):
    """The quantised candidate whose payload is nearest to `bits`."""
    return min(group[:-1], key=lambda c: abs(c.spec.format.payload_bits - bits))
