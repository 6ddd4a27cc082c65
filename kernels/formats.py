"""Formats: how one head's channels are stored for a block of tokens, and how many bytes that takes.

A format cuts the head_dim channels of one KV head into classes, contiguous runs with their own
number of levels, and says which parameters travel with a token. `Format.nbytes` is the only account
of size in the project.

Layout of one head's keys or values in a page of T tokens, T a multiple of 8:

    | class 0, plane 0 | class 0, plane 1 | class 1, plane 0 | … | parameter 0: T | parameter 1: T | … |

kinds/bits.py draws the bits of a plane. A code of more than one plane is split from the low bits
up: 8 levels are a 2-bit plane, then a 1-bit plane. A 16-bit format is T rows of head_dim float16.
Parameters are one scale, or (minimum, scale) for each group; each parameter's T numbers,
little-endian, stand in the order r·8 + f of token f·T/8 + r (bits.py), so that the tokens that
share a word share a run of bytes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from kvfold.errors import KvfoldError
from kvfold.kernels.kinds import KINDS, STORAGES
from kvfold.kernels.kinds.interface import CodeKind
from kvfold.kernels.kinds.levels import PLANE_WIDTHS, RAW
from kvfold.kernels.kinds.params import PARAM_NBYTES
from kvfold.kernels.kinds.storage import Storage


class Plane(NamedTuple):
    """One plane of a format: `width` bits (TRIT: ternary, 16: raw) of channels [start, start +
    channels)."""

    start: int
    channels: int
    width: int
    shift: int  # position of these bits in the code

    @property
    def storage(self) -> Storage:
        """How its codes are stored."""
        return STORAGES[self.width]

    def nbytes(self, tokens: int) -> int:
        """Bytes in a page of `tokens` tokens."""
        return self.storage.nbytes(tokens, self.channels)


@dataclass(frozen=True)
class Format:
    """How one KV head's tokens are stored.

    Attributes:
        classes: (channels, levels) from the first channel on; channels are multiples of 8 and sum
            to head_dim. Levels 0 (not stored), 2, 3, 4, 8, 16, 32, 64, 256, or 65536 for raw
            16-bit; 3 and 65536 stand alone.
        params: name of the kind of code (kinds/): "none"; "scale", one scale a token for the whole
            head, codes symmetric about zero without zero point; "scale_min", one scale and minimum
            a token and group.
        param_dtype: "e4m3" (1 byte) or "fp16" (2 bytes).
        group_size: channels that share a (scale, minimum); 0 means all of them. Only for
            "scale_min".
    Raises:
        KvfoldError: the parts contradict each other.
    """

    classes: tuple[tuple[int, int], ...]
    params: str = "scale"
    param_dtype: Literal["e4m3", "fp16"] = "e4m3"
    group_size: int = 0

    def __post_init__(self) -> None:
        for channels, levels in self.classes:
            if channels <= 0 or channels % 8:
                raise KvfoldError(
                    f"A format class has {channels} channels, but a class is a positive multiple of 8."
                )
            if levels not in PLANE_WIDTHS:
                raise KvfoldError(
                    f"A format class has {levels} levels; choose one of {sorted(PLANE_WIDTHS)}."
                )
        if self.params not in KINDS or self.param_dtype not in PARAM_NBYTES:
            *names, last = KINDS
            raise KvfoldError(
                f"A format has params '{self.params}' of type '{self.param_dtype}'; "
                f"use {', '.join(names)} or {last}, of e4m3 or fp16."
            )
        levels_used = {levels for _, levels in self.classes}
        if not self.classes or levels_used == {0}:
            raise KvfoldError(
                "A format stores no channel at all; give at least one class levels > 0."
            )
        self.kind.check(self.classes)
        for storage in {plane.storage for plane in self.planes if not plane.storage.binary}:
            if len(self.classes) > 1 or self.head_dim % storage.tile:
                raise KvfoldError(
                    f"A {storage.name} format is one class of a multiple of {storage.tile} channels; "
                    "use 2 or 4 levels in mixed formats."
                )
        if self.group_size and not self.kind.grouped:
            grouped = "' or '".join(name for name, kind in KINDS.items() if kind.grouped)
            raise KvfoldError(
                f"group_size={self.group_size} goes with params '{grouped}' only; leave it 0."
            )
        if self.group_size < 0 or (self.group_size and self.head_dim % self.group_size):
            raise KvfoldError(
                f"group_size={self.group_size} does not divide head_dim={self.head_dim}; choose a divisor."
            )

    @property
    def kind(self) -> CodeKind:
        """How numbers become codes."""
        return KINDS[self.params]

    @property
    def raw(self) -> bool:
        """Whether it stores 16-bit numbers, without loss to speak of."""
        return self.kind.raw

    @property
    def head_dim(self) -> int:
        return sum(channels for channels, _ in self.classes)

    @property
    def num_groups(self) -> int:
        """Parameter groups of one token (1 for "scale")."""
        return self.head_dim // (self.group_size or self.head_dim)

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        planes = []
        start = 0
        for channels, levels in self.classes:
            shift = 0
            for width in self.kind.planes[levels]:
                planes.append(Plane(start, channels, width, shift))
                shift += width
            start += channels
        return tuple(planes)

    @property
    def num_params(self) -> int:
        """Parameters of one token."""
        return self.kind.params_each * self.num_groups

    @property
    def param_nbytes(self) -> int:
        """Bytes of one parameter."""
        return PARAM_NBYTES[self.param_dtype]

    def nbytes(self, tokens: int) -> int:
        """Bytes that a page of `tokens` tokens of one KV head takes, K or V alone, parameters
        included.

        Args:
            tokens: a multiple of 8.
        """
        return (
            sum(p.nbytes(tokens) for p in self.planes)
            + tokens * self.num_params * self.param_nbytes
        )

    @property
    def payload_bits(self) -> float:
        """Bits per cached element, codes and parameters, in pages of 32 tokens: rows of ternary
        codes that other pages leave empty are not counted."""
        return 8 * self.nbytes(32) / (32 * self.head_dim)

    def __str__(self) -> str:
        """For people: channels@bits of each class, then the parameters."""
        parts = []
        for channels, levels in self.classes:
            bits = sum(STORAGES[width].bits for width in self.kind.planes[levels])
            parts.append(f"{bits:g}" if self.raw else f"{channels}@{bits:g}")
        return " ".join(parts) + self.kind.label(self)

    def to_dict(self) -> dict:
        """Plain data for JSON; `Format.from_dict` reads it back."""
        return {
            "classes": [list(c) for c in self.classes],
            "params": self.params,
            "param_dtype": self.param_dtype,
            "group_size": self.group_size,
        }

    @classmethod
    def from_dict(cls, data: dict) -> "Format":
        return cls(
            tuple((int(c), int(n)) for c, n in data["classes"]),
            data["params"],
            data["param_dtype"],
            data["group_size"],
        )


def raw16(head_dim: int) -> Format:
    """16 bits a channel, no parameters."""
    return Format(((head_dim, RAW),), "none")


def uniform(
    head_dim: int, levels: int, param_dtype: Literal["e4m3", "fp16"] = "e4m3", group_size: int = 0
) -> Format:
    """One class of `levels` levels with a scale and a minimum for each token and group."""
    return Format(
        ((head_dim, levels),), "scale_min", param_dtype, 0 if group_size == head_dim else group_size
    )
