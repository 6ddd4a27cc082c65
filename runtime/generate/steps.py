"""The host's part of a decoding step by kernels, done for all layers before any of them runs.

All that changes from step to step lies on the device: lengths, pages and their addresses, which
pages stand on which rung. The host adds what the step will need: where a page comes due, its memory
and its entries, for all layers in one copy. Between two steps it may lower pages. Most steps need
none of that, and of those the host only counts (`quiet`): then a captured step is replayed and
nothing else happens.
"""

from collections.abc import Sequence
from typing import Any

from kvfold.errors import KvfoldError
from kvfold.runtime.budget.base import Policy
from kvfold.runtime.cache.layer import PackedLayer
from kvfold.runtime.cache.page_table import take_pages
from kvfold.runtime.cache.sequence import Clock


class HostSteps:
    """What one cache's host knows of its steps.

    Attributes:
        quiet: steps to come before which the host has nothing to do.
        intact: nothing but pages was replaced since the last step, so that a captured one reads
            what it read.
        torn: a step failed half way: some layers may have the token, and the host counts it for
            all.
        captured: a captured decoding step (runtime.generate.graph), or that the next one may be
            captured.
        made_with: what it was made with, whose owner compares.
    """

    def __init__(self, torn: bool = False) -> None:
        self.quiet, self.intact = 0, False
        self.torn = torn
        self.captured: Any = None
        self.made_with: Any = None
        self._settled: bool | None = (
            None  # of the step that runs: whether pages will be lowered before the next one
        )

    def begin(self, layers: Sequence[PackedLayer], policy: Policy) -> bool:
        """Before a step of one token a sequence: all that the host does for it, once it has looked
        for NaN. False: it must be run a layer at a time.

        Raises:
            KVBudgetExceeded: before anything has changed.
        """
        first = layers[0]
        due = first.due()
        settled = policy.admit(layers, first.batch_size, 1)
        if not policy.admits_together(layers, due):
            return False
        take_pages([layer.table for layer in layers], due)
        if due:  # a block table may have grown
            self.intact = False
        first.shared.clock.tick()
        self._settled = settled
        return True

    def check_whole(self, layers: Sequence[PackedLayer]) -> None:
        """Raises KvfoldError if a call that failed has left layers of different lengths."""
        found = {layer.columns for layer in layers if layer.columns}
        if len(found) > 1 or self.torn:
            least = max(found) - 1 if self.torn else min(found)
            raise KvfoldError(
                f"A call that failed left this cache with layers of {least} and of {max(found)} tokens; reset() it or "
                "take a new one."
            )

    def count_quiet(self, clock: Clock) -> None:
        """`begin` of a quiet step, of which the host only counts."""
        self.quiet -= 1
        clock.tick()

    def finish(self, layers: Sequence[PackedLayer]) -> None:
        """After a step has been given to the device: frees what it was the last to read, and finds
        out how many steps are quiet."""
        if self._settled is None:
            return
        for layer in layers:
            layer.release_passed()
        self.quiet = quiet_steps(layers) if self._settled else 0
        self._settled, self.intact = None, True

    def disturb(self) -> None:
        """The cache has changed otherwise than by such a step: the next one is not quiet."""
        self.quiet, self.intact = 0, False

    def keep(self, captured: Any, made_with: Any = None) -> None:
        """Keeps a captured step and what it was made with, or what says that there may be one; None
        to let go of it."""
        self.captured, self.made_with = captured, made_with

    def drop(self) -> None:
        """Tensors of the cache are about to be replaced: lets go of a captured step, which holds
        the old ones."""
        self.captured = None
        self.disturb()

    def tear(self) -> None:
        """A step failed half way."""
        self.torn, self.captured = True, None

    def twin(self) -> "HostSteps":
        """What the host knows of a cache that goes on from here by itself."""
        return HostSteps(self.torn)

    def reset(self) -> None:
        """The cache forgets everything."""
        self.drop()
        self.torn = False


def quiet_steps(layers: Sequence[PackedLayer]) -> int:
    """Steps from here on before which no page comes due and no mark is to be asked for, and after
    which no page goes."""
    first, g = layers[0], layers[0].geometry
    if g.window == 0:  # the marks are looked at after a page as well
        return 0
    columns = max(layer.columns for layer in layers)
    steps = first.shared.marks.asked_before(g, steps_to_page(first), columns)
    for sliding in {layer.sliding for layer in layers if layer.sliding}:
        layer = next(x for x in layers if x.sliding == sliding)
        for sequence in layer.table.sequences:
            # a page is passed once it is full and lies behind the window of the token that a crop
            # may come back to
            n, seen = sequence.length, (sequence.passed + 1) * g.page_tokens + g.sinks + g.rollback
            steps = min(steps, max(seen + sliding - 1, seen + g.window, n + 1) - n)
    return max(0, steps - 1)


def steps_to_page(layer: PackedLayer) -> int:
    """1 if the next token brings some sequence a page, 2 if the one after it does, …"""
    g = layer.geometry
    full = g.sinks + g.window + g.page_tokens
    return min(full + len(s.pages) * g.page_tokens - s.length for s in layer.table.sequences)
