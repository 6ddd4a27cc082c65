"""The requests of a step as the kernels take them: what the host knows, and what only the device
does."""

from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Several new tokens of one request.

    Attributes:
        request: its number in the step.
        first, end: its new tokens among the step's.
        length: tokens of the request, new ones included.
    """

    request: int
    first: int
    end: int
    length: int

    @property
    def before(self) -> int:
        """Tokens of the request that were there."""
        return self.length - (self.end - self.first)


def divide(starts: list[int]) -> tuple[int, list[int]]:
    """(requests with one new token before the first that has another number of them, numbers of
    those behind that have any).

    Args:
        starts: first new token of each request among the step's, and their number at the end.
    """
    counts = [b - a for a, b in pairwise(starts)]
    singles = next((i for i, n in enumerate(counts) if n != 1), len(counts))
    return singles, [i for i, n in enumerate(counts) if i >= singles and n > 0]


@dataclass
class DeviceBatch:
    """The requests of a step; what the host need not know is on the device.

    Attributes:
        singles: requests with one new token, which come first: request i has token i.
        chunks: the others.
        most_tokens: that a request can have.
        lengths: int32 [requests], tokens of each, new ones included; 0: it is not there.
        packed_table, raw_table: int32 [requests, entries], blocks of each request.
        raw_slots: int64 [tokens], block · raw_block_tokens + place, where each new token's row goes;
            negative for no token.
        kept: what all layers need of a chunk, computed once.
    """

    singles: int
    chunks: list[Chunk]
    most_tokens: int
    lengths: Tensor
    packed_table: Tensor
    raw_table: Tensor
    raw_slots: Tensor
    kept: dict[tuple, Tensor] = field(default_factory=dict)
