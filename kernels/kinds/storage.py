"""What a plane of codes is in a page: bytes, and what kernels must know to read them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

FIELDS = 8  # tokens that share a word
FIELD_UNITS = tuple(0.25 ** (f % 4) for f in range(FIELDS))  # of bit fields


class Storage(NamedTuple):
    """How the codes of one plane are stored in a page.

    Attributes:
        nbytes: (tokens, channels) → bytes.
        pack: codes [..., P, n] → uint8 [..., nbytes].
        unpack: (packed, tokens, channels) → codes [..., P, n].
        row_nbytes: channels → bytes of one token's codes, without what pages leave empty.
        bits: of a code, as people are told.
        device: name of the module with the plane's device code (gpu/device/).
        name: as people are told.
        tile: channels of a class are a multiple of it.
        binary: codes are bit fields, so that a plane may hold some bits of a code; else it holds
            all of it, and all of the head's channels.
        run: channels of one operand of a tensor core; 0: as many as may be.
        ahead: reading takes more instructions than the bytes hide: pages' addresses are loaded one
            tile ahead.
        unit, field_units: what a code that was masked out of its word is to be multiplied with, all
            fields by `unit`, to be worth code · 2^−24.
        parts: channels → named tuple of up to three integers that the device code needs besides.
    """

    nbytes: Callable[[int, int], int]
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int, int], Tensor]
    row_nbytes: Callable[[int], int]
    bits: float
    device: str
    name: str = "binary"
    tile: int = 8
    binary: bool = False
    run: int = 0
    ahead: bool = False
    unit: float = 1.0
    field_units: tuple[float, ...] = FIELD_UNITS
    parts: Callable[[int], Any] = lambda channels: ()
