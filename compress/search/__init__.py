"""Calibrates a model, measures what each choice costs, chooses, and folds the choices into
weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.compress.calibrate import SKIP_TOKENS, LayerStats, calibrate
from kvfold.compress.fuse import output_name, shares_scale, value_bases
from kvfold.compress.memory import room_for_weights
from kvfold.compress.models import load_model
from kvfold.compress.models.attention_hook import NAME as TAP
from kvfold.compress.models.streamed import is_streamed, load_streamed, stored_tensors
from kvfold.compress.plan import Plan, check_reach
from kvfold.compress.processes import Processes
from kvfold.compress.progress import progress, stage
from kvfold.compress.readers import with_readers
from kvfold.compress.recipe import LEAST_WINDOW
from kvfold.compress.search.allocate import Choice, allocate, least_nbytes
from kvfold.compress.search.allocate_shared import allocate_shared
from kvfold.compress.search.candidates import (
    KeyCandidate,
    ValueCandidate,
    bare_key,
    bare_value,
    key_candidates,
    value_candidates,
)
from kvfold.compress.search.check import check_model
from kvfold.compress.search.conversations import write_conversations
from kvfold.compress.search.extrapolation import layer_jobs, sensitivities
from kvfold.compress.search.first_order import first_order_losses
from kvfold.compress.search.fisher import Losses, Sweep
from kvfold.compress.search.fold import Layer, fold_layers
from kvfold.compress.search.mean_factors import choose_factors, takes_mean
from kvfold.compress.search.sensitivity import Job, Passage, Probe, measured, packing_tap
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import text_of
from kvfold.exports.units import format_nbytes
from kvfold.exports.weights import weights_nbytes
from kvfold.kernels import catalogue
from kvfold.kernels.formats import Format

PROBED_WINDOW = (
    LEAST_WINDOW  # at the most, while losses are measured: probes are too short for a long one
)


@dataclass(frozen=True)
class Found:
    """What the search found.

    Attributes:
        layers: the choices.
        kl: nats of KL with all of them together, on the probe sequences.
        rounding_kl: nats of KL that rounding the fused weights to the model's own type costs, on the
            first of them.
    """

    layers: list[Layer]
    kl: float
    rounding_kl: float


@dataclass(frozen=True)
class Measured:
    """A model and what each choice would cost it.

    Attributes:
        model: calibrated, with attention tap.NAME.
        probe: of the model as it was read.
        near: the geometry that losses are measured with.
        keys, values: the candidates of each layer.
        key_losses, value_losses: nats of KL, one for each candidate.
        made: candidates of a layer by number, of keys and of values. Where a model is read layer by
            layer, `keys` and `values` have no tensors once their losses are known.
    """

    model: Any
    probe: Probe
    near: Geometry
    keys: list[list[KeyCandidate]]
    values: list[list[ValueCandidate]]
    key_losses: list[list[float]]
    value_losses: list[list[float]]
    made: Callable[[int, int, int], tuple[KeyCandidate, ValueCandidate]]


def measure(
    plan: Plan, work: Path, device: torch.device, statistics: Path | None = None
) -> Measured:
    """Calibrates, and measures what each candidate of each layer costs.

    Several processes share the sequences, and find the same.

    Args:
        work: folder that holds what an interrupted run has finished; process 0's.
        statistics: folder for the calibration's share of that; default: `work`.
    """
    recipe, geometry, processes = plan.recipe, plan.geometry, Processes.current()
    stage(
        f"reading {plan.source.name}: {plan.num_layers} layers, {len(plan.sequences)} × {plan.sequences[0].shape[1]} "
        "tokens of calibration text"
    )
    model = load_weights(plan, device)
    if processes.first:
        check_finite(model, plan.source.name)
        check_model(
            model, plan.arch, plan.sequences[0], plan.source.name, recipe.key.transform == "smooth"
        )
    text = plan.sequences, plan.steps
    kept = statistics or work
    stats = calibrate(model, plan.arch, *text, recipe.calibration.sample_tokens, kept)
    stats = with_readers(stats, model, plan.arch, *text, SKIP_TOKENS, kept)
    s = recipe.sensitivity
    sequences = [ids[:, : s.seq_len] for ids in plan.sequences[: s.num_sequences]]
    near = replace(geometry, window=min(geometry.window, PROBED_WINDOW))
    early = (
        near.sinks + near.window + near.page_tokens - 1
    )  # the next one is the first to read a page
    passages = [Passage(ids, s.stride) for ids in sequences]
    if s.method != "first-order" and s.conversations:
        most = text_of(plan.config).max_position_embeddings
        asked = processes.from_first(
            lambda: write_conversations(
                model, plan.tokenizer, plan.sequences, s.conversations, most, recipe.seed, work
            )
        )
        passages += [Passage(ids, start=prompt - 1) for ids, prompt in asked]
    probe = Probe(model, plan.arch, passages, early)
    bits = target_bits(plan)
    second = Losses(Sweep(probe, near, s.directions, recipe.seed), work / "fisher.json")
    keys: list[list[KeyCandidate]] = [[] for _ in range(plan.num_layers)]
    values: list[list[ValueCandidate]] = [[] for _ in keys]
    found: dict[Job, float] = {}
    lean = is_streamed(model) and s.method == "fisher"
    factors: list[Tensor | None] = [None] * plan.num_layers

    def candidates(
        i: int, whole: LayerStats, key: int | None = None, value: int | None = None
    ) -> tuple[list[KeyCandidate], list[ValueCandidate]]:
        mean, bases = factors[i], value_bases(probe.attentions[i], plan.arch)
        part = whole if mean is None else whole.with_mean(mean)
        return (
            _key_candidates(plan, model, part, i, probe.device, only=key),
            value_candidates(whole, recipe, i, bases, value, probe.device),
        )

    def made(i: int, key: int, value: int) -> tuple[KeyCandidate, ValueCandidate]:
        if not lean:
            return keys[i][key], values[i][value]
        own, other = candidates(i, processes.from_first(partial(stats.__getitem__, i)), key, value)
        return own[0], other[0]

    for i in progress(range(plan.num_layers)[::-1], "losses", "layer"):
        whole = processes.from_first(partial(stats.__getitem__, i))
        factors[i] = _mean_factors(plan, model, whole, i, second, bits)
        keys[i], values[i] = candidates(i, whole)
        if s.method == "fisher":
            jobs = layer_jobs(i, keys[i], values[i], bits, s.probes)
            if i in geometry.shared:  # its errors add up in all that read it
                found |= measured(probe, jobs, keys, values, near, work)
            else:
                found |= second.of_jobs(i, jobs, keys, values)
        if lean:
            keys[i], values[i] = [*map(bare_key, keys[i])], [*map(bare_value, values[i])]
    if s.method == "first-order":
        losses = first_order_losses(probe, sequences, keys, values, near)
    elif s.method == "kl":
        find = partial(measured, probe, keys=keys, values=values, geometry=near, work=work)
        losses = sensitivities(keys, values, bits, s.probes, find)
    else:
        losses = sensitivities(keys, values, bits, s.probes, lambda jobs: found)
    return Measured(model, probe, near, keys, values, *losses, made)


def _key_candidates(
    plan: Plan, model: Any, stats: LayerStats, layer: int, device: torch.device,
    near_bits: float | None = None, only: int | None = None,
) -> list[KeyCandidate]:  # fmt: skip
    attention = plan.arch.attention_modules(model)[layer]
    return key_candidates(
        stats,
        plan.recipe,
        layer,
        shares_scale(attention, plan.arch, stats.key_mean.shape[1]),
        getattr(attention, output_name(attention)).weight,
        plan.arch.rope_pairs,
        near_bits,
        only,
        device,
    )


def _mean_factors(
    plan: Plan,
    model: Any,
    stats: LayerStats,
    layer: int,
    losses: Losses,
    bits: float,
) -> Tensor | None:
    """How much of each head's rotating mean is taken off a layer's keys, as measures best: float64
    [Hkv]; None where there is none."""
    recipe, factors, device = plan.recipe, plan.recipe.key.mean_factors, losses.sweep.probe.device
    if not takes_mean(recipe, stats):
        return None
    parts = [torch.full_like(stats.center[:, 0], factor) for factor in factors]
    if len(parts) == 1 or recipe.sensitivity.method == "first-order":
        return parts[0]
    candidates = [
        _key_candidates(plan, model, stats.with_mean(part), layer, device, bits) for part in parts
    ]
    if not candidates[0]:  # only 16 bits are offered
        return parts[0]
    return choose_factors(losses, layer, [x[0] for x in candidates], factors)


def target_bits(plan: Plan) -> float:
    """Payload bits an element that the budget leaves for pages."""
    g = plan.geometry
    fixed = g.all_fixed_nbytes(plan.budget.at, plan.num_layers)
    packed = g.packed_elements(plan.budget.at, plan.num_layers)
    return 8 * (plan.budget.nbytes - fixed) / max(packed, 1)


def search(plan: Plan, work: Path, device: torch.device, statistics: Path | None = None) -> Found:
    """Measures, chooses, and fuses the choices into the model's weights.

    Args:
        work, statistics: as in `measure`.
    """
    x = measure(plan, work, device, statistics)
    chosen = Processes.current().from_first(
        lambda: choose(plan, x.keys, x.values, x.key_losses, x.value_losses)
    )
    layers = [
        Layer(*x.made(i, k, v), x.key_losses[i][k], x.value_losses[i][v])
        for i, (k, v) in enumerate(chosen)
    ]
    stage("measuring all choices together, then what rounding the fused weights costs")
    taps = [
        packing_tap(x.near, x.probe.device, y.key.spec, y.value.spec, y.value.matrix)
        for y in layers
    ]
    together = x.probe.whole_model(taps)
    dtype: torch.dtype = plan.config.dtype or torch.float32
    place = work if Processes.current().first else None
    fold_layers(x.model, plan.arch, layers, dtype, is_streamed(x.model), place)
    # rounding costs every token much the same, so one passage tells
    return Found(layers, together, x.probe.whole_model(count=1))


@torch.no_grad()
def check_finite(model: Any, name: str) -> None:
    """Refuses weights that are no numbers. Rows of an embedding that no text uses may be anything,
    where they aren't the head's too.

    Raises:
        KvfoldError: naming the first.
    """
    embedding, head = (
        m and m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    for key, tensor in stored_tensors(model):
        apart = (
            embedding is not head
            and embedding is not None
            and tensor.data_ptr() == embedding.data_ptr()
        )
        if tensor.is_floating_point() and not apart and not bool(torch.isfinite(tensor).all()):
            raise KvfoldError(
                f"The weight {key} of '{name}' holds NaN or infinity, so nothing can be measured with it; give weights "
                "that are whole."
            )


def choose(
    plan: Plan,
    keys: list[list[KeyCandidate]],
    values: list[list[ValueCandidate]],
    key_losses: list[list[float]],
    value_losses: list[list[float]],
) -> list[tuple[int, int]]:
    """The (key, value) candidate of each layer: least loss within the budget, K, V and bits of all
    layers together.

    Raises:
        KvfoldError: even the smallest candidates take more than the budget.
    """
    geometry, budget, count = plan.geometry, plan.budget, plan.num_layers

    def choices(layer: int, formats: list[Format], losses: list[float]) -> list[Choice]:
        own, sliding = geometry.of_layer(layer), geometry.sliding_of(layer)
        return [
            Choice(own.side_nbytes(f, budget.at, sliding), loss)
            for f, loss in zip(formats, losses, strict=True)
        ]

    formats = [[c.spec.format for c in group] for group in keys] + [
        [c.spec.format for c in group] for group in values
    ]
    losses = [*key_losses, *value_losses]
    sides = [choices(i % count, *side) for i, side in enumerate(zip(formats, losses, strict=True))]
    kinds = [(formats[g], formats[count + g]) for g in range(count)]
    places = [_places(plan, *pair) for pair in kinds]
    fixed = geometry.all_fixed_nbytes(budget.at, count)
    pairs = [
        [_sum(sides[g][k], sides[count + g][v]) for k, v in row] for g, row in enumerate(places)
    ]
    check_reach(budget, geometry, count, fixed + least_nbytes(pairs))
    room = budget.nbytes - fixed
    if all(len(row) == len(k) * len(v) for row, (k, v) in zip(places, kinds, strict=True)):
        apart = allocate(sides, room)  # a smaller program
        found = [places[g].index((apart[g], apart[count + g])) for g in range(count)]
    else:
        found = allocate(pairs, room)
    names = [[(k[i], v[j]) for i, j in row] for row, (k, v) in zip(places, kinds, strict=True)]
    limit, alike = plan.recipe.pairs, [frozenset(row) for row in names]
    # layers of one shape of heads, where there are several, have formats of their own
    for offered in dict.fromkeys(alike) if geometry.heads or len(set(alike)) == 1 else ():
        layers = [g for g in range(count) if alike[g] == offered]
        used = {names[g][found[g]] for g in layers}
        if 0 < limit < len(used):
            stage(f"choosing {limit} pairs of formats instead of {len(used)}")
            rest = sum(pairs[g][found[g]].nbytes for g in range(count) if g not in layers)
            part = [pairs[g] for g in layers], [names[g] for g in layers]
            for g, c in zip(layers, allocate_shared(*part, room - rest, limit), strict=True):
                found[g] = c
    return [places[g][c] for g, c in enumerate(found)]


def _places(plan: Plan, keys: list[Format], values: list[Format]) -> list[tuple[int, int]]:
    """The (key, value) candidates of a layer that may go together: those of the catalogue's list of
    pairs, where the recipe offers all of them and limits pairs at all; else any two."""
    recipe, every = plan.recipe, list(product(range(len(keys)), range(len(values))))
    if recipe.tied:
        return [(i, i) for i in range(len(keys))]
    listed = set(catalogue.pairs(keys[0].head_dim)) if recipe.catalogue and recipe.pairs else set()
    found = [(i, j) for i, j in every if (keys[i], values[j]) in listed]
    return (
        found if listed and len({(keys[i], values[j]) for i, j in found}) == len(listed) else every
    )


def _sum(a: Choice, b: Choice) -> Choice:
    return Choice(a.nbytes + b.nbytes, a.loss + b.loss)


def load_weights(plan: Plan, device: torch.device) -> Any:
    """The model in float32, since a probe's KL drowns in bfloat16's rounding: whole, or, where it
    would take more than its share of the device's memory, layer by layer. Several processes do the
    same, and those of a host share its memory."""
    processes = Processes.current()
    rooms = processes.gather(room_for_weights(device, plan.max_memory, processes.local_size))
    room = processes.from_first(lambda: min(rooms))
    need = weights_nbytes(plan.source.path, torch.float32)
    if need <= room:
        return load_model(plan.source.path, torch.float32, device, TAP)
    stage(
        f"reading layer by layer: {format_nbytes(need)} of weights, {format_nbytes(room)} of memory for them"
    )
    return load_streamed(plan.source.path, plan.arch, torch.float32, device, TAP)
