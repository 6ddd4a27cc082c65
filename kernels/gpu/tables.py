"""Layouts as data: what the kernels that write and decode pages read at run time, so that one
kernel serves all formats.

A table is int32: a header, then rows of head_dim numbers, one a channel. Channels are stored in at
most two planes (formats.py); a plane of one bit joins two channels in a word, written by the first
of them, whose `PARTNER` is the other. Ternary codes share words across channels by a rule of their
own (kinds/trits.py) that needs only the header.
"""

import struct
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.kernels.formats import Format
from kvfold.kernels.gpu.device.columns import (
    ALONG,
    CODED,
    FACTORS,
    GROUP_SIZE,
    HEAD_DIM,
    HEADER,
    KIND,
    LEVELS,
    MOST_UNITS,
    NBYTES,
    OWN_CODE,
    PARAM_NBYTES,
    PARAMS,
    PARTNER,
    PARTS,
    PLANE_0,
    PLANE_1,
    RAW,
    ROWS,
    SCALE,
    SCALE_MIN,
    STEP,
    TRIALS,
    WEIGHT,
    WIDTHS,
)
from kvfold.kernels.gpu.kinds import DeviceCode, device_code, own_code
from kvfold.kernels.kinds import symmetric
from kvfold.kernels.layout import HeadLayout, head_layout


def table_length(head_dim: int) -> int:
    """Numbers of one format's table."""
    return HEADER.value + ROWS.value * head_dim


def _kind(layout: HeadLayout, own: tuple[DeviceCode, ...]) -> int:
    """Number of a layout's kind of code; `own`: those that have code of their own."""
    if layout.own:
        return OWN_CODE.value + own.index(device_code(layout.device))
    return (RAW if layout.raw else SCALE_MIN if layout.minimum else SCALE).value


def _header(layout: HeadLayout, own: tuple[DeviceCode, ...]) -> list[int]:
    header = [0] * HEADER.value
    header[NBYTES.value] = layout.nbytes
    header[HEAD_DIM.value] = layout.head_dim
    header[KIND.value] = _kind(layout, own)
    header[PARAMS.value] = layout.params
    header[PARAM_NBYTES.value] = layout.param_nbytes
    header[GROUP_SIZE.value] = layout.group_size
    header[CODED.value] = layout.coded
    header[PARTS.value : PARTS.value + len(layout.parts)] = layout.parts
    return header


def _bits(x: float) -> int:
    """Of a float32."""
    return int(struct.unpack("<i", struct.pack("<f", x))[0])


@cache
def _numbers(fmt: Format, page_tokens: int, own: tuple[DeviceCode, ...]) -> tuple[int, ...]:
    if page_tokens not in (8, 16, 32, 64, 128):
        raise KvfoldError(
            f"page_tokens={page_tokens} is not a power of two from 8 to 128; choose one that is."
        )
    layout = head_layout(fmt, page_tokens)
    dim = layout.head_dim
    header = _header(layout, own)
    searched = fmt.kind is symmetric.SYMMETRIC
    if searched:
        header[ALONG.value] = _bits(symmetric.ALONG)
        header[MOST_UNITS.value] = _bits(symmetric.MOST_UNITS)
        header[FACTORS.value : FACTORS.value + TRIALS.value] = map(_bits, symmetric.FACTORS)
    rows = [[0] * dim for _ in range(ROWS.value)]
    rows[PARTNER.value] = [-1] * dim
    start = 0
    for channels, levels in fmt.classes:
        run = slice(start, start + channels)
        rows[LEVELS.value][run] = [levels] * channels
        rows[STEP.value][run] = [_bits(fmt.kind.step(levels))] * channels
        if searched:
            rows[WEIGHT.value][run] = [_bits(symmetric.SYMMETRIC.weight(levels))] * channels
        start += channels
    for plane in layout.planes:
        place = PLANE_1.value if plane.shift else PLANE_0.value
        for j in range(plane.channels):
            c, half = plane.start + j, j // plane.words
            rows[place][c] = plane.offset // 2 + j % plane.words | plane.words << 16
            rows[WIDTHS.value][c] |= plane.width << 8 * (plane.shift > 0) | half << 16
            if plane.width == 1 and not half:
                rows[PARTNER.value][c] = c + plane.words
    return tuple(header + [number for row in rows for number in row])


@cache
def _tables(
    formats: tuple[tuple[Format, ...], ...], page_tokens: int, device: torch.device
) -> Tensor:
    for row in formats:
        for fmt in row:
            if fmt.head_dim != formats[0][0].head_dim:
                raise KvfoldError(
                    f"Formats of head_dim {fmt.head_dim} and {formats[0][0].head_dim} don't go together; "
                    "use one head_dim."
                )
    own = own_code(fmt for row in formats for fmt in row)
    data = [[_numbers(fmt, page_tokens, own) for fmt in row] for row in formats]
    with torch.inference_mode(False):  # it outlives the mode of whoever asks first
        return torch.tensor(data, dtype=torch.int32).to(
            device, non_blocking=True
        )  # a step must not wait for it


def format_tables(
    formats: Sequence[Sequence[Format]], page_tokens: int, device: torch.device
) -> Tensor:
    """The tables of some rows of formats, as many in each: int32 [rows, formats, table_length].
    Made once and kept.

    Raises:
        KvfoldError: page_tokens is not a power of two from 8 to 128, or the formats are of several
            head_dim.
    """
    return _tables(tuple(tuple(row) for row in formats), page_tokens, device)


def warps_for(page_tokens: int) -> int:
    """Warps of a program that writes or decodes one side of one head's page."""
    return max(4, page_tokens // 16)
