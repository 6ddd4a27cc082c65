"""What the search chooses from: for each layer, formats of keys and of values, with their transforms and measured error."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvfold.compress.calibrate import LayerStats
from kvfold.compress.recipe import Recipe
from kvfold.compress.transforms import KeyBasis
from kvfold.compress.transforms.reorder import reorder
from kvfold.compress.transforms.rotate import balance, rotate, unit_scale
from kvfold.compress.transforms.smooth import smooth
from kvfold.compress.transforms.whiten import water_fill, whiten, whitened
from kvfold.exports.spec import KeySpec, ValueSpec
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.kernels.packing import TRIT_CHANNELS
from kvfold.kernels.quantizer import round_trip, to_float16

CLIPS = tuple(round(0.4 + 0.05 * i, 2) for i in range(13))  # factors on (minimum, maximum) tried for each head
# levels and parameter type of the uniform formats; few levels can't use a scale of 16 bits, many can't live with 8
UNIFORM = ((3, "e4m3"), (4, "e4m3"), (8, "e4m3"), (16, "e4m3"), (16, "fp16"), (32, "fp16"), (64, "fp16"), (256, "fp16"))


@dataclass(frozen=True)
class KeyCandidate:
    """One way to store a layer's keys.

    Attributes:
        spec: as the runtime will apply it; for a pair scale, the diagonal matrix that fusing replaces.
        pair_scale: float64 [Hkv, D] to fuse, or None.
        distortion: mean squared error of a logit (before 1/√D), measured on calibration tokens.
    """

    spec: KeySpec
    pair_scale: Tensor | None
    distortion: float


@dataclass(frozen=True)
class ValueCandidate:
    """One way to store a layer's values, in the layer's fused basis.

    Attributes:
        spec: as the runtime will apply it.
        distortion: mean squared error of a head's share of o_proj's output, measured on calibration tokens.
    """

    spec: ValueSpec
    distortion: float


def _generator(seed: int, layer: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + layer)


def _uniform_formats(head_dim: int, group_size: int) -> list[Format]:
    whole = head_dim % TRIT_CHANNELS == 0  # else no ternary format of that many channels exists
    return [uniform(head_dim, levels, dtype, group_size) for levels, dtype in UNIFORM if levels != 3 or whole]  # type: ignore[arg-type]


def best_clip(x: Tensor, fmt: Format, metric: Tensor) -> tuple[Tensor, Tensor]:
    """The clip of each head with the least error (SKVQ's clip, 2405.06219, in a metric).

    Args:
        x: float32 [Hkv, S, D]; fmt: a "scale_min" format; metric: float64 [Hkv, D, D].
    Returns:
        clip float32 [Hkv] and its mean squared error float64 [Hkv].
    """
    errors = []
    for clip in CLIPS:
        delta = (round_trip(x, fmt, torch.tensor(clip)) - x).double()
        errors.append(torch.einsum("hti,hij,htj->h", delta, metric, delta) / x.shape[1])
    least, index = torch.stack(errors).min(0)
    return torch.tensor(CLIPS)[index], least


def _key_candidate(fmt: Format, basis: KeyBasis, names: tuple[str, ...], stats: LayerStats) -> KeyCandidate:
    matrix = basis.matrix
    if basis.pair_scale is not None:
        matrix = torch.diag_embed(1 / basis.pair_scale)
    spec = KeySpec(
        fmt, names, None if matrix is None else matrix.float(), None if basis.offset is None else basis.offset.float()
    )
    z = to_float16(spec.apply(stats.key_sample)).float()
    metric = stats.query_moment
    if spec.query_matrix is not None:
        inverse = spec.query_matrix.double()
        metric = inverse.mT @ metric @ inverse
    if fmt.params == "scale_min":
        clip, errors = best_clip(z, fmt, metric)
        return KeyCandidate(replace(spec, clip=clip), basis.pair_scale, float(errors.mean()))
    delta = (round_trip(z, fmt) - z).double()
    error = torch.einsum("hti,hij,htj->", delta, metric, delta) / (z.shape[0] * z.shape[1])
    return KeyCandidate(spec, basis.pair_scale, float(error))


def key_candidates(stats: LayerStats, recipe: Recipe, layer: int, shared_scale: bool) -> list[KeyCandidate]:
    """Candidates for one layer's keys, 16 bits last.

    Args:
        shared_scale: the model has one k_norm for all heads.
    """
    head_dim = stats.key_mean.shape[-1]
    kind = recipe.key.transform
    plain = _uniform_formats(head_dim, recipe.key.group_size)
    found: list[KeyCandidate] = []
    if kind == "whiten":
        _, variances = whitened(stats)
        many = [f for f in plain if f.classes[0][1] in (64, 256)]  # beyond 5 bits nothing is won by mixing
        for fmt in [*water_fill(variances, recipe.key.bits), *many]:
            found.append(
                _key_candidate(fmt, whiten(stats, fmt, _generator(recipe.seed, layer)), ("offset", "whiten"), stats)
            )
    else:
        for fmt in plain:
            basis = KeyBasis()
            if kind == "smooth":
                basis = smooth(stats, fmt, shared_scale)
            elif kind == "reorder":
                basis = KeyBasis(matrix=reorder(stats.key_sample, recipe.key.group_size, recipe.seed))
            found.append(_key_candidate(fmt, basis, () if kind == "none" else (kind,), stats))
    return [*found, _key_candidate(raw16(head_dim), KeyBasis(), (), stats)]


def value_basis(stats: LayerStats, recipe: Recipe, layer: int) -> Tensor:
    """The matrix float64 [Hkv, D, D] that is fused into a layer's v_proj and o_proj."""
    kind = recipe.value.transform
    if kind == "rotate":
        return rotate(stats, _generator(recipe.seed, layer))
    if kind == "balance":
        return balance(stats, _generator(recipe.seed, layer))
    if kind == "reorder":
        return unit_scale(stats) @ reorder(stats.value_sample, recipe.value.group_size, recipe.seed)
    return unit_scale(stats)


def value_candidates(stats: LayerStats, recipe: Recipe, basis: Tensor) -> list[ValueCandidate]:
    """Candidates for one layer's values in their fused basis, 16 bits last."""
    values = to_float16(stats.value_sample @ basis.float().mT).float()
    inverse = torch.linalg.inv(basis)
    metric = inverse.mT @ stats.output_metric @ inverse
    names = ("scale",) if recipe.value.transform == "none" else (recipe.value.transform, "scale")
    found = []
    for fmt in _uniform_formats(values.shape[-1], recipe.value.group_size):
        clip, errors = best_clip(values, fmt, metric)
        found.append(ValueCandidate(ValueSpec(fmt, names, clip), float(errors.mean())))
    return [*found, ValueCandidate(ValueSpec(raw16(values.shape[-1]), names), 0.0)]
