"""Packs small integer codes of a page into bytes, and back. Plain torch.

A page holds P tokens, P = 8·R. Token f·R + r (0 ≤ f < 8, 0 ≤ r < R) is field f of row r, so that one
16-bit word of row r and one channel holds that channel's codes of eight tokens, and `word & mask`
without a shift gives one token's code times a power of four: what a tensor core can multiply as it
stands (a masked word is an fp16 subnormal, code·4^g·2^−24 with g = f mod 4; fields 4 to 7 come down
with one shift by 8). Words are little-endian; the n channels of a row stand side by side, rows
follow each other:

    w = 2   R rows × n words        bits 2f … 2f+1 are field f
    w = 1   R rows × n/2 words      bit 2f is field f of channel j, bit 2f+1 that of channel j + n/2
    w = 4   2·R rows × n words      rows 0 … R−1 hold fields 0 to 3, rows R … 2R−1 fields 4 to 7;
                                    inside a word, from the low bits up: fields 0, 2, 1, 3
                                    (or 4, 6, 5, 7), so that `word >> 6` brings the odd ones to
                                    where they stand at width 2

Ternary codes go five to a byte, ceil(256·v / 243) with v = Σ_k c_k·3^(4−k): digit k is
(3·((byte·3^k) mod 256)) >> 8, no division. Channel t·16 + u (0 ≤ u < 16) is column u of tile t. In
each row and column the codes are numbered t·8 + f; numbers 5i … 5i+4 are digits 0 … 4 of byte i.
What is left over, the last L = (n/2) mod 5 codes, takes 2 bits each, low bits first: in four bits
for L ≤ 2, in one more byte for L > 2. The bytes are numbered; of B of them, in words of 16 columns
side by side:

    bytes 2k and 2k+1         R rows × 16 words for each k < floor(B/2): low byte 2k, high byte 2k+1
    an odd last byte          ceil(R/2) rows × 16 words: low byte row 2q, high byte row 2q+1
    four bits left over       ceil(R/4) rows × 16 words: from the low bits up rows 4q, 4q+1, 4q+2, 4q+3

Rows past the last are zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

FIELDS = 8  # tokens that share a word
TRIT, SIXTEEN = 0, 16  # "widths" of ternary and of 16-bit planes
RAW = 65536  # levels of a 16-bit class
TRITS_PER_BYTE = 5
TRIT_CHANNELS = 16  # channels of one ternary tile


def plane_nbytes(tokens: int, channels: int, width: int) -> int:
    """Bytes of a plane of `width` bits of a page."""
    return tokens * channels * width // 8


def pack_plane(codes: Tensor, width: int) -> Tensor:
    """Packs codes of `width` bits.

    Args:
        codes: uint8 [..., P, n], each < 2**width; P a multiple of 8, n a multiple of 8.
        width: 1, 2 or 4 bits.
    Returns:
        uint8 [..., P·n·width/8].
    """
    n = codes.shape[-1]
    fields = codes.unflatten(-2, (FIELDS, -1))  # [..., 8, R, n]
    if width == 4:
        parts = fields.unflatten(-3, (2, 2, 2))  # [..., row set, high, byte, R, n]
        return _join(parts, -4, 4).movedim(-3, -1).flatten(-4)  # [..., set, R, n, byte]
    if width == 1:
        fields = _join(fields.unflatten(-1, (2, n // 2)), -2, 1)  # [..., 8, R, n/2]
    pairs = _join(fields.unflatten(-3, (2, 2, 2)), -3, 2)  # [..., byte, high, R, channels]
    return _join(pairs, -3, 4).movedim(-3, -1).flatten(-3)  # [..., R, channels, byte]


def _join(parts: Tensor, dim: int, shift: int) -> Tensor:
    """First of the two entries of `dim` in the low bits, second `shift` bits up."""
    low, high = parts.unbind(dim)
    return (high << shift).bitwise_or_(low)


def unpack_plane(packed: Tensor, width: int, tokens: int, channels: int) -> Tensor:
    """Inverse of `pack_plane`: uint8 [..., P·n·width/8] → uint8 [..., P, n]."""
    rows = tokens // FIELDS
    if width == 4:
        data = packed.unflatten(-1, (2, rows, channels, 2)).movedim(-1, -3)  # [..., set, byte, R, n]
        return torch.stack((data & 15, data >> 4), -4).flatten(-5, -2)  # of [..., set, high, byte, R, n]
    words = packed.unflatten(-1, (rows, channels * width // 2, 2)).movedim(-1, -3)  # [..., byte, R, channels]
    if width == 2:
        return torch.stack([(words >> s) & 3 for s in (0, 2, 4, 6)], -3).flatten(-4, -2)
    low = torch.stack([(words >> s) & 1 for s in (0, 2, 4, 6)], -3)  # [..., byte, 4, R, n/2]
    high = torch.stack([(words >> s) & 1 for s in (1, 3, 5, 7)], -3)
    return torch.cat((low, high), -1).flatten(-4, -2)


def trit_parts(channels: int) -> tuple[int, int]:
    """(whole bytes, codes left over) of one row and one of 16 columns; `channels` a multiple of 16."""
    return divmod(FIELDS * (channels // TRIT_CHANNELS), TRITS_PER_BYTE)


def trit_nbytes(tokens: int, channels: int) -> int:
    """Bytes of a ternary plane of a page."""
    rows = tokens // FIELDS
    whole, left = trit_parts(channels)
    half_words = whole + (left > 2)
    words = half_words // 2 * rows + half_words % 2 * -(-rows // 2) + (0 < left <= 2) * -(-rows // 4)
    return words * TRIT_CHANNELS * 2


def pack_trits(codes: Tensor) -> Tensor:
    """Packs ternary codes, uint8 [..., P, n] with values 0, 1, 2 → uint8 [..., trit_nbytes(P, n)];
    n a multiple of 16."""
    rows, channels = codes.shape[-2] // FIELDS, codes.shape[-1]
    whole, left = trit_parts(channels)
    tiles = codes.unflatten(-1, (channels // TRIT_CHANNELS, TRIT_CHANNELS)).unflatten(-3, (FIELDS, rows))
    numbered = tiles.movedim(-2, -4).flatten(-4, -3)  # [..., 8 · tiles, R, 16]
    five = numbered[..., : TRITS_PER_BYTE * whole, :, :].unflatten(-3, (whole, TRITS_PER_BYTE)).unbind(-3)
    value = five[0]  # at most 242: uint8 holds it
    for digit in five[1:]:
        value = value * 3 + digit
    halves = (value.int() * 256 + 242) // 243  # [..., whole, R, 16]
    rest = [numbered[..., TRITS_PER_BYTE * whole + j, :, :].int() << 2 * j for j in range(left)]
    if left > 2:
        halves = torch.cat((halves, sum(rest[1:], rest[0]).unsqueeze(-3)), -3)
    halves = halves.to(torch.uint8)
    count = halves.shape[-3]
    pairs = halves[..., : count // 2 * 2, :, :].unflatten(-3, (-1, 2)).movedim(-3, -1)  # [..., words, R, 16, byte]
    parts = [pairs.flatten(-4)]
    if count % 2:
        last = torch.nn.functional.pad(halves[..., -1, :, :], (0, 0, 0, rows % 2))  # [..., even R, 16]
        parts.append(last.unflatten(-2, (-1, 2)).transpose(-1, -2).flatten(-3))
    if 0 < left <= 2:
        nibble = torch.nn.functional.pad(sum(rest[1:], rest[0]), (0, 0, 0, -rows % 4)).unflatten(-2, (-1, 2, 2))
        data = (nibble[..., 0, :] | nibble[..., 1, :] << 4).to(torch.uint8)  # [..., rows/4, byte, 16]
        parts.append(data.transpose(-1, -2).flatten(-3))
    return torch.cat(parts, -1)


def unpack_trits(packed: Tensor, tokens: int, channels: int) -> Tensor:
    """Inverse of `pack_trits`: uint8 [..., trit_nbytes(P, n)] → uint8 [..., P, n]."""
    rows = tokens // FIELDS
    whole, left = trit_parts(channels)
    count = whole + (left > 2)
    start = count // 2 * rows * TRIT_CHANNELS * 2
    halves = packed[..., :start].unflatten(-1, (count // 2, rows, TRIT_CHANNELS, 2)).movedim(-1, -3).flatten(-4, -3)
    if count % 2:
        size = -(-rows // 2)
        last = packed[..., start : start + size * TRIT_CHANNELS * 2].unflatten(-1, (size, TRIT_CHANNELS, 2))
        start += size * TRIT_CHANNELS * 2
        halves = torch.cat((halves, last.transpose(-1, -2).flatten(-3, -2)[..., None, :rows, :]), -3)
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int32, device=packed.device)[:, None, None]
    bytes_ = halves[..., :whole, :, :].unsqueeze(-3).int()  # [..., whole, 1, R, 16]
    numbered = ((((bytes_ * powers) & 255) * 3) >> 8).to(torch.uint8).flatten(-4, -3)  # [..., 5·whole, R, 16]
    if left > 2:
        rest = torch.stack([(halves[..., -1, :, :] >> 2 * j) & 3 for j in range(left)], -3)
        numbered = torch.cat((numbered, rest), -3)
    elif left:
        data = packed[..., start:].unflatten(-1, (-1, TRIT_CHANNELS, 2)).transpose(-1, -2)  # [..., rows/4, byte, 16]
        nibble = torch.stack((data & 15, data >> 4), -2).flatten(-4, -2)[..., :rows, :]
        numbered = torch.cat((numbered, torch.stack([(nibble >> 2 * j) & 3 for j in range(left)], -3)), -3)
    fields = numbered.unflatten(-3, (-1, FIELDS)).movedim(-4, -2)  # [..., 8, R, C, 16]
    return fields.flatten(-2).flatten(-3, -2)


@dataclass(frozen=True)
class TritParts:
    """What a row of ternary codes has in each of 16 columns."""

    whole: int  # bytes of five codes
    left: int  # codes left over
    words: int  # words of two bytes, those left over apart


def _trit_parts(channels: int) -> TritParts:
    whole, left = trit_parts(channels)
    return TritParts(whole, left, (whole + (left > 2)) // 2)


FIELD_UNITS = tuple(0.25 ** (f % 4) for f in range(FIELDS))  # of bit fields


class Storage(NamedTuple):
    """How the codes of one plane are stored in a page.

    Attributes:
        nbytes: (tokens, channels) → bytes.
        pack: codes [..., P, n] → uint8 [..., nbytes].
        unpack: (packed, tokens, channels) → codes [..., P, n].
        binary: codes are bit fields, so that a plane may hold some bits of a code; else it holds all
            of it, and all of the head's channels.
        run: channels of one operand of a tensor core; 0: as many as may be.
        unit, field_units: what a code that was masked out of its word is to be multiplied with, all
            fields by `unit`, to be worth code · 2^−24.
        parts: (channels) → whatever else kernels must know.
    """

    nbytes: Callable[[int, int], int]
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int, int], Tensor]
    binary: bool = False
    run: int = 0
    unit: float = 1.0
    field_units: tuple[float, ...] = FIELD_UNITS
    parts: Callable[[int], Any] = lambda channels: None


def _binary(width: int) -> Storage:
    return Storage(
        lambda tokens, channels: plane_nbytes(tokens, channels, width),
        lambda codes: pack_plane(codes, width),
        lambda packed, tokens, channels: unpack_plane(packed, width, tokens, channels),
        binary=True,
    )


# of each width of a plane; the codes of 16 bits are float16 numbers
STORAGES = {
    1: _binary(1),
    2: _binary(2),
    4: _binary(4),
    TRIT: Storage(
        trit_nbytes,
        pack_trits,
        unpack_trits,
        run=TRIT_CHANNELS,
        unit=1 / 256,  # digits are masked where they stand, at 4^4
        field_units=(1.0,) * FIELDS,
        parts=_trit_parts,
    ),
    SIXTEEN: Storage(
        lambda tokens, channels: 2 * tokens * channels,
        lambda rows: rows.contiguous().view(torch.uint8).flatten(-2),
        lambda packed, tokens, channels: packed.view(torch.float16).unflatten(-1, (tokens, channels)),
    ),
}
# levels → widths of the planes, low bits first
PLANE_WIDTHS: dict[int, tuple[int, ...]] = {
    0: (),
    2: (1,),
    3: (TRIT,),
    4: (2,),
    8: (2, 1),
    16: (4,),
    32: (4, 1),
    64: (4, 2),
    256: (4, 4),
    RAW: (SIXTEEN,),
}
