"""Packs small integer codes into bytes, and back. Plain torch; every function works on the last dimension (channels).

A plane of width w holds w bits of each of n channels, in n·w/8 bytes. Field f of byte j belongs to channel f·(n·w/8) + j,
so one shift and one mask give a contiguous run of channels:

    w = 2, n = 32, 8 bytes          bit  7 6 | 5 4 | 3 2 | 1 0
    byte j (0 ≤ j < 8)     channel    24+j | 16+j |  8+j |  j

A trit plane holds five ternary codes a byte: digit k of byte j belongs to channel k·ceil(n/5) + j. The byte is
ceil(256·v / 243) with v = Σ c_k·3^(4−k), so digit k is ((byte·3^k mod 256)·3) >> 8 with no division.
"""

import torch
from torch import Tensor

TRITS_PER_BYTE = 5


def pack_plane(codes: Tensor, width: int) -> Tensor:
    """Packs codes of `width` bits.

    Args:
        codes: uint8 [..., n], each < 2**width; n a multiple of 8.
        width: 1, 2, 4 or 8 bits.
    Returns:
        uint8 [..., n·width/8].
    """
    fields = 8 // width
    shifts = torch.arange(fields, device=codes.device, dtype=torch.uint8) * width
    grouped = codes.unflatten(-1, (fields, -1))  # [..., fields, n/fields]
    return (grouped << shifts[:, None]).sum(-2, dtype=torch.uint8)


def unpack_plane(packed: Tensor, width: int) -> Tensor:
    """Inverse of `pack_plane`: uint8 [..., n·width/8] → uint8 [..., n]."""
    shifts = torch.arange(8 // width, device=packed.device, dtype=torch.uint8) * width
    return ((packed.unsqueeze(-2) >> shifts[:, None]) & (2**width - 1)).flatten(-2)


def trit_nbytes(n: int) -> int:
    """Bytes that n ternary codes take."""
    return -(-n // TRITS_PER_BYTE)


def pack_trits(codes: Tensor) -> Tensor:
    """Packs ternary codes, uint8 [..., n] with values 0, 1, 2 → uint8 [..., ceil(n/5)]."""
    m = trit_nbytes(codes.shape[-1])
    padded = torch.nn.functional.pad(codes.to(torch.int16), (0, m * TRITS_PER_BYTE - codes.shape[-1]))
    powers = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int16, device=codes.device)
    value = (padded.unflatten(-1, (TRITS_PER_BYTE, m)) * powers[:, None]).sum(-2, dtype=torch.int32)
    return ((value * 256 + 242) // 243).to(torch.uint8)


def unpack_trits(packed: Tensor, n: int) -> Tensor:
    """Inverse of `pack_trits`: uint8 [..., ceil(n/5)] → uint8 [..., n]."""
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int32, device=packed.device)
    digits = ((((packed.unsqueeze(-2).to(torch.int32) * powers[:, None]) & 255) * 3) >> 8).to(torch.uint8)
    return digits.flatten(-2)[..., :n]
