"""16-bit channels: float16 numbers, token by token, without parameters; gpu/device/sixteen.py reads
and writes them on a GPU."""

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.kernels.kinds.interface import ONE_RAW_CLASS, CodeKind, Layout
from kvfold.kernels.kinds.levels import PLANE_WIDTHS, RAW
from kvfold.kernels.kinds.params import to_float16
from kvfold.kernels.kinds.storage import Storage

FLOAT16_ROWS = Storage(
    lambda tokens, channels: 2 * tokens * channels,
    lambda rows: rows.contiguous().view(torch.uint8).flatten(-2),
    lambda packed, tokens, channels: packed.view(torch.float16).unflatten(-1, (tokens, channels)),
    lambda channels: 2 * channels,
    16,
    "kvfold.kernels.gpu.device.sixteen",
    name="16-bit",
)


class Float16(CodeKind):
    """See this module."""

    name = "none"
    planes = {RAW: PLANE_WIDTHS[RAW]}  # noqa: RUF012 - nothing writes to it
    raw = True

    def check(self, classes: tuple[tuple[int, int], ...]) -> None:
        """As in `CodeKind`."""
        if [levels for _, levels in classes] != [RAW]:
            raise KvfoldError(ONE_RAW_CLASS)

    def label(self, fmt: Layout) -> str:
        """As in `CodeKind`."""
        return ""

    def encode(self, x: Tensor, fmt: Layout, clip: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As in `CodeKind`."""
        return to_float16(x), None


FLOAT16 = Float16()
