"""Which candidates' losses are measured, and those of the others.

KL is quadratic in a small error, so the loss of one format follows from that of another of its kind
and from the two formats' distortions, which are measured on calibration tokens without the model.
Kinds are measured apart, because symmetric and minimum-maximum codes spend equal distortions on
different tokens.
"""

from collections.abc import Callable, Sequence

import numpy as np

from kvfold.compress.search.candidates import KeyCandidate, ValueCandidate
from kvfold.compress.search.sensitivity import Candidate, Job

SPREAD_BITS = (
    0.75  # how far around the budget's payload a side is probed where more than one format is
)
NEAR_BITS = (
    1.5  # a kind of formats further than this from the budget's payload is not probed for itself
)


def probed(group: Sequence[Candidate], bits: float, count: int) -> list[int]:
    """Which candidates of a side are measured: of each kind of parameters, `count` quantised ones,
    spread over SPREAD_BITS around `bits` of payload. A kind that has nothing within NEAR_BITS is
    not measured, unless no kind has."""
    offsets = (
        [SPREAD_BITS * (2 * i / (count - 1) - 1) for i in range(count)] if count > 1 else [0.0]
    )
    distance = {
        i: c.spec.format.payload_bits - bits for i, c in enumerate(group) if not c.spec.format.raw
    }
    kinds: dict[str, list[int]] = {}
    for i in distance:
        kinds.setdefault(group[i].spec.format.params, []).append(i)
    nearest = min(map(abs, distance.values()), default=0.0)
    chosen = set()
    for members in kinds.values():
        if min(abs(distance[i]) for i in members) <= max(NEAR_BITS, nearest):
            chosen |= {min(members, key=lambda i: abs(distance[i] - offset)) for offset in offsets}
    return sorted(chosen)


def extrapolate(group: Sequence[Candidate], measured: dict[int, float]) -> list[float]:
    """Losses of all candidates from those of some.

    Args:
        measured: index of a candidate → its loss.
    Returns:
        Loss of each candidate: its distortion times loss / distortion of the measured ones of its
        kind (of any, if none of its kind was), whose logarithm is interpolated over the logarithm
        of the distortion, and constant beyond them.
    """

    def known(kind: str | None) -> list[tuple[float, float]]:
        return sorted(
            (group[i].distortion, loss)
            for i, loss in measured.items()
            if group[i].distortion > 0 and loss > 0 and kind in (None, group[i].spec.format.params)
        )

    losses = []
    for i, candidate in enumerate(group):
        points = known(candidate.spec.format.params) or known(None)
        loss = measured.get(i)
        if loss is None and points and candidate.distortion > 0:
            x, ratio = np.log([d for d, _ in points]), np.log([loss / d for d, loss in points])
            loss = float(
                candidate.distortion * np.exp(np.interp(np.log(candidate.distortion), x, ratio))
            )
        losses.append(loss or 0.0)
    return losses


def layer_jobs(
    layer: int, keys: Sequence[Candidate], values: Sequence[Candidate], bits: float, count: int
) -> list[Job]:
    """The candidates of one layer that are measured; arguments as in `sensitivities`."""
    sides: tuple[tuple[str, Sequence[Candidate]], ...] = (("key", keys), ("value", values))
    return [(side, layer, c) for side, group in sides for c in probed(group, bits, count)]


def sensitivities(
    keys: list[list[KeyCandidate]],
    values: list[list[ValueCandidate]],
    bits: float,
    count: int,
    find: Callable[[Sequence[Job]], dict[Job, float]],
) -> tuple[list[list[float]], list[list[float]]]:
    """Loss in nats of every candidate, from those of `count` of each side of each layer.

    Args:
        keys, values: candidates of each layer.
        bits: payload around which candidates are measured.
        find: losses of some.
    Returns:
        (losses of key candidates, losses of value candidates), one list a layer.
    """
    pairs = enumerate(zip(keys, values, strict=True))
    jobs = [job for layer, pair in pairs for job in layer_jobs(layer, *pair, bits, count)]
    found = find(jobs)

    def losses(side: str, groups: Sequence[Sequence[Candidate]]) -> list[list[float]]:
        return [
            extrapolate(
                group, {c: found[side, layer, c] for s, i, c in jobs if s == side and i == layer}
            )
            for layer, group in enumerate(groups)
        ]

    return losses("key", keys), losses("value", values)
