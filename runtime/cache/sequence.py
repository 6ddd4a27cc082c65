"""One sequence of a layer, as the host knows it: how long it is, and which pages it has."""

PASSED = -1  # in a list of pages: one that a sliding window has left behind and that is gone


class Clock:
    """Decoding steps that the host has prepared for all layers of a cache at once
    (runtime.generate.steps). What counts by a clock grows with it and isn't touched in such a
    step."""

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps

    def tick(self) -> None:
        """One more step."""
        self.steps += 1


class Count:
    """A number of tokens that grows by one with every step of a clock."""

    __slots__ = ("_base", "clock")

    def __init__(self, clock: Clock, value: int = 0) -> None:
        self.clock = clock
        self._base = value - clock.steps

    @property
    def value(self) -> int:
        return self._base + self.clock.steps

    def set(self, value: int) -> None:
        """Counts on from `value`."""
        self._base = value - self.clock.steps


class Sequence:
    """One sequence of one layer.

    Attributes:
        pages: numbers in the pool, oldest first; PASSED for pages that a sliding window has left
            behind.
        passed: leading pages that are gone.
        oldest: lowest token of the 16-bit ring whose row is there, unless the ring has come round
            since.
        due: rungs of its next pages, oldest first; [] for the highest.
    """

    __slots__ = ("_tokens", "due", "oldest", "pages", "passed")

    def __init__(self, clock: Clock, oldest: int) -> None:
        self._tokens = Count(clock)
        self.pages: list[int] = []
        self.passed = 0
        self.oldest = oldest
        self.due: list[int] = []

    @property
    def length(self) -> int:
        """Tokens, without padding."""
        return self._tokens.value

    def set_length(self, length: int) -> None:
        """It has `length` tokens from here on."""
        self._tokens.set(length)

    def keep_rows_from(self, oldest: int) -> None:
        """The 16-bit rows of the ring that are there begin with token `oldest`."""
        self.oldest = oldest

    def plan(self, due: list[int]) -> None:
        """Says which rungs the next pages are written on; [] for the highest."""
        self.due = due

    def add(self, ids: list[int]) -> None:
        """It has these pages behind its others."""
        self.pages += ids

    def cut(self, first: int) -> list[int]:
        """Takes off, and returns, all pages from number `first` on."""
        ids = self.pages[first:]
        del self.pages[first:]
        self.passed = min(self.passed, first)
        return ids

    def leave(self, passed: int) -> list[int]:
        """The first `passed` pages are gone from here on; returns those that were not yet."""
        ids = self.pages[self.passed : passed]
        self.pages[self.passed : passed] = [PASSED] * len(ids)
        self.passed = passed
        return ids

    def restore(self, length: int, oldest: int, pages: list[int]) -> None:
        """Takes on the state of a sequence that was stored."""
        self.set_length(length)
        self.oldest, self.pages, self.passed = oldest, pages, pages.count(PASSED)

    def copy(self, clock: Clock | None = None) -> "Sequence":
        """The same sequence, by another clock if one is given; what a policy has planned for it
        stays behind."""
        other = Sequence(clock or self._tokens.clock, self.oldest)
        other.restore(self.length, self.oldest, list(self.pages))
        return other


def new_sequences(count: int, clock: Clock, oldest: int) -> list[Sequence]:
    """`count` empty sequences whose 16-bit rings begin with token `oldest`."""
    return [Sequence(clock, oldest) for _ in range(count)]
