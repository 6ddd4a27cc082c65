"""Bit planes: codes of 1, 2 and 4 bits of a page packed into bytes, and back. Plain torch;
gpu/device/binary.py reads and writes the same on a GPU.

A page holds P tokens, P = 8·R. Token f·R + r (0 ≤ f < 8, 0 ≤ r < R) is field f of row r, so that
one 16-bit word of row r and one channel holds that channel's codes of eight tokens, and `word &
mask` without a shift gives one token's code times a power of four: what a tensor core can multiply
as it stands (a masked word is an fp16 subnormal, code·4^g·2^−24 with g = f mod 4; fields 4 to 7
come down with one shift by 8). Words are little-endian; the n channels of a row stand side by side,
rows follow each other:

    w = 2   R rows × n words        bits 2f … 2f+1 are field f
    w = 1   R rows × n/2 words      bit 2f is field f of channel j, bit 2f+1 that of channel j + n/2
    w = 4   2·R rows × n words      rows 0 … R−1 hold fields 0 to 3, rows R … 2R−1 fields 4 to 7;
                                    inside a word, from the low bits up: fields 0, 2, 1, 3
                                    (or 4, 6, 5, 7), so that `word >> 6` brings the odd ones to
                                    where they stand at width 2
"""

import torch
from torch import Tensor

from kvfold.kernels.kinds.storage import FIELDS, Storage


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
        data = packed.unflatten(-1, (2, rows, channels, 2)).movedim(
            -1, -3
        )  # [..., set, byte, R, n]
        return torch.stack((data & 15, data >> 4), -4).flatten(
            -5, -2
        )  # of [..., set, high, byte, R, n]
    words = packed.unflatten(-1, (rows, channels * width // 2, 2)).movedim(
        -1, -3
    )  # [..., byte, R, channels]
    if width == 2:
        return torch.stack([(words >> s) & 3 for s in (0, 2, 4, 6)], -3).flatten(-4, -2)
    low = torch.stack([(words >> s) & 1 for s in (0, 2, 4, 6)], -3)  # [..., byte, 4, R, n/2]
    high = torch.stack([(words >> s) & 1 for s in (1, 3, 5, 7)], -3)
    return torch.cat((low, high), -1).flatten(-4, -2)


def _binary(width: int) -> Storage:
    return Storage(
        lambda tokens, channels: plane_nbytes(tokens, channels, width),
        lambda codes: pack_plane(codes, width),
        lambda packed, tokens, channels: unpack_plane(packed, width, tokens, channels),
        lambda channels: channels * width // 8,
        width,
        "kvfold.kernels.gpu.device.binary",
        binary=True,
    )


BITS = {width: _binary(width) for width in (1, 2, 4)}
