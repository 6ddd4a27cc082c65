"""Trits: codes of three levels, five to a byte. Plain torch; gpu/device/ternary.py reads and writes
the same on a GPU.

Words and rows are those of bits.py. Five codes are a byte, ceil(256·v / 243) with v = Σ_k
c_k·3^(4−k): digit k is (3·((byte·3^k) mod 256)) >> 8, no division. Channel t·16 + u (0 ≤ u < 16) is
column u of tile t. In each row and column the codes are numbered t·8 + f; numbers 5i … 5i+4 are
digits 0 … 4 of byte i. What is left over, the last L = (n/2) mod 5 codes, takes 2 bits each, low
bits first: in four bits for L ≤ 2, in one more byte for L > 2. The bytes are numbered; of B of
them, in words of 16 columns side by side:

    bytes 2k and 2k+1         R rows × 16 words for each k < floor(B/2): low byte 2k, high byte 2k+1
    an odd last byte          ceil(R/2) rows × 16 words: low byte row 2q, high byte row 2q+1 four
    bits left over       ceil(R/4) rows × 16 words: from the low bits up rows 4q, 4q+1, 4q+2, 4q+3

Rows past the last are zero.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvfold.kernels.kinds.storage import FIELDS, Storage

TRITS_PER_BYTE = 5
TRIT_CHANNELS = 16  # channels of one tile


def trit_parts(channels: int) -> tuple[int, int]:
    """(whole bytes, codes left over) of one row and one of 16 columns; `channels` a multiple of
    16."""
    return divmod(FIELDS * (channels // TRIT_CHANNELS), TRITS_PER_BYTE)


def trit_nbytes(tokens: int, channels: int) -> int:
    """Bytes of a ternary plane of a page."""
    rows = tokens // FIELDS
    whole, left = trit_parts(channels)
    half_words = whole + (left > 2)
    words = (
        half_words // 2 * rows + half_words % 2 * -(-rows // 2) + (0 < left <= 2) * -(-rows // 4)
    )
    return words * TRIT_CHANNELS * 2


def pack_trits(codes: Tensor) -> Tensor:
    """Packs ternary codes, uint8 [..., P, n] with values 0, 1, 2 → uint8 [..., trit_nbytes(P, n)];
    n a multiple of 16."""
    rows, channels = codes.shape[-2] // FIELDS, codes.shape[-1]
    whole, left = trit_parts(channels)
    tiles = codes.unflatten(-1, (channels // TRIT_CHANNELS, TRIT_CHANNELS)).unflatten(
        -3, (FIELDS, rows)
    )
    numbered = tiles.movedim(-2, -4).flatten(-4, -3)  # [..., 8 · tiles, R, 16]
    five = (
        numbered[..., : TRITS_PER_BYTE * whole, :, :]
        .unflatten(-3, (whole, TRITS_PER_BYTE))
        .unbind(-3)
    )
    value = five[0]  # at most 242: uint8 holds it
    for digit in five[1:]:
        value = value * 3 + digit
    halves = (value.int() * 256 + 242) // 243  # [..., whole, R, 16]
    rest = [numbered[..., TRITS_PER_BYTE * whole + j, :, :].int() << 2 * j for j in range(left)]
    if left > 2:
        halves = torch.cat((halves, sum(rest[1:], rest[0]).unsqueeze(-3)), -3)
    halves = halves.to(torch.uint8)
    count = halves.shape[-3]
    pairs = (
        halves[..., : count // 2 * 2, :, :].unflatten(-3, (-1, 2)).movedim(-3, -1)
    )  # [..., words, R, 16, byte]
    parts = [pairs.flatten(-4)]
    if count % 2:
        last = torch.nn.functional.pad(
            halves[..., -1, :, :], (0, 0, 0, rows % 2)
        )  # [..., even R, 16]
        parts.append(last.unflatten(-2, (-1, 2)).transpose(-1, -2).flatten(-3))
    if 0 < left <= 2:
        nibble = torch.nn.functional.pad(sum(rest[1:], rest[0]), (0, 0, 0, -rows % 4)).unflatten(
            -2, (-1, 2, 2)
        )
        data = (nibble[..., 0, :] | nibble[..., 1, :] << 4).to(
            torch.uint8
        )  # [..., rows/4, byte, 16]
        parts.append(data.transpose(-1, -2).flatten(-3))
    return torch.cat(parts, -1)


def unpack_trits(packed: Tensor, tokens: int, channels: int) -> Tensor:
    """Inverse of `pack_trits`: uint8 [..., trit_nbytes(P, n)] → uint8 [..., P, n]."""
    rows = tokens // FIELDS
    whole, left = trit_parts(channels)
    count = whole + (left > 2)
    start = count // 2 * rows * TRIT_CHANNELS * 2
    halves = (
        packed[..., :start]
        .unflatten(-1, (count // 2, rows, TRIT_CHANNELS, 2))
        .movedim(-1, -3)
        .flatten(-4, -3)
    )
    if count % 2:
        size = -(-rows // 2)
        last = packed[..., start : start + size * TRIT_CHANNELS * 2].unflatten(
            -1, (size, TRIT_CHANNELS, 2)
        )
        start += size * TRIT_CHANNELS * 2
        halves = torch.cat(
            (halves, last.transpose(-1, -2).flatten(-3, -2)[..., None, :rows, :]), -3
        )
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int32, device=packed.device)[:, None, None]
    bytes_ = halves[..., :whole, :, :].unsqueeze(-3).int()  # [..., whole, 1, R, 16]
    numbered = (
        ((((bytes_ * powers) & 255) * 3) >> 8).to(torch.uint8).flatten(-4, -3)
    )  # [..., 5·whole, R, 16]
    if left > 2:
        rest = torch.stack([(halves[..., -1, :, :] >> 2 * j) & 3 for j in range(left)], -3)
        numbered = torch.cat((numbered, rest), -3)
    elif left:
        data = (
            packed[..., start:].unflatten(-1, (-1, TRIT_CHANNELS, 2)).transpose(-1, -2)
        )  # [..., rows/4, byte, 16]
        nibble = torch.stack((data & 15, data >> 4), -2).flatten(-4, -2)[..., :rows, :]
        numbered = torch.cat(
            (numbered, torch.stack([(nibble >> 2 * j) & 3 for j in range(left)], -3)), -3
        )
    fields = numbered.unflatten(-3, (-1, FIELDS)).movedim(-4, -2)  # [..., 8, R, C, 16]
    return fields.flatten(-2).flatten(-3, -2)


class TritParts(NamedTuple):
    """What a row of ternary codes has in each of 16 columns."""

    whole: int  # bytes of five codes
    left: int  # codes left over
    words: int  # words of two bytes, those left over apart


def _parts(channels: int) -> TritParts:
    whole, left = trit_parts(channels)
    return TritParts(whole, left, (whole + (left > 2)) // 2)


TRITS = Storage(
    trit_nbytes,
    pack_trits,
    unpack_trits,
    lambda channels: -(-channels // TRITS_PER_BYTE),
    8 / TRITS_PER_BYTE,
    "kvfold.kernels.gpu.device.ternary",
    name="ternary",
    tile=TRIT_CHANNELS,
    run=TRIT_CHANNELS,
    ahead=True,
    unit=1 / 256,  # digits are masked where they stand, at 4^4
    field_units=(1.0,) * FIELDS,
    parts=_parts,
)
