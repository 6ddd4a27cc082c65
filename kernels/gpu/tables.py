"""Formats as data: what the Triton kernels that write and decode pages read at run time, so that one kernel serves all formats.

A table is int32: a header, then rows of head_dim numbers, one a channel. Channels are stored in at most two planes (formats.py);
a plane of one bit joins two channels in a word, written by the first of them, whose `PARTNER` is the other. Ternary codes share
words across channels by a rule of their own (packing.py) that needs only the header.
"""

import struct
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.kernels.formats import GAUSSIAN_STEP, TRIT, Format
from kvfold.kernels.packing import trit_parts

HEADER = 16  # numbers before the rows
# places in the header
NBYTES = 0  # of one head's block
DIM = 1  # channels
KIND = 2  # of codes, one of:
KIND_SCALE, KIND_SCALE_MIN, KIND_RAW = 0, 1, 2
PARAMS = 3  # bytes from the block to the first parameter
PARAM_NBYTES = 4  # of one parameter: 1 is e4m3, 2 float16
GROUP_SIZE = 5  # channels of a parameter group
CODED = 6  # channels of more than 0 levels
WHOLE = 7  # ternary: bytes of five codes; 0 if the codes are binary
LEFT = 8  # ternary: codes left over
WORDS = 9  # ternary: word tiles of R rows

# rows
LEVELS = 0  # 0: not stored
STEP = 1  # bits of a float32: of symmetric codes, in units of the token's scale; else 1
PARTNER = 2  # channel that this one's words of one bit take in, or −1
WIDTHS = (
    3  # bits of a code in the first plane, 2^8 · those in the second, 2^16 · which of two channels of a word of one bit
)
PLANE_0 = 4  # words from the block to the first plane's word in row 0, and 2^16 · words from a row to the next
PLANE_1 = 5  # the same of the second plane
ROWS = 6


def table_length(head_dim: int) -> int:
    """Numbers of one format's table."""
    return HEADER + ROWS * head_dim


@cache
def _numbers(fmt: Format, page_tokens: int) -> tuple[int, ...]:
    if page_tokens not in (8, 16, 32, 64, 128):
        raise KvfoldError(f"page_tokens={page_tokens} is not a power of two from 8 to 128; choose one that is.")
    dim = fmt.head_dim
    kind = {"scale": KIND_SCALE, "scale_min": KIND_SCALE_MIN, "none": KIND_RAW}[fmt.params]
    header, rows = [0] * HEADER, [[0] * dim for _ in range(ROWS)]
    rows[PARTNER] = [-1] * dim
    start = 0
    for channels, levels in fmt.classes:
        step = GAUSSIAN_STEP.get(levels, 1.0) if kind == KIND_SCALE else 1.0
        own = slice(start, start + channels)
        rows[LEVELS][own] = [levels] * channels
        rows[STEP][own] = [struct.unpack("<i", struct.pack("<f", step))[0]] * channels
        start += channels
    offset = 0
    for plane in fmt.planes:
        n, second = plane.channels, plane.shift > 0
        words = n // 2 if plane.width == 1 else n  # of a row
        if plane.width == TRIT:
            whole, left = trit_parts(n)
            header[WHOLE], header[LEFT], header[WORDS] = whole, left, (whole + (left > 2)) // 2
        else:
            for j in range(n):
                c, half = plane.start + j, j // words
                rows[PLANE_1 if second else PLANE_0][c] = offset // 2 + j % words | words << 16
                rows[WIDTHS][c] |= plane.width << 8 * second | half << 16
                if plane.width == 1 and not half:
                    rows[PARTNER][c] = c + words
        offset += plane.nbytes(page_tokens)
    header[NBYTES], header[DIM], header[KIND], header[PARAMS] = fmt.nbytes(page_tokens), dim, kind, offset
    header[PARAM_NBYTES], header[GROUP_SIZE] = fmt.param_nbytes, dim // fmt.num_groups
    header[CODED] = sum(channels for channels, levels in fmt.classes if levels)
    return tuple(header + [number for row in rows for number in row])


@cache
def _tables(formats: tuple[tuple[Format, ...], ...], page_tokens: int, device: torch.device) -> Tensor:
    for row in formats:
        for fmt in row:
            if fmt.head_dim != formats[0][0].head_dim:
                raise KvfoldError(
                    f"Formats of head_dim {fmt.head_dim} and {formats[0][0].head_dim} don't go together; use one head_dim."
                )
    data = [[_numbers(fmt, page_tokens) for fmt in row] for row in formats]
    with torch.inference_mode(False):  # it outlives the mode of whoever asks first
        return torch.tensor(data, dtype=torch.int32).to(device, non_blocking=True)  # a step must not wait for it


def format_tables(formats: Sequence[Sequence[Format]], page_tokens: int, device: torch.device) -> Tensor:
    """The tables of some rows of formats, as many in each: int32 [rows, formats, table_length]. Made once and kept.

    Raises:
        KvfoldError: page_tokens is not a power of two from 8 to 128, or the formats are of several head_dim.
    """
    return _tables(tuple(tuple(row) for row in formats), page_tokens, device)


def warps_for(page_tokens: int) -> int:
    """Warps of a program that writes or decodes one side of one head's page."""
    return max(4, page_tokens // 16)
