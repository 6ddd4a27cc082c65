"""The ladders of formats that pages go down under the progressive policy, and the order in which
they do.

After PM-KVQ (arXiv 2505.18610), which lowers whole layers; here one page goes down at a time, the
least harmful first.

**Ladder.** Each layer has rungs, floor first: the searched formats, 4 bits, 8 bits, 16 bits, keys
and values together. A rung that is hardly larger than the one below is left out. All rungs have the
floor's basis, where channels of symmetric formats have unit variance but not one importance. At 4
bits a minimum and a scale of 8 bits serve all floors of the catalogue, so that one kernel a side
does: that costs keys twice what the floor's own classes with the same number of bits more each
would, which take half a bit more, and values nothing. Keys of other floors, which mostly come from
before keys were stored without their rotating mean, have those classes: there it is five times. At
8 bits the rounding of parameters to e4m3 and the tails that a symmetric code cuts off outweigh all
else, so that a minimum and a scale of 16 bits are best (benchmarks/LOG.md has the errors of
attention that this was chosen by).

**Harm.** The artifact states the loss L of a layer's keys and of its values when all pages stand on
the floor. Error is quadratic in a small distortion, so a page on rung r costs L · ρ(r), with ρ the
format's distortion as a part of the floor's: the mean over channels of MSE(levels on r) /
MSE(levels on the floor) for a Gaussian source (`CodeKind.error`). Dividing by the
floor's own takes each channel as important as its bits say: reverse water-filling makes the floor's
errors equal. A step down costs ΔL·ρ for the bytes that it frees; `Ladders.order` sorts all steps of
all layers by that ratio.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.catalogue import key_formats, value_formats
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.kernels.kinds import STORAGES
from kvfold.kernels.kinds.interface import levels_of
from kvfold.kernels.kinds.levels import PLANE_WIDTHS

CODE_BITS = (4, 8)  # of the rungs between the floor and 16 bits
# how many times larger a rung must be than the one below, or it is left out: to lower it would free
# too little
WORTH = 1.125
WIDTHS = {  # bits → levels of binary codes
    sum(widths): levels
    for levels, widths in PLANE_WIDTHS.items()
    if all(STORAGES[width].binary for width in widths)
}


def finer(floor: Format, bits: int) -> Format:
    """`floor` with more bits, so that a channel has `bits` in the mean; `floor` itself if it takes
    as much already."""
    if floor.raw:
        return floor
    if (
        bits == 8
    ):  # parameters of 8 bits, or a range fixed by a scale, would cost more than the codes do
        found = uniform(floor.head_dim, 256, "fp16")
    elif floor.kind.minimum:
        found = uniform(floor.head_dim, 2**bits, floor.param_dtype, floor.group_size)
    else:
        shared = floor in key_formats(floor.head_dim) or floor in value_formats(floor.head_dim)
        found = (
            widened(floor, bits)
            if floor.kind.uniform and not shared
            else uniform(floor.head_dim, 2**bits)
        )
    return found if found.payload_bits > floor.payload_bits else floor


def widened(floor: Format, bits: int) -> Format:
    """Classes of symmetric codes with the same number of bits more, up to 8, the least that gives
    `bits` in the mean."""
    own = [
        (n, math.ceil(sum(STORAGES[width].bits for width in PLANE_WIDTHS[levels])))
        for n, levels in floor.classes
    ]
    for more in range(9):
        wide = [
            (channels, min(w for w in WIDTHS if w >= min(width + more, 8)))
            for channels, width in own
        ]
        if sum(channels * width for channels, width in wide) >= bits * floor.head_dim:
            break
    merged: list[tuple[int, int]] = []
    for channels, width in wide:
        if merged and merged[-1][1] == WIDTHS[width]:
            channels += merged.pop()[0]
        merged.append((channels, WIDTHS[width]))
    return replace(floor, classes=tuple(merged))


def ladder(spec: LayerSpec) -> tuple[LayerSpec, ...]:
    """The rungs of a layer, floor first and 16 bits last. All are in the floor's basis, which only
    the floor carries; its clips go with its own formats."""
    dim = spec.key.format.head_dim
    pairs = [(finer(spec.key.format, bits), finer(spec.value.format, bits)) for bits in CODE_BITS]
    rungs = [spec]
    for key, value in [*pairs, (raw16(dim), raw16(dim))]:
        last = rungs[-1]
        size = key.payload_bits + value.payload_bits
        if size >= WORTH * (last.key.format.payload_bits + last.value.format.payload_bits):
            key_clip = spec.key.clip if key == spec.key.format else None
            value_clip = spec.value.clip if value == spec.value.format else None
            rungs.append(LayerSpec(KeySpec(key, clip=key_clip), ValueSpec(value, clip=value_clip)))
    return tuple(rungs)


def distortion(fmt: Format, floor: Format) -> float:
    """ρ: distortion of a format as a part of the floor's, in [0, 1]."""

    def errors(fmt: Format) -> list[float]:
        return [fmt.kind.error(levels) for levels in levels_of(fmt)]

    parts = [a / b if b else 0.0 for a, b in zip(errors(fmt), errors(floor), strict=True)]
    return min(
        1.0, sum(parts) / len(parts)
    )  # a rung that the mean takes for worse measures better than the floor


@dataclass(frozen=True)
class Step:
    """What a page of a layer frees, and costs, when it goes from `rung` to the next lower one."""

    layer: int
    rung: int
    freed: int  # bytes
    harm: float  # nats per token that the layer's pages add, per freed byte


@dataclass(frozen=True)
class Plan:
    """Pages to be lowered and rungs for new ones.

    Attributes:
        moves: [layer][rung], resident pages that go from that rung to the next lower one; the top
            rung's go first.
        fresh: [layer][rung], new pages that are written on that rung.
    """

    moves: list[list[int]]
    fresh: list[list[int]]


class Ladders:
    """The ladders of all layers and the order in which pages go down them.

    Args:
        specs: of the layers.
        losses: predicted loss, nats, of each layer's keys and values on the floor, from
            kv_cache.json.
        geometry: of the cache.
    """

    # a step takes all pages of a layer at once, and new pages start where the layer stands
    whole_layers = False

    def __init__(
        self, specs: Sequence[LayerSpec], losses: Sequence[tuple[float, float]], geometry: Geometry
    ) -> None:
        self.rungs = [ladder(spec) for spec in specs]
        self.sizes = [
            [geometry.of_layer(i).pair_nbytes(r.key.format, r.value.format) for r in rungs]
            for i, rungs in enumerate(self.rungs)
        ]
        # bytes to keep free while any page may go down: it stands on both rungs for a moment
        self.slack = max((sizes[-2] for sizes in self.sizes if len(sizes) > 1), default=0)
        self.order = sorted(
            self.steps(losses), key=lambda step: (step.harm, -step.rung, step.layer)
        )

    def steps(self, losses: Sequence[tuple[float, float]]) -> list[Step]:
        """All steps of all layers; the harm of a layer's steps never falls on the way down."""
        found = []
        for layer, (rungs, sizes, (key_loss, value_loss)) in enumerate(
            zip(self.rungs, self.sizes, losses, strict=True)
        ):
            floor = rungs[0]
            cost = [
                key_loss * distortion(r.key.format, floor.key.format)
                + value_loss * distortion(r.value.format, floor.value.format)
                for r in rungs
            ]
            harm = 0.0
            for rung in range(len(rungs) - 1, 0, -1):
                freed = sizes[rung] - sizes[rung - 1]
                harm = max(harm, (cost[rung - 1] - cost[rung]) / freed)
                found.append(Step(layer, rung, freed, harm))
        return found

    def least_nbytes(self, geometry: Geometry, tokens: int) -> int:
        """Bytes of one sequence's cache with all pages on the floor."""
        fixed = geometry.all_fixed_nbytes(tokens, len(self.sizes))
        fixed += sum(geometry.segments_nbytes(len(sizes)) for sizes in self.sizes)
        return fixed + geometry.num_pages(tokens) * sum(sizes[0] for sizes in self.sizes)

    def plan(
        self, counts: Sequence[Sequence[int]], new: int, nbytes: int, budget: int
    ) -> Plan | None:
        """Lowers pages, resident and new ones, until all fit; resident ones of a rung before new
        ones.

        Args:
            counts: [layer][rung], resident pages.
            new: pages that each layer is about to get.
            nbytes: what is resident without the new pages.
            budget: what may be resident with them.
        Returns:
            None if even the floor does not fit.
        """
        moves = [[0] * len(sizes) for sizes in self.sizes]
        fresh = [[0] * len(sizes) for sizes in self.sizes]
        have = [list(row) for row in counts]
        excess = nbytes + self.slack - budget
        for row, sizes, young in zip(have, self.sizes, fresh, strict=True):
            start = (
                next((r for r, n in enumerate(row) if n), len(sizes) - 1)
                if self.whole_layers
                else len(sizes) - 1
            )
            young[start] = new
            excess += new * sizes[start]
        if excess <= 0:
            return Plan(moves, fresh)
        for step in self.order:
            row, young, r = have[step.layer], fresh[step.layer], step.rung
            count = row[r] + young[r]
            if not count:
                continue
            if not self.whole_layers:
                count = min(count, -(-excess // step.freed))
            old = min(count, row[r])
            row[r] -= old
            row[r - 1] += old
            moves[step.layer][r] += old
            young[r] -= count - old
            young[r - 1] += count - old
            excess -= count * step.freed
            if excess <= 0:
                return Plan(moves, fresh)
        return (
            Plan(moves, fresh) if excess <= self.slack else None
        )  # all on the floor: none will stand on two rungs
