"""The 16-bit rows of a layer: sinks, then a ring that holds the window and what isn't packed
yet."""

from collections.abc import Iterable

import torch
from torch import Tensor

from kvfold.exports.account import Geometry
from kvfold.runtime.cache.sequence import Sequence


def slots_of(geometry: Geometry, positions: Tensor) -> Tensor:
    """Rows of the 16-bit buffers that tokens at int64 positions [n] stand in."""
    sinks = geometry.sinks
    return torch.where(positions < sinks, positions, sinks + (positions - sinks) % geometry.ring)


class RawWindow:
    """Keys in their stored basis and values, float16 [B, num_kv_heads, sinks + ring, head_dim]
    each.

    Args:
        geometry: sinks, ring and head shape.
        batch_size: sequences.
        device: where the rows lie.
        rows: keys and values that are there already; undefined memory by default.
    """

    def __init__(
        self,
        geometry: Geometry,
        batch_size: int,
        device: torch.device,
        rows: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.geometry, self.device = geometry, device
        self.keys, self.values = rows or self._new_rows(batch_size)

    def _new_rows(self, batch_size: int) -> tuple[Tensor, Tensor]:
        g = self.geometry
        shape = (batch_size, g.num_kv_heads, g.raw_rows, g.head_dim)
        keys, values = (
            torch.empty(shape, dtype=torch.float16, device=self.device) for _ in range(2)
        )
        return keys, values

    def tensors(self) -> list[Tensor]:
        """Every resident tensor."""
        return [self.keys, self.values]

    def slots(self, start: int, end: int) -> Tensor:
        """Rows that tokens start … end − 1 stand in, int64 [end − start]."""
        return slots_of(self.geometry, torch.arange(start, max(start, end))).to(
            self.device, non_blocking=True
        )

    def read(self, b: int, slots: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Keys and values of some rows of sequence b, float16 [num_kv_heads, n, head_dim]."""
        return self.keys[b][:, slots], self.values[b][:, slots]

    def write(self, b: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Puts float16 [num_kv_heads, n, head_dim] into rows `slots`, int64 [n], of sequence b."""
        self.keys[b, :, slots] = keys
        self.values[b, :, slots] = values

    def page(self, b: int, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens of sequence b that become its page `number`: such rows lie
        in a row."""
        g = self.geometry
        first = g.sinks + number * g.page_tokens % g.ring
        return self.read(b, slice(first, first + g.page_tokens))

    def oldest(self, sequence: Sequence) -> int:
        """Lowest token of the ring whose row is there: a slot is written anew when the ring comes
        round."""
        g = self.geometry
        return max(g.sinks, sequence.oldest, sequence.length - g.ring)

    def extend(self, geometry: Geometry, sequences: Iterable[Sequence]) -> None:
        """Goes on with a geometry that differs in `rollback` alone; what the ring holds moves to
        one of the new size."""
        old = self.geometry
        if old.ring == geometry.ring:
            self.geometry = geometry
            return
        held = []
        for sequence in sequences:
            sequence.keep_rows_from(self.oldest(sequence))
            held.append(
                [
                    *range(min(geometry.sinks, sequence.length)),
                    *range(sequence.oldest, sequence.length),
                ]
            )
        self.geometry = geometry
        buffers = self._new_rows(len(held))
        for b, tokens in enumerate(held):
            positions = torch.tensor(tokens, dtype=torch.int64)
            source, target = (slots_of(g, positions).to(self.device) for g in (old, geometry))
            for new, rows in zip(buffers, (self.keys, self.values), strict=True):
                new[b, :, target] = rows[b][:, source]
        self.keys, self.values = buffers

    def select(self, index: Tensor) -> None:
        """Keeps the sequences `index`, int64 [n] on the device, in that order."""
        self.keys, self.values = self.keys[index], self.values[index]

    def copy(self) -> "RawWindow":
        """The same rows, in memory of their own."""
        return RawWindow(
            self.geometry, len(self.keys), self.device, (self.keys.clone(), self.values.clone())
        )
