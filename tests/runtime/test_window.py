"""The 16-bit window: a ring's slots, and which of its rows are there."""

import pytest
import torch

from kvfold.exports.account import Geometry
from kvfold.runtime.cache.sequence import Clock, Sequence
from kvfold.runtime.cache.window import RawWindow


@pytest.mark.parametrize(("sinks", "rollback"), [(3, 0), (0, 5), (5, 1)])
def test_the_rows_that_are_there_are_those_from_the_oldest_on(sinks, rollback):
    """Token by token: each row from the oldest on is its token's, and the one before is
    another's."""
    g = Geometry(1, 8, sinks, 9, 8, rollback=rollback)
    window, sequence = RawWindow(g, 1, torch.device("cpu")), Sequence(Clock(), sinks)
    for length in range(1, sinks + 3 * g.ring):
        row = torch.full((1, 1, 8), float(length - 1), dtype=torch.float16)
        window.write(0, window.slots(length - 1, length), row, -row)
        sequence.set_length(length)
        oldest = window.oldest(sequence)
        keys, values = window.read(0, window.slots(oldest, length))
        assert keys[0, :, 0].tolist() == [float(token) for token in range(oldest, length)]
        assert torch.equal(values, -keys)
        assert oldest == max(sinks, length - g.ring)
        if oldest > sinks:
            assert window.read(0, window.slots(oldest - 1, oldest))[0][0, 0, 0] != oldest - 1
