"""Kinds of code: how numbers are stored in pages. Two tables, a file for each row.

A kind (interface.py) says how a token's numbers become codes and parameters:

    none        float16.py      16-bit numbers as they are
    scale       symmetric.py    levels about zero, one scale a token
    scale_min   min_max.py      levels from a minimum, a scale and a minimum a token and group

A storage (storage.py) says how the codes of a plane become bytes:

    1, 2, 4     bits.py         bits of words that eight tokens share
    TRIT        trits.py        three levels, five codes to a byte
    SIXTEEN     float16.py      float16, token by token

Each has device code, which reads it for tensor cores and writes it: docs/kernels.md.
"""

from kvfold.kernels.kinds.bits import BITS
from kvfold.kernels.kinds.float16 import FLOAT16, FLOAT16_ROWS
from kvfold.kernels.kinds.interface import CodeKind
from kvfold.kernels.kinds.levels import SIXTEEN, TRIT
from kvfold.kernels.kinds.min_max import MIN_MAX
from kvfold.kernels.kinds.storage import Storage
from kvfold.kernels.kinds.symmetric import SYMMETRIC
from kvfold.kernels.kinds.trits import TRITS

KINDS: dict[str, CodeKind] = {kind.name: kind for kind in (FLOAT16, SYMMETRIC, MIN_MAX)}
STORAGES: dict[int, Storage] = {**BITS, TRIT: TRITS, SIXTEEN: FLOAT16_ROWS}


def known(name: str) -> str:
    """`name`, if a kind of code has it.

    Raises:
        ValueError: none has.
    """
    if name not in KINDS:
        raise ValueError(f"params must be one of {', '.join(KINDS)}")
    return name


def stores(name: str, levels: int, head_dim: int) -> bool:
    """Whether a format of head_dim channels of so many levels exists for a kind of code."""
    planes = KINDS[name].planes.get(levels)
    return bool(planes) and all(head_dim % STORAGES[key].tile == 0 for key in planes or ())
