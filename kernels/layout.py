"""What the Triton kernels are compiled for: a format as constant tuples of tiles, each a run of channels of one plane.

Tensor-core operands have power-of-two shapes of 16 and more, so a run of n channels is cut into pieces of 128, 64, 32 and
16 channels, the last one padded. Tuples, not objects, because they are compile-time constants of a kernel.
"""

import math
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

from kvfold.kernels.formats import GAUSSIAN_STEP, RAW, TRIT, Format
from kvfold.kernels.packing import FIELDS, TRIT_CHANNELS, trit_parts

MAX_PIECE = 128


class Tile(NamedTuple):
    """A run of channels of one plane."""

    width: int  # bits: 1, 2 or 4
    half: int  # for one bit: which of the two channels of a word
    offset: int  # bytes from the head's block to the tile's first word
    row: int  # bytes from one row of words to the next
    fields_4: int  # bytes from fields 0-3 to fields 4-7, for four bits
    start: int  # first channel
    size: int  # channels, a power of two
    valid: int  # channels that exist
    group: int  # parameter group
    step: float  # what one unit of this plane is worth, before the token's scale
    middle: float  # half a unit less than half of the levels, for the plane of the low bits of symmetric codes; else 0


class Piece(NamedTuple):
    """A run of channels of the output and the planes that it is made of."""

    start: int
    size: int
    valid: int
    group: int
    step: float
    middle: float
    low: tuple[tuple[int, int, int, int, int, int], ...]  # (width, half, offset, row, fields_4, left shift) of planes
    high: tuple[tuple[int, int, int, int, int, int], ...]  # the same for planes from bit 4 on


class TritLayout(NamedTuple):
    """Where the codes of a ternary head stand; see packing.py."""

    chunks: int  # of 16 channels
    whole: int  # bytes of five codes
    left: int  # codes left over
    words: int  # word tiles of R rows
    rows: int  # R


class Program(NamedTuple):
    """A format as a kernel's constants.

    Attributes:
        kind: "scale", "scale_min" or "raw".
        trits: TritLayout as a tuple, or () if the codes are binary.
        tiles: Tile tuples, for products along channels (keys).
        pieces: Piece tuples, for products along tokens (values).
        groups: parameter groups.
        params: bytes from the head's block to the first parameter.
        fp16: parameters are float16, else e4m3.
        rows: R, rows of words in a page.
        nbytes: of one head's block.
        head_dim: channels.
        weight: factor on probabilities that are cast to float16, so that neither small nor large scales leave its range.
    """

    kind: str
    trits: tuple
    tiles: tuple
    pieces: tuple
    groups: int
    params: int
    fp16: bool
    rows: int
    nbytes: int
    head_dim: int
    weight: float


def cut(channels: int) -> list[tuple[int, int, int]]:
    """(start, size, valid) of pieces that cover `channels` channels."""
    pieces, start = [], 0
    while start < channels:
        left = channels - start
        size = max(16, min(MAX_PIECE, 1 << (left.bit_length() - 1)))
        pieces.append((start, size, min(size, left)))
        start += size
    return pieces


def _runs(channels: int, group: int, halves: bool) -> list[tuple[int, int, int]]:
    """Pieces of one class that cross no parameter group and, where a plane has one bit, no half."""
    edges = {0, channels, *range(0, channels, group)} | ({channels // 2} if halves else set())
    ordered = sorted(edges)
    return [(low + start, size, valid) for low, high in pairwise(ordered) for start, size, valid in cut(high - low)]


def _weight(fmt: Format) -> float:
    """128 for e4m3 scales (448 · 128 < 65504); float16 scales are of many levels and so smaller: a step of unit-variance
    values is about 4 / (levels − 1)."""
    if fmt.param_dtype == "e4m3":
        return 128.0
    levels = max(n for _, n in fmt.classes)
    return 128.0 * 2.0 ** int(math.log2(max(3, min(levels, 256) - 1) / 3))


@cache
def program(fmt: Format, page_tokens: int) -> Program:
    """The constants of a format in pages of `page_tokens` tokens, a power of two from 8 to 128."""
    rows = page_tokens // FIELDS
    levels = {n for _, n in fmt.classes}
    groups = fmt.num_groups if fmt.params == "scale_min" else 1
    nbytes = fmt.nbytes(page_tokens)
    params = nbytes - page_tokens * fmt.num_params * fmt.param_nbytes
    common: dict[str, Any] = {
        "groups": groups, "params": params, "fp16": fmt.param_dtype == "fp16", "rows": rows, "nbytes": nbytes,
        "head_dim": fmt.head_dim, "weight": _weight(fmt),
    }  # fmt: skip
    group_size = fmt.head_dim // groups
    if levels == {RAW}:
        pieces = tuple(Piece(a, n, valid, 0, 1.0, 0.0, (), ()) for a, n, valid in cut(fmt.head_dim))
        return Program("raw", (), (), tuple(map(tuple, pieces)), **common)
    symmetric = fmt.params == "scale"
    if 3 in levels:
        whole, left = trit_parts(fmt.head_dim)
        layout = TritLayout(
            fmt.head_dim // TRIT_CHANNELS, whole, left, (whole + (left > 2)) // 2, rows
        )  # fmt: skip
        step, middle = (GAUSSIAN_STEP[3], 1.0) if symmetric else (1.0, 0.0)
        pieces = tuple(
            Piece(
                c * TRIT_CHANNELS, TRIT_CHANNELS, TRIT_CHANNELS, c * TRIT_CHANNELS // group_size, step, middle, (), ()
            )
            for c in range(layout.chunks)
        )
        return Program(fmt.params, tuple(layout), (), tuple(map(tuple, pieces)), **common)
    tiles: list[Tile] = []
    value_pieces: list[Piece] = []
    offset = first = 0
    for channels, n in fmt.classes:
        planes = [p for p in fmt.planes if p.start == first and p.channels == channels] if n else []
        assert all(p.width != TRIT for p in planes)
        step, middle = (GAUSSIAN_STEP[n], (n - 1) / 2) if symmetric and n else (1.0, 0.0)
        halves = any(p.width == 1 for p in planes)
        parts: dict[tuple[int, int, int], dict[bool, list]] = {}
        for run in _runs(channels, group_size, halves):
            parts[run] = {False: [], True: []}
        for plane in planes:
            row = 2 * channels // (2 if plane.width == 1 else 1)

            def where(start: int, plane=plane, row=row, offset=offset, channels=channels) -> tuple[int, ...]:
                half = int(plane.width == 1 and start >= channels // 2)
                column = start - half * channels // 2
                return plane.width, half, offset + 2 * column, row, rows * row

            for start, size, valid in _runs(channels, group_size, plane.width == 1):
                low = middle if plane.shift == 0 else 0.0
                unit = step * 2**plane.shift
                group = (first + start) // group_size
                tiles.append(Tile(*where(start), first + start, size, valid, group, unit, low))  # type: ignore[call-arg]
            for run, found in parts.items():
                high = plane.shift >= 4
                found[high].append((*where(run[0]), plane.shift - 4 * high))
            offset += plane.nbytes(page_tokens)
        for (start, size, valid), planes_of in parts.items():
            group = (first + start) // group_size
            value_pieces.append(
                Piece(first + start, size, valid, group, step, middle, tuple(planes_of[False]), tuple(planes_of[True]))
            )
        first += channels
    return Program(fmt.params, (), tuple(map(tuple, tiles)), tuple(map(tuple, value_pieces)), **common)
