"""How a head's block of a page is laid out for tensor cores: a format as the constants that kernels
are compiled for, and what the tables of gpu/tables.py are made of.

Tensor-core operands have power-of-two shapes of 16 and more, so a class of n channels is cut into
runs of 128, 64, 32 and 16 channels, the last one padded.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from kvfold.kernels.formats import Format
from kvfold.kernels.kinds.storage import FIELDS, Storage

LONGEST_RUN = 128


@dataclass(frozen=True)
class Words:
    """The words of one plane that hold a run of channels."""

    width: int  # bits of a code: 1, 2 or 4
    half: int  # for one bit: which of the two channels of a word
    offset: int  # bytes from the head's block to the run's first word
    stride: int  # bytes from one row of words to the next
    fields_4: int  # bytes from fields 0-3 to fields 4-7, for four bits
    # how far codes of one bit are masked to the left, to be worth what they are in the whole code
    left: int


@dataclass(frozen=True)
class Run:
    """A run of channels: one operand of a matrix product."""

    start: int  # first channel
    size: int  # channels, a power of two
    valid: int  # channels that exist
    group: int  # parameter group
    step: float  # what one unit of the code is worth, before the token's scale
    # (levels − 1) / 2, the zero point of symmetric codes; 0 where another run has it or codes have
    # a minimum
    middle: float
    low: tuple[Words, ...] = ()  # planes that make up the code, of 16-bit and ternary channels none
    high: tuple[Words, ...] = ()  # planes from bit 4 on, summed up apart

    @property
    def words(self) -> Words:
        """Of a run of one plane."""
        return self.low[0]


@dataclass(frozen=True)
class PlaneLayout:
    """One plane of binary or 16-bit codes, for those who write it."""

    start: int  # first channel
    channels: int
    width: int  # bits
    shift: int  # position of these bits in the code; of the second plane of a code > 0
    offset: int  # bytes from the head's block
    words: int  # of a row


@dataclass(frozen=True, eq=False)
class HeadLayout:
    """A format in pages of one size. There is one object for each (`head_layout`), so it is
    compared and hashed by what it is: a launch looks its kernel up by it.

    Attributes:
        device: name of the module with its device code, which gpu/kinds.py replaces by its
            functions.
        raw: channels are stored in 16 bits.
        minimum: codes count from a minimum; else, unless raw, about zero.
        own: the kind of code has device code of its own, and the kernels that read tables need it
            too.
        ahead: as in `Storage`.
        parts: what else its device code must know, as `Storage.parts` gives it.
        planes: binary and 16-bit codes, in the order of the block.
        key_runs: for products along channels: a run for each plane.
        value_runs: for products along tokens: a run with all of its planes.
        groups: parameter groups, of group_size channels.
        params: bytes from the head's block to the first parameter.
        param_nbytes: 1 is e4m3, 2 float16.
        rows: R, rows of words in a page.
        nbytes: of one head's block.
        head_dim: channels, of which `coded` are stored.
        unit, field_units: as in `Storage`, or of the kind itself.
        p_factor: on probabilities that are cast to float16, so that neither small nor large scales
            leave its range.
    """

    device: Any
    raw: bool
    minimum: bool
    own: bool
    ahead: bool
    parts: Any
    planes: tuple[PlaneLayout, ...]
    key_runs: tuple[Run, ...]
    value_runs: tuple[Run, ...]
    groups: int
    group_size: int
    params: int
    param_nbytes: int
    rows: int
    nbytes: int
    head_dim: int
    coded: int
    p_factor: float
    unit: float
    field_units: tuple[float, ...]

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return FIELDS * self.rows


def cut(channels: int) -> list[tuple[int, int, int]]:
    """(start, size, valid) of runs that cover `channels` channels."""
    runs, start = [], 0
    while start < channels:
        left = channels - start
        size = max(16, min(LONGEST_RUN, 1 << (left.bit_length() - 1)))
        runs.append((start, size, min(size, left)))
        start += size
    return runs


def _cut_between(channels: int, group: int, halves: bool) -> list[tuple[int, int, int]]:
    """Runs of one class that cross no parameter group and, where a plane has one bit, no half."""
    edges = {0, channels, *range(0, channels, group)} | ({channels // 2} if halves else set())
    ordered = sorted(edges)
    return [
        (low + start, size, valid)
        for low, high in pairwise(ordered)
        for start, size, valid in cut(high - low)
    ]


def _p_factor(fmt: Format) -> float:
    """128 for e4m3 scales (448 · 128 < 65504); float16 scales are of many levels and so smaller: a
    step of unit-variance values is about 4 / (levels − 1)."""
    if fmt.param_dtype == "e4m3":
        return 128.0
    levels = max(n for _, n in fmt.classes)
    return 128.0 * 2.0 ** int(math.log2(max(3, min(levels, 256) - 1) / 3))


def _words(plane: PlaneLayout, rows: int, channel: int, left: int) -> Words:
    """The words of a plane from a channel of its class on."""
    half = int(plane.width == 1 and channel >= plane.channels // 2)
    stride = 2 * plane.words
    return Words(
        plane.width,
        half,
        plane.offset + 2 * (channel - half * plane.words),
        stride,
        rows * stride,
        left,
    )


def _planes(fmt: Format, page_tokens: int) -> tuple[tuple[PlaneLayout, ...], int]:
    """Planes whose words the tables describe, and the bytes of all."""
    found, offset = [], 0
    for plane in fmt.planes:
        words = plane.channels // 2 if plane.width == 1 else plane.channels
        if plane.storage.binary or fmt.raw:
            found.append(
                PlaneLayout(plane.start, plane.channels, plane.width, plane.shift, offset, words)
            )
        offset += plane.nbytes(page_tokens)
    return tuple(found), offset


def _whole_runs(fmt: Format, storage: Storage, group_size: int) -> tuple[Run, ...]:
    """Runs of codes that one plane holds, for keys and for values."""
    dim, size = fmt.head_dim, storage.run
    levels = fmt.classes[0][1]
    step, middle = fmt.kind.step(levels), fmt.kind.middle(levels)
    runs = [(start, size, size) for start in range(0, dim, size)] if size else cut(dim)
    return tuple(
        Run(start, size, valid, start // group_size, step, middle) for start, size, valid in runs
    )


def _binary_runs(
    fmt: Format, planes: tuple[PlaneLayout, ...], rows: int, group_size: int
) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """(key runs, value runs) of binary codes."""
    key_runs, value_runs = [], []
    first = 0
    for channels, levels in fmt.classes:
        own = [plane for plane in planes if plane.start == first and levels]
        step, middle = fmt.kind.step(levels), fmt.kind.middle(levels)
        for plane in own:
            unit = step * 2**plane.shift
            for start, size, valid in _cut_between(channels, group_size, plane.width == 1):
                low, group = 0.0 if plane.shift else middle, (first + start) // group_size
                words = (_words(plane, rows, start, 0),)
                key_runs.append(Run(first + start, size, valid, group, unit, low, words))
        for start, size, valid in _cut_between(
            channels, group_size, any(plane.width == 1 for plane in own)
        ):
            parts: tuple[list[Words], list[Words]] = ([], [])
            for plane in own:
                parts[plane.shift >= 4].append(_words(plane, rows, start, plane.shift % 4))
            low_words, high_words = map(tuple, parts)
            group = (first + start) // group_size
            value_runs.append(
                Run(first + start, size, valid, group, step, middle, low_words, high_words)
            )
        first += channels
    return tuple(key_runs), tuple(value_runs)


@cache
def head_layout(fmt: Format, page_tokens: int) -> HeadLayout:
    """The layout of a format in pages of `page_tokens` tokens, a power of two from 8 to 128."""
    rows = page_tokens // FIELDS
    groups, kind = fmt.num_groups, fmt.kind
    group_size = fmt.head_dim // groups
    planes, params = _planes(fmt, page_tokens)
    storage = fmt.planes[0].storage
    if storage.binary:
        key_runs, value_runs = _binary_runs(fmt, planes, rows, group_size)
    else:
        key_runs = value_runs = _whole_runs(fmt, storage, group_size)
    return HeadLayout(
        device=kind.device or storage.device,
        raw=kind.raw,
        minimum=kind.minimum,
        own=bool(kind.device),
        ahead=storage.ahead,
        parts=storage.parts(fmt.head_dim),
        planes=planes,
        key_runs=key_runs,
        value_runs=value_runs,
        groups=groups,
        group_size=group_size,
        params=params,
        param_nbytes=fmt.param_nbytes,
        rows=rows,
        nbytes=fmt.nbytes(page_tokens),
        head_dim=fmt.head_dim,
        coded=sum(channels for channels, n in fmt.classes if n),
        p_factor=_p_factor(fmt) / (kind.unit or 1.0),
        unit=kind.unit or storage.unit,
        field_units=kind.field_units or storage.field_units,
    )
