"""What can be asked of a packed cache, whatever it is used for."""

from kvfold.exports.account import Geometry
from kvfold.kernels.formats import Format
from kvfold.runtime.budget.base import Policy
from kvfold.runtime.cache.layer import PackedLayer
from kvfold.runtime.cache.stateful import KeepsStates


class SizedCache(KeepsStates):
    """A packed cache's size and what it consists of.

    Attributes:
        layers: those that attend.
        policy: what is done as its budget fills.
    """

    layers: list[PackedLayer]  # type: ignore[assignment]
    policy: Policy

    @property
    def geometry(self) -> Geometry:
        """Sinks, window, page size and head shape."""
        return self.shared.geometry

    @property
    def budget(self) -> int | None:
        """Bytes that `nbytes` may never pass."""
        return self.policy.budget

    def set_budget(self, budget: int | None) -> None:
        """Changes the budget, for what comes from here on."""
        self.policy.set_budget(budget)

    @property
    def formats(self) -> list[tuple[Format, Format]]:
        """(key format, value format) of each layer."""
        return [layer.formats for layer in self.layers]

    @property
    def tokens(self) -> int:
        """Columns that the cache holds, padding included."""
        return max(layer.columns for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Resident bytes: codes, parameters, sinks, window, block tables, lengths and states of
        every sequence. With offload, those on the device, staging buffers included."""
        return self.policy.nbytes(self.layers)

    @property
    def host_nbytes(self) -> int:
        """Bytes of pages that offload has moved to host memory."""
        return self.policy.host_nbytes

    def report(self) -> list[dict]:
        """One dict a layer: tokens (of each sequence), pages by format (finest first), bytes (on
        the device, without the staging buffers of offload), host_bytes, effective_bits (of both, ·8
        / elements)."""
        return [layer.report() for layer in self.layers]
