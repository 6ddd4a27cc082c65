"""BUDGET: mean bits per cached element ("2.3"), or bytes of one sequence's cache at a length
("512MiB@32768").

The states of a hybrid model count in the bytes. They are no elements: bits are those of keys and
values, and the states' bytes come on top of what bits make.
"""

from dataclasses import dataclass

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.units import parse_nbytes

DEFAULT_CONTEXT = 32768


@dataclass(frozen=True)
class Budget:
    """A byte budget for one sequence's whole cache.

    Attributes:
        request: as the user wrote it.
        at: tokens of the sequence.
        nbytes: bytes, everything resident counted.
    """

    request: str
    at: int
    nbytes: int


def parse_budget(
    request: str, geometry: Geometry, num_layers: int, max_tokens: int, context: int | None = None
) -> Budget:
    """Reads BUDGET.

    Args:
        request: what the user wrote.
        geometry: sinks, window, page length and heads of the cache.
        num_layers: layers that have a cache.
        max_tokens: the model's maximum length.
        context: length that plain bits count at; default 32768, or the model's maximum if that is
            smaller.
    Raises:
        KvfoldError: not a budget, not a length, or more than 16 bits.
    """
    text = str(request).strip()
    at = context or min(DEFAULT_CONTEXT, max_tokens)
    size, _, length = text.partition("@")
    if length:
        if not length.isdecimal() or int(length) < 1:
            raise KvfoldError(
                f"Budget '{text}' has the length '{length}', which is no number of tokens; write for example "
                "512MiB@32768."
            )
        at = int(length)
    if at > max_tokens:
        raise KvfoldError(
            f"Budget '{text}' counts at {at} tokens, but the model's maximum is {max_tokens}; choose a length within "
            "it."
        )
    elements = geometry.elements(at, num_layers)
    if length:
        nbytes = parse_nbytes(size)
        bits = 8 * (nbytes - geometry.state_nbytes) / elements
    else:
        try:
            bits = float(size)
        except ValueError:
            bits = float("nan")
        if not bits > 0:
            raise KvfoldError(
                f"Budget '{text}' is neither bits per element nor bytes at a length; write for example 2.5 or "
                "512MiB@32768."
            )
        nbytes = int(bits * elements // 8) + geometry.state_nbytes if bits <= 16 else 0
    if bits > 16:
        raise KvfoldError(
            f"Budget '{text}' is {bits:.4g} bits per element at {at} tokens, more than the 16 of an uncompressed "
            "cache; ask for less."
        )
    return Budget(text, at, nbytes)
