"""The floor policy: pages are stored at the searched bits at once, and a budget is only watched."""

from kvfold.exports.account import batch_nbytes
from kvfold.runtime.budget.base import Layers, Policy, floor_nbytes, regroup_nbytes


class Floor(Policy):
    """Refuses what the budget has no room for."""

    def need(self, layers: Layers, batch_size: int, tokens: int) -> int:
        end = layers[0].get_seq_length() + tokens
        lengths = [max(0, end - pad) for pad in layers[0].shared.pads(batch_size)]
        return batch_nbytes(
            layers[0].shared.geometry, [layer.formats for layer in layers], lengths, tokens
        )

    def admit(self, layers: Layers, batch_size: int, tokens: int) -> bool:
        self.check(layers, batch_size, tokens)
        return True

    def regroup(self, layers: Layers, sequences: int) -> None:
        if self.budget is None or not layers[0].is_initialized or sequences <= layers[0].batch_size:
            return
        peak = self.nbytes(layers) + regroup_nbytes(layers, sequences)
        if peak > self.budget:
            raise self.exceeded(layers, layers[0].get_seq_length(), sequences, peak)

    def admits_together(self, layers: Layers, due: list[int]) -> bool:
        # layers that slide give pages back as they go: all new ones at once may be more than the
        # budget has room for
        if self.budget is None or not due or not any(layers[0].geometry.sliding):
            return True
        batch_size = layers[0].batch_size
        more = [int(b in due) for b in range(batch_size)]
        return floor_nbytes(layers, batch_size, more) <= self.budget
