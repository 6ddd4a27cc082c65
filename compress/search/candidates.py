"""What the search chooses from: for each layer, formats of keys and of values, with their
transforms and measured error."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from kvfold.compress.calibrate import LayerStats
from kvfold.compress.processes import Processes
from kvfold.compress.recipe import KeyRecipe, Recipe, ValueRecipe
from kvfold.compress.transforms import (
    KEY_TRANSFORMS,
    SCALED,
    VALUE_TRANSFORMS,
    Basis,
    Request,
    Transform,
)
from kvfold.exports.schema import MOST_SEED
from kvfold.exports.spec import KeySpec, ValueSpec, clip_rows
from kvfold.kernels.formats import Format
from kvfold.kernels.key_mean import RopePairs
from kvfold.kernels.quantizer import round_trip, to_float16

CLIPS = tuple(
    round(0.4 + 0.05 * i, 2) for i in range(13)
)  # factors on (minimum, maximum) tried for each group

CPU = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class KeyCandidate:
    """One way to store a layer's keys.

    Attributes:
        spec: as the runtime will apply it; for a pair scale, the diagonal matrix that fusing
            replaces.
        pair_scale: float64 [Hkv, D] to fuse, or None.
        distortion: mean squared error of a logit (before scaling), measured on calibration tokens.
    """

    spec: KeySpec
    pair_scale: Tensor | None
    distortion: float


@dataclass(frozen=True)
class ValueCandidate:
    """One way to store a layer's values.

    Attributes:
        spec: as the runtime will apply it.
        matrix: float64 [Hkv, D, D], the basis to fuse into v_proj and o_proj.
        distortion: mean squared error of a head's share of o_proj's output, measured on calibration
            tokens.
    """

    spec: ValueSpec
    matrix: Tensor
    distortion: float


def bare_key(candidate: KeyCandidate) -> KeyCandidate:
    """The candidate without its tensors, of which those of all layers take as much as weights."""
    return replace(candidate, spec=KeySpec(candidate.spec.format), pair_scale=None)


def bare_value(candidate: ValueCandidate) -> ValueCandidate:
    """The same of values."""
    return replace(candidate, spec=ValueSpec(candidate.spec.format), matrix=torch.empty(0))


def best_clip(x: Tensor, fmt: Format, metric: Tensor) -> Tensor:
    """The clip of each group with the least squared error, the other groups left as they are (after
    SKVQ, 2405.06219, which takes the error of the attention's output; here a metric stands for it).

    Args:
        x: float32 [Hkv, S, D]; fmt: with a minimum, of G groups; metric: float64 [Hkv, D, D].
    Returns:
        float32 [Hkv, G], or [Hkv] where G is 1.
    """
    groups = fmt.num_groups
    blocks = (
        metric.unflatten(1, (groups, -1)).unflatten(3, (groups, -1)).diagonal(dim1=1, dim2=3)
    )  # [Hkv, n, n, G]
    errors = []
    for clip in CLIPS:
        delta = (
            (round_trip(x, fmt, torch.tensor(clip)) - x).double().unflatten(-1, (groups, -1))
        )  # [Hkv, S, G, n]
        errors.append(torch.einsum("htgi,hijg,htgj->hg", delta, blocks, delta))
    found = torch.tensor(CLIPS)[torch.stack(errors).argmin(0)]
    return found[:, 0] if groups == 1 else found


def _distortion(
    x: Tensor, fmt: Format, metric: Tensor, clip: Tensor | None, device: torch.device
) -> float:
    """Mean over heads and tokens of Δᵀ·metric·Δ, computed on `device`."""
    x, metric = x.to(device), metric.to(device)
    delta = (round_trip(x, fmt, clip_rows(clip if clip is None else clip.to(device))) - x).double()
    return float(torch.einsum("hti,hij,htj->", delta, metric, delta) / (x.shape[0] * x.shape[1]))


def _fitted(
    row: Transform,
    side: KeyRecipe | ValueRecipe,
    stats: LayerStats,
    recipe: Recipe,
    layer: int,
    make: Callable[[Format, Basis], T],
    near_bits: float | None = None,
    only: int | None = None,
    **more: Any,
) -> list[T]:
    """What `make` gives of every format that a side offers and its basis, or of the quantised one
    of nearly `near_bits` of payload, or of number `only`; several processes share the formats."""
    head_dim = stats.key_mean.shape[-1]
    shared = side.shared_formats(head_dim) if recipe.catalogue else ()
    seed = (recipe.seed * 1_000_003 + layer) % MOST_SEED
    request = Request(
        None, side.group(head_dim), seed, without=side.without, catalogue=shared, **more
    )
    formats = side.uniform_formats(head_dim)
    if row.mixed is not None:
        formats = [*row.mixed(stats, side.bits or (), request), *formats]
    if near_bits is not None:
        coded = [fmt for fmt in formats if not fmt.raw]
        formats = [min(coded, key=lambda fmt: abs(fmt.payload_bits - near_bits))] if coded else []
    if only is not None:
        formats = [formats[only]]
    for_all = None if row.each_format else row.fit(stats, request)
    if row.shared is not None:
        request = row.shared(stats, request)

    def candidate(i: int) -> T:
        fmt = formats[i]
        return make(fmt, for_all or row.fit(stats, replace(request, fmt=fmt)))

    return Processes.current().share([1] * len(formats)).all(candidate)


def _key_candidate(
    fmt: Format,
    basis: Basis,
    stats: LayerStats,
    recipe: Recipe,
    rope_pairs: RopePairs,
    device: torch.device,
) -> KeyCandidate:
    name = recipe.key.transform
    mean = "offset" if basis.frequencies is None else "rotating mean"
    names = () if basis.matrix is None else (name,) if basis.offset is None else (mean, name)
    matrix = None if basis.matrix is None else basis.matrix.float()
    offset = None if basis.offset is None else basis.offset.float()
    omega = None if basis.frequencies is None else tuple(basis.frequencies.tolist())
    spec = KeySpec(fmt, names, matrix, offset, frequencies=omega, pairs=rope_pairs)
    rest = stats.key_sample if offset is None else stats.key_sample - offset[:, None]
    z = to_float16(spec.transform(stats.rest_sample if spec.turns else rest)).float()
    metric = stats.query_moment
    if spec.query_matrix is not None:
        inverse = spec.query_matrix.double()
        metric = inverse.mT @ metric @ inverse
    if fmt.kind.minimum and recipe.key.clip:
        spec = replace(spec, clip=best_clip(z, fmt, metric))
    scale = None if basis.fused is None else 1 / basis.fused.diagonal(dim1=-2, dim2=-1)
    return KeyCandidate(spec, scale, _distortion(z, fmt, metric, spec.clip, device))


def key_candidates(
    stats: LayerStats,
    recipe: Recipe,
    layer: int,
    one_norm: bool,
    output_weight: Tensor | None = None,
    rope_pairs: RopePairs = "halves",
    near_bits: float | None = None,
    only: int | None = None,
    device: torch.device = CPU,
) -> list[KeyCandidate]:
    """Candidates for one layer's keys, 16 bits last if offered.

    Args:
        one_norm: the model has one k_norm for all heads.
        output_weight: float [hidden_size, H·D], o_proj's weight, which "smooth" needs.
        rope_pairs: which channels RoPE turns together.
        near_bits: only the quantised candidate of about so many bits of payload.
        only: the number of the only candidate that is made.
        device: that their errors are measured on.
    """
    row, side = KEY_TRANSFORMS[recipe.key.transform], recipe.key
    return _fitted(
        row,
        side,
        stats,
        recipe,
        layer,
        lambda fmt, basis: _key_candidate(
            fmt, Basis() if fmt.raw else basis, stats, recipe, rope_pairs, device
        ),
        near_bits,
        only,
        one_norm=one_norm,
        output_weight=output_weight,
        pairs=rope_pairs,
    )


def _value_candidate(
    fmt: Format,
    matrix: Tensor,
    stats: LayerStats,
    recipe: Recipe,
    names: tuple[str, ...],
    device: torch.device,
) -> ValueCandidate:
    values = to_float16(stats.value_sample @ matrix.float().mT).float()
    inverse = torch.linalg.inv(matrix)
    metric = inverse.mT @ stats.output_metric @ inverse
    clip = best_clip(values, fmt, metric) if fmt.kind.minimum and recipe.value.clip else None
    return ValueCandidate(
        ValueSpec(fmt, names, clip), matrix, _distortion(values, fmt, metric, clip, device)
    )


def value_candidates(
    stats: LayerStats,
    recipe: Recipe,
    layer: int,
    bases: Literal["any", "channels", "turns", "none"] = "any",
    only: int | None = None,
    device: torch.device = CPU,
) -> list[ValueCandidate]:
    """Candidates for one layer's values, 16 bits last if offered; `bases`: those that can be folded
    in (fuse.value_bases); `only`: the number of the only one that is made; `device`: that their errors are measured
    on."""
    name, normed = recipe.value.transform, bases in ("turns", "none")
    if bases == "none":
        name = "none"
    elif normed and name in SCALED:
        name = "rotate"
    names = (() if name == "none" else (name,)) + (() if normed else ("scale",))

    def make(fmt: Format, basis: Basis) -> ValueCandidate:
        assert basis.fused is not None
        return _value_candidate(fmt, basis.fused, stats, recipe, names, device)

    gated = bases == "channels"
    return _fitted(
        VALUE_TRANSFORMS[name], recipe.value, stats, recipe, layer, make, only=only, gated=gated, normed=normed,
    )  # fmt: skip
