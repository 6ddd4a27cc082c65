"""Which pages the sequences of a layer have: on the host their numbers in the pool, on the device
their addresses, counts and rungs."""

from bisect import bisect_left

import torch
from torch import Tensor

from kvfold.exports.account import Geometry, table_entries
from kvfold.runtime.cache.ambient import neutrally
from kvfold.runtime.cache.pool import PagePool
from kvfold.runtime.cache.sequence import PASSED, Clock, Sequence
from kvfold.runtime.cache.upload import Upload, on_device


class PageTable:
    """The sequences of a layer and their pages. Along a sequence rungs never fall: old pages have
    the fewest bits.

    Args:
        pool: the pages.
        rungs: how many formats a page may have.
        sequences: of the batch.
        device: where kernels read.
        copy_of: a table of the same sequences, whose tensors are copied.
        shares_pool: forks have the same pool.

    Attributes:
        state: int32 [B, 2], tokens and pages of each sequence.
        block_table: int64 [B, entries], addresses of pages; 0 for one that is gone.
        segments: int32 [B, rungs + 1], where pages have rungs: pages segments[b, r] … segments[b, r
            + 1] − 1 of sequence b stand on rung r.
    """

    def __init__(
        self,
        pool: PagePool,
        rungs: int,
        sequences: list[Sequence],
        device: torch.device,
        copy_of: "PageTable | None" = None,
        shares_pool: bool = False,
    ) -> None:
        self.pool, self.rungs, self.sequences, self.device = pool, rungs, sequences, device
        self.shares_pool = shares_pool
        batch = len(sequences)
        self._moves = 0  # of the pool's, that the block table knows
        # on the device for kernels, and on the host so that nothing waits for the device
        if copy_of is None:
            self.state = torch.zeros(batch, 2, dtype=torch.int32, device=device)
            self.block_table = torch.zeros(batch, 0, dtype=torch.int64, device=device)
            self.segments = torch.zeros(0, 0, dtype=torch.int32, device=device)
        else:
            self.state, self.block_table, self.segments = (x.clone() for x in copy_of.tensors())
            self._moves = copy_of._moves
        self._cuts: list[list[int]] | None = None  # see `cuts`; None: to be found from the pages
        self._sent: list[list[int]] = []  # what `segments` holds
        # of sequences with lowered pages whose addresses the device has yet to be told: their run
        self._lowered: dict[int, tuple[int, int]] = {}
        self._planned = False  # whether some sequence has a plan
        self._next: tuple[Tensor, list[int]] | None = None  # see `next_rungs`

    def tensors(self) -> list[Tensor]:
        """Every resident tensor but the pages."""
        return [self.state, self.block_table, self.segments]

    def pages(self) -> list[list[int]]:
        """The pages of every sequence, oldest first."""
        return [sequence.pages for sequence in self.sequences]

    def own_pages(self) -> set[int]:
        """Distinct pages of these sequences."""
        return {i for ids in self.pages() for i in ids if i != PASSED}

    # -- what the device knows ---------------------------------------------------------------------

    def enter(self, b: int, first: int) -> None:
        """Writes the pages of sequence b into its row of the block table, from page number `first`
        on."""
        self._enter(b, first, self.sequences[b].pages[first:])

    def _enter(self, b: int, first: int, ids: list[int]) -> None:
        if ids:
            self.block_table[b, first : first + len(ids)] = on_device(
                self.pool.addresses(ids), torch.int64, self.device
            )

    def note_state(self, b: int) -> None:
        """Tells the device how many tokens and pages sequence b has."""
        sequence = self.sequences[b]
        self.state[b] = on_device([sequence.length, len(sequence.pages)], torch.int32, self.device)

    @neutrally
    def fit(self, entries: int = 0) -> None:
        """Gives the block table room for `entries` pages a sequence, or for those that there are,
        in whole steps."""
        entries = max(entries, *(len(ids) for ids in self.pages()), 0)
        room = table_entries(entries)
        if room != self.block_table.shape[1]:
            batch = len(self.sequences)
            self.block_table = self.block_table.new_zeros(
                batch, 0
            )  # the old one goes before the new one comes
            self.block_table = self.block_table.new_zeros(batch, room)
            for b in range(batch):
                self.enter(b, 0)
            self._lowered.clear()

    def reserve(self, entries: int) -> None:
        """Replaces the block table by an empty one with room for `entries` pages a sequence: for
        going through launches that aren't made (runtime.generate.compile)."""
        self.block_table = self.block_table.new_zeros(len(self.sequences), entries)

    def bring(self) -> None:
        """Makes all pages readable by kernels, at the addresses that the block table has."""
        self.pool.bring()
        if self._moves != self.pool.moves:
            self._moves = self.pool.moves
            for b, sequence in enumerate(self.sequences):
                self.enter(b, sequence.passed)

    def cuts(self) -> list[list[int]]:
        """What `segments` is to hold. Kept up with what steps do, and found anew after the rest."""
        if self._cuts is None:
            rung = self.pool.rung
            self._cuts = [
                [*(bisect_left(ids, r, key=rung) for r in range(self.rungs)), len(ids)]
                for ids in self.pages()
            ]
        return self._cuts

    def publish(self, upload: Upload | None = None) -> None:
        """Tells the device, where pages have rungs, which pages stand on which, and where those
        lie that were lowered. With `upload`, once that is sent."""
        if self.rungs == 1:
            return
        news = upload or Upload(self.device)
        self._enter_lowered(news)
        cuts = self.cuts()
        if cuts != self._sent:
            self._sent = [list(row) for row in cuts]
            if len(self.segments) != len(cuts):
                self.segments = self.segments.new_zeros(0)  # the old one goes before the new comes
                self.segments = self.segments.new_zeros(len(cuts), self.rungs + 1)
            news.add(self.segments.view(-1), [start for row in cuts for start in row])
        if upload is None:
            news.send()

    def _enter_lowered(self, news: Upload) -> None:
        for b, (first, end) in self._lowered.items():
            ids = self.sequences[b].pages[first:end]
            if ids:  # else they were cropped away meanwhile
                news.add(self._entries(b, first, len(ids)), self.pool.addresses(ids))
        self._lowered.clear()

    def _entries(self, b: int, first: int, count: int) -> Tensor:
        """int64 [count], a part of the block table."""
        return self.block_table.view(-1).narrow(0, b * self.block_table.shape[1] + first, count)

    def next_rungs(self) -> tuple[Tensor | None, list[int]]:
        """The rung that the page which comes due next is written on, of each sequence: int32 [B] on
        the device, which stays where it is, as a CUDA graph needs, and the same on the host. (None,
        []) where pages have one format. No part of what is cached."""
        if self.rungs == 1:
            return None, []
        if self._next is None or len(self._next[1]) != len(self.sequences):
            last, batch = self.rungs - 1, len(self.sequences)
            there = torch.full((batch,), last, dtype=torch.int32, device=self.device)
            self._next = there, [last] * batch
        return self._next

    # -- pages come, go and change -----------------------------------------------------------------

    def plan(self, rungs: list[list[int]]) -> None:
        """Says which rungs each sequence's next pages are written on, oldest first; [] for the
        highest."""
        if rungs or self._planned:
            for b, sequence in enumerate(self.sequences):
                sequence.plan(rungs[b] if rungs else [])
        self._planned = bool(rungs)

    def append(self, b: int, count: int) -> list[int]:
        """`count` new pages of sequence b, on the rungs that are planned for it; their bytes are
        the caller's to write."""
        sequence = self.sequences[b]
        first, due = len(sequence.pages), sequence.due
        ids = [i for n in range(count) for i in self.pool.allocate(1, due[n] if due else -1)]
        self.fit(max(first + count, *(len(row) for row in self.pages())))
        self._enter(b, first, ids)
        sequence.add(ids)
        self._cuts = None
        return ids

    def take(self, due: list[int], news: Upload) -> None:
        """Before a step by kernels: gives the sequences `due` a page, and the device, once `news`
        is sent, what it must know of that and of what was lowered."""
        if not due and not self._lowered and (self.rungs == 1 or self.cuts() == self._sent):
            return
        for b in due:
            sequence = self.sequences[b]
            sequence.add(self.pool.allocate(1, sequence.due[0] if sequence.due else -1))
            if self._cuts is not None:
                row, rung = self._cuts[b], self.pool.rung(sequence.pages[-1])
                row[rung + 1 :] = [end + 1 for end in row[rung + 1 :]]
        if due and table_entries(max(map(len, self.pages()))) != self.block_table.shape[1]:
            self.fit()
        else:
            for b in due:
                ids = self.sequences[b].pages
                news.add(self._entries(b, len(ids) - 1, 1), self.pool.addresses(ids[-1:]))
        self.publish(news)
        there, here = self.next_rungs()
        wanted = [
            self.pool.rung(self.sequences[b].pages[-1]) if b in due else rung
            for b, rung in enumerate(here)
        ]
        if there is not None and wanted != here:
            here[:] = wanted
            news.add(there, wanted)

    def drop(self, b: int, first: int) -> None:
        """Takes all pages from number `first` on off sequence b."""
        self.pool.release([i for i in self.sequences[b].cut(first) if i != PASSED])
        self._cuts = None

    def drop_passed(self, geometry: Geometry, sliding: int) -> None:
        """Frees pages that lie behind a sliding window of every query to come.

        Their block table entries become 0, which no kernel reads: it starts at the first visible
        page.
        """
        for b, sequence in enumerate(self.sequences):
            first, passed = sequence.passed, geometry.passed_pages(sequence.length, sliding)
            if passed > first:
                self.pool.release(sequence.leave(passed))
                self.block_table[b, first:passed] = 0
                self._cuts = None

    def oldest(self, rung: int, count: int) -> list[int]:
        """Up to `count` pages of a rung, the oldest of all sequences first."""
        rows, cuts = self.pages(), self.cuts()
        starts, ends = ([row[r] for row in cuts] for r in (rung, rung + 1))
        if len(rows) == 1:
            return rows[0][starts[0] : min(ends[0], starts[0] + count)]
        found: dict[int, None] = {}  # a page may be several sequences'
        for i in range(min(starts, default=0), max(ends, default=0)):
            for ids, start, end in zip(rows, starts, ends, strict=True):
                if start <= i < end and len(found) < count:
                    found[ids[i]] = None
            if len(found) == count:
                break
        return list(found)

    def descents(self, moves: list[int]) -> list[tuple[int, int, list[int]]]:
        """Where pages come to lie of which so many go down from each rung, the oldest first and
        from the highest rung on, so that one may go down several.

        Args:
            moves: of each rung.
        Returns:
            (rung, rung where they end, pages), in the order in which they can go there at once:
            older pages of a sequence are never above newer ones.
        """
        rows = self.pages()
        if len(rows) == 1:  # where rungs begin, before and after
            (cuts,) = self.cuts()
            new = [cut + count for cut, count in zip(cuts, [*moves, 0], strict=True)]
            runs = [
                (rung, to, rows[0][max(cuts[rung], new[to]) : min(cuts[rung + 1], new[to + 1])])
                for rung in range(self.rungs)
                for to in range(rung)
            ]
            return [run for run in runs if run[2]]
        places: dict[int, tuple[int, int]] = {}  # of a page: how old it is among all sequences'
        for b, row in enumerate(rows):
            for i, page in enumerate(row):
                if page != PASSED:
                    places[page] = min((i, b), places.get(page, (i, b)))
        have: list[list[int]] = [[] for _ in range(self.rungs)]
        for page in sorted(places, key=places.__getitem__):
            have[self.pool.rung(page)].append(page)
        ends = {page: rung for rung, ids in enumerate(have) for page in ids}
        for rung in range(self.rungs - 1, 0, -1):
            gone = have[rung][: moves[rung]]
            ends.update(dict.fromkeys(gone, rung - 1))
            have[rung - 1] = sorted(have[rung - 1] + gone, key=places.__getitem__)
        found: dict[tuple[int, int], list[int]] = {}
        for page in sorted(places, key=places.__getitem__):
            if ends[page] < self.pool.rung(page):
                found.setdefault((self.pool.rung(page), ends[page]), []).append(page)
        return [(rung, to, found[rung, to]) for rung, to in sorted(found)]

    def note_lowered(self, ids: list[int], rung: int, to: int) -> None:
        """Takes note of pages that are about to come down from `rung`: a run in each sequence, the
        first of those that stand on it, with none between the two rungs. `publish` tells the
        device."""
        lowered = set(ids)
        for b, (row, cuts) in enumerate(zip(self.pages(), self.cuts(), strict=True)):
            first = end = cuts[rung]
            while end < len(row) and row[end] in lowered:
                end += 1
            if end > first:
                assert cuts[to + 1] == first
                cuts[to + 1 : rung + 1] = [end] * (rung - to)
                known, last = self._lowered.get(b, (first, end))
                self._lowered[b] = min(known, first), max(last, end)

    # -- whole sequences ---------------------------------------------------------------------------

    def select(self, chosen: list[int], index: Tensor) -> None:
        """Keeps the sequences `chosen`, also given as int64 [n] on the device, in that order; one
        may repeat. Pages are shared."""
        for b in chosen:
            self.pool.share([i for i in self.sequences[b].pages if i != PASSED])
        news = Upload(self.device)
        self._enter_lowered(news)  # the rows are copied
        news.send()
        self.release()
        self.state, self.block_table = self.state[index], self.block_table[index]
        kept = [self.sequences[b] for b in chosen]
        self.sequences = [sequence.copy() for sequence in kept]
        self._cuts = None
        if chosen:
            self.fit()
        else:
            self.block_table = self.block_table[:, :0]

    def release(self) -> None:
        """Gives back the pages of all sequences."""
        for ids in self.pages():
            self.pool.release([i for i in ids if i != PASSED])

    def fork(self, clock: Clock) -> "PageTable":
        """A table that goes on from here by itself, with the same pages."""
        for ids in self.pages():
            self.pool.share([i for i in ids if i != PASSED])
        self.shares_pool = True
        other = self._copy(clock, self.pool, shares_pool=True)
        other.fit()
        return other

    def duplicate(self, clock: Clock) -> "PageTable":
        """A table that goes on from here by itself, with pages of its own."""
        other = self._copy(clock, self.pool.duplicate(self.pages()))
        for b, sequence in enumerate(other.sequences):
            other.enter(b, sequence.passed)
        return other

    def _copy(self, clock: Clock, pool: PagePool, shares_pool: bool = False) -> "PageTable":
        sequences = [sequence.copy(clock) for sequence in self.sequences]
        return PageTable(pool, self.rungs, sequences, self.device, self, shares_pool)

    def close(self) -> None:
        """Gives back the pages of all sequences, and has none from here on."""
        self.release()
        self.sequences = []
        self._cuts = None

    def __del__(self) -> None:
        if getattr(self, "shares_pool", False):
            self.release()  # else they would stay for as long as any fork does


def take_pages(tables: list[PageTable], due: list[int]) -> None:
    """PageTable.take for several layers, whose news reach the device in one copy."""
    if not due and all(table.rungs == 1 for table in tables):
        return
    news = Upload(tables[0].device)
    for table in tables:
        table.take(due, news)
    news.send()
