"""Byte sizes as people write them."""

import re

from kvfold.errors import KvfoldError

UNITS = {
    "": 1,
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}


def parse_nbytes(value: int | str) -> int:
    """Bytes from an int or a string like "512MiB" or "1.5GB".

    Raises:
        KvfoldError: not a positive number of bytes.
    """
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", str(value).strip())
    unit = UNITS.get(match[2].upper()) if match else None
    try:
        nbytes = int(float(match[1]) * unit) if match and unit else 0
    except (ValueError, OverflowError):
        nbytes = 0
    if nbytes <= 0:
        raise KvfoldError(
            f"'{value}' is not a number of bytes; write for example 536870912, '512MiB' or '1.5GB'."
        )
    return nbytes


def printable(text: str) -> str:
    """A text for a terminal: what would move its cursor,
    change its colours or can't be encoded is shown as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def format_nbytes(nbytes: int) -> str:
    """A byte count for people: 1536 → "1.5 KiB"."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
