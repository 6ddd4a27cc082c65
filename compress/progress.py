"""What a person sees while something takes long: bars and one-line stages, on stderr."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], desc: str, unit: str, initial: int = 0, total: int | None = None) -> "Iterable[T]":
    """A bar over `items`; silent where stderr is not a terminal."""
    return tqdm(items, desc=f"{desc:<12}", unit=unit, initial=initial, total=total, disable=None)


def stage(text: str) -> None:
    """Says what begins now."""
    print(f"kvfold: {text}", file=sys.stderr, flush=True)
