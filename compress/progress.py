"""What a person sees while something takes long: bars and one-line stages, on stderr."""

import codecs
import io
import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from tqdm import tqdm

from kvfold.exports.units import printable

T = TypeVar("T")


def _speaks() -> bool:
    """Whether this is the process that speaks, of several."""
    # not at the top: PyTorch comes after what is small, so that too little memory is said in a sentence
    from kvfold.compress.processes import Processes

    return Processes.current().first


def progress(
    items: Iterable[T], desc: str, unit: str, initial: int = 0, total: int | None = None
) -> "Iterable[T]":
    """A bar over `items`; silent where stderr is not a terminal, and in all processes but the
    first."""
    hidden = None if _speaks() else True
    return tqdm(items, desc=f"{desc:<12}", unit=unit, initial=initial, total=total, disable=hidden)


def print_anything() -> None:
    """Has stdout and stderr show as an escape what their encoding lacks, as in the locale C; a
    path's own bytes stay what they are."""

    def escape(error: UnicodeError) -> tuple[bytes, int]:
        assert isinstance(error, UnicodeEncodeError)
        part = error.object[error.start : error.end]
        raw = (
            bytes([ord(c) - 0xDC00])
            if 0xDC80 <= ord(c) <= 0xDCFF
            else c.encode("ascii", "backslashreplace")
            for c in part
        )
        return b"".join(raw), error.end

    codecs.register_error("kvfold", escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="kvfold")


def console(columns: int = 120, quiet: bool = False) -> Console:
    """stdout for tables: as wide as a terminal, else of so many columns; nothing where stdout was
    closed."""
    return Console(
        width=None if sys.stdout is not None and sys.stdout.isatty() else columns, quiet=quiet
    )


def stage(text: str) -> None:
    """Says what begins now; of several processes the first does."""
    if _speaks():
        print(f"kvfold: {printable(text)}", file=sys.stderr, flush=True)
