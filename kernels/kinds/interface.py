"""What a kind of code is: how a token's numbers become codes and parameters, and numbers again."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.kernels.kinds.levels import GAUSSIAN_MSE, PLANE_WIDTHS, RAW

ONE_RAW_CLASS = "A 16-bit format is one class of 65536 levels with params 'none', and no other format has such a class."


class Layout(Protocol):
    """What a kind asks of a `Format`."""

    @property
    def classes(self) -> tuple[tuple[int, int], ...]:
        """(channels, levels) from the first channel on."""

    @property
    def param_dtype(self) -> str:
        """e4m3 or fp16."""

    @property
    def group_size(self) -> int:
        """Channels that share parameters; 0 for all."""

    @property
    def head_dim(self) -> int:
        """Channels."""

    @property
    def num_groups(self) -> int:
        """Parameter groups of a token."""


def levels_of(fmt: Layout) -> list[int]:
    """Levels of each channel, 0 where it is not stored."""
    return [levels for channels, levels in fmt.classes for _ in range(channels)]


class CodeKind:
    """A kind of code. A number is stored as a code c of one of L levels and comes back as

        x̂ = m + s·step(L)·(value(c) − middle(L))

    with a scale s, and for some kinds a minimum m, that travel with the token. One object of a
    subclass stands in the table of `kernels.kinds` under its name, which is a format's `params`.

    Attributes:
        name: as artifacts state it.
        planes: levels → keys of the planes that hold the code in `kernels.kinds.STORAGES`, low bits
            first; one plane where levels are not uniform.
        uniform: `value` is the code itself.
        raw: there are no codes and no parameters, but float16 numbers.
        minimum: a minimum travels with the scale, and clips apply to both.
        grouped: channels may share parameters in groups.
        device: name of a module with device code for the kind itself (docs/kernels.md says which
            functions); "" where that of its planes, and the kernels that read tables, do.
        unit, field_units: as in `Storage`, of what `device` gives tensor cores; None for the
            plane's own.
    """

    name: str
    planes: Mapping[int, tuple[int, ...]] = {
        n: planes for n, planes in PLANE_WIDTHS.items() if n != RAW
    }
    uniform = True
    raw = False
    minimum = False
    grouped = False
    device = ""
    unit: float | None = None
    field_units: tuple[float, ...] | None = None

    @property
    def symmetric(self) -> bool:
        """Whether codes are symmetric about zero, with one scale a token."""
        return not (self.raw or self.minimum)

    @property
    def params_each(self) -> int:
        """Parameters of a token and group."""
        return 0 if self.raw else 1 + self.minimum

    def check(self, classes: tuple[tuple[int, int], ...]) -> None:
        """Raises KvfoldError where these classes can't be stored."""
        wrong = {levels for _, levels in classes} - set(self.planes)
        if RAW in wrong:
            raise KvfoldError(ONE_RAW_CLASS)
        if wrong:
            raise KvfoldError(
                f"Codes with params '{self.name}' have {', '.join(map(str, self.planes))} levels, not {min(wrong)}."
            )

    def label(self, fmt: Layout) -> str:
        """What people are told behind the classes; begins with a space, or is empty."""
        return f" {self.name} {fmt.param_dtype}"

    def step(self, levels: int) -> float:
        """What one unit of a code is worth, before the token's scale."""
        return 1.0

    def middle(self, levels: int) -> float:
        """Zero point of a code; 0 where codes have a minimum."""
        return 0.0

    def error(self, levels: int) -> float:
        """Mean squared error at unit variance, about."""
        return GAUSSIAN_MSE[levels]

    def values(self, codes: Tensor) -> Tensor:
        """What codes, uint8 [...], are worth before zero point, step and scale: float32 [...], or
        the codes where their levels are uniform."""
        return codes

    def encode(self, x: Tensor, fmt: Layout, clip: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Numbers to codes and parameters.

        Args:
            x: float32 [..., T, head_dim].
            clip: factor on (minimum, maximum), broadcastable to [..., 1, 1], or None; for kinds
                with a minimum.
        Returns:
            (uint8 [..., T, head_dim], or float16 of raw kinds;
            bytes of the parameters, uint8 [..., T, parameters · size], or None)
        """
        raise NotImplementedError

    def decode(self, codes: Tensor, params: Tensor, fmt: Layout) -> Tensor:
        """Codes, uint8 [..., T, head_dim], and parameters, float32 [..., T, parameters], to float32
        of codes' shape."""
        found, start = self.values(codes).float(), 0
        for channels, count in fmt.classes:
            if count:
                found[..., start : start + channels].sub_(self.middle(count)).mul_(
                    params * self.step(count)
                )
            start += channels
        return found
