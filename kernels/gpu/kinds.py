"""Device code of the kinds of code, found by the name that a kind or a storage gives
(kernels/kinds/).

A layout's `device` has the functions themselves, and kernels that are compiled for a format call
them by it: `K.device.add_products(…)`. The kernels that read formats from tables know the kinds
that need no code of their own; others are given to them, and compiled in where a launch has one.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, cached_property
from importlib import import_module
from typing import Any

from kvfold.kernels.compile.launch import settle
from kvfold.kernels.formats import Format
from kvfold.kernels.layout import HeadLayout, head_layout

FUNCTIONS = ("add_products", "add_values", "element_values", "write_block")


class DeviceCode:
    """Functions of one module, as constants of kernels.

    Triton looks a compiled kernel up by the text of its constants, so that of this one has a hash
    of the functions; a process that compiles takes it by the module's name.

    Args:
        module: dotted name.
    """

    add_products: Any
    add_values: Any
    element_values: Any
    write_block: Any

    def __init__(self, module: str) -> None:
        self.module = module
        found = import_module(module)
        for name in FUNCTIONS:
            setattr(self, name, getattr(found, name, None))

    @cached_property
    def _text(self) -> str:
        digest = hashlib.sha256()
        for name in FUNCTIONS:
            function = getattr(self, name)
            if hasattr(type(function), "cache_key"):  # Triton's interpreter has none
                settle(function)
                digest.update(function.cache_key.encode())
        return f"{self.module}:{digest.hexdigest()[:16]}"

    def __repr__(self) -> str:
        return self._text

    def __reduce__(self) -> tuple:
        return device_code, (self.module,)


@cache
def device_code(module: str) -> DeviceCode:
    """The one object for a module."""
    return DeviceCode(module)


@cache
def device_layout(fmt: Format, page_tokens: int) -> HeadLayout:
    """`head_layout` with the functions in place of their module's name; one object for each."""
    layout = head_layout(fmt, page_tokens)
    return replace(layout, device=device_code(layout.device))


@cache
def _own(names: tuple[str, ...]) -> tuple[DeviceCode, ...]:
    return tuple(map(device_code, names))


def own_code(formats: Iterable[Format]) -> tuple[DeviceCode, ...]:
    """Code of those of the formats' kinds that need their own in the kernels that read tables, each
    once, by name."""
    return _own(tuple(sorted({fmt.kind.device for fmt in formats if fmt.kind.device})))
