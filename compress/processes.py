"""Several processes that compress one model together, started by torchrun or accelerate launch.

Sequences are shared out: each process runs those it has, and process 0 adds up what they give in
the order of the sequences. A floating-point sum depends on the order of its terms, not on who has
computed them, so the artifact is the same to the byte as one process's. Process 0 also decides,
prints and writes; what it decides is sent to the others. All call the same methods here in the same
order: each waits until the others have come.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kvfold.compress.messages import pack, unpack
from kvfold.compress.work import Unfinished
from kvfold.errors import KvfoldError
from kvfold.memory import is_out_of_memory

T = TypeVar("T")
CPU = torch.device("cpu")


class PeerLost(Unfinished):
    """Another process has ended: it has said why, unless it was killed."""


@dataclass(frozen=True)
class Processes:
    """Those that compress one model; a single one sends nothing and computes everything.

    Attributes:
        rank: number of this process, of `size`.
        local_rank: its number on this host, of `local_size`.
        device: where what is sent lies on its way: this process's CUDA device, or the CPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = CPU

    joined: ClassVar["Processes | None"] = None  # while `launch.join` lasts

    @classmethod
    def current(cls) -> "Processes":
        """Those that this process has joined (launch.py); else this one alone."""
        return cls.joined or cls()

    @property
    def first(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def share(self, costs: Sequence[float]) -> "Share":
        """Shares out items: the dearest first, each to the process that has the least to do, so
        that equal ones go round; process 0, which adds up and writes besides, comes last.

        Args:
            costs: of each item, in any unit.
        """
        load, owners = [0.0] * self.size, [0] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[i] = min(range(self.size), key=lambda rank: (load[rank], -rank))
            load[owners[i]] += costs[i]
        return Share(self, owners)

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank, in process 0; [] in the others.

        Args:
            value: of the kinds that messages.py knows; so everywhere here.
        Raises:
            PeerLost: a process has ended.
        """
        if self.size == 1:
            return [value]
        return self._meet(lambda: self._gathered(value))

    def _gathered(self, value: T) -> list[T]:
        mine = None if self.first else self._bytes(pack(value))
        lengths = [self._length(0) for _ in range(self.size)]
        dist.all_gather(lengths, self._length(0 if mine is None else len(mine)))
        if mine is not None:
            dist.send(mine, 0)
            return []
        found = [value]
        for rank in range(1, self.size):  # one at a time, so that no more than one waits in memory
            theirs = torch.empty(int(lengths[rank]), dtype=torch.uint8, device=self.device)
            dist.recv(theirs, rank)
            found.append(unpack(theirs.cpu().numpy().tobytes(), self.device))
        return found

    def broadcast(self, value: T) -> T:
        """Process 0's value, in every process; what the others give is ignored.

        Raises:
            PeerLost: a process has ended.
        """
        return value if self.size == 1 else self._meet(lambda: self._sent(value))

    def _sent(self, value: T) -> T:
        message = self._bytes(pack(value)) if self.first else None
        length = self._length(0 if message is None else len(message))
        dist.broadcast(length, 0)
        if message is None:
            message = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(message, 0)
        return value if self.first else unpack(message.cpu().numpy().tobytes(), self.device)

    def _bytes(self, data: bytes) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)

    def _length(self, count: int) -> Tensor:
        return torch.tensor([count], device=self.device)

    def from_first(self, find: Callable[[], T]) -> T:
        """What process 0 finds, in every process: the others wait for it."""
        return self.broadcast(find() if self.first else None)  # type: ignore[return-value]

    def in_turn(self, find: Callable[[], T]) -> T:
        """What each process finds for itself, process 0 before the others: what that fetches or
        converts on the way lies in a cache for them."""
        if not self.first:
            self.broadcast(None)
            return find()
        found = find()
        self.broadcast(None)
        return found

    def agree(self, given: dict[str, str]) -> None:
        """Compares what the processes were given.

        Args:
            given: words by what a sentence calls them.
        Raises:
            KvfoldError: in process 0, where another's differ.
            PeerLost: in the others, then.
        """
        for rank, other in enumerate(self.gather(given)):
            for name, value in given.items():
                if other[name] != value:
                    raise KvfoldError(
                        f"{name} is '{other[name]}' in process {rank} and '{value}' in process 0, but all "
                        f"{self.size} compress one model; start them by the same command, on the same files."
                    )
        self.broadcast(None)

    def _meet(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise PeerLost(
                f"Another of the {self.size} processes has ended or cannot be reached, so none goes on; look for what "
                "it said, then start all of them again by the same command with --resume."
            ) from error


@dataclass(frozen=True)
class Share:
    """Which process has which of some items.

    Attributes:
        processes: that share them.
        owners: rank of the process that has each item.
    """

    processes: Processes
    owners: list[int]

    @property
    def own(self) -> list[int]:
        """Numbers of the items that this process has, rising."""
        return [i for i, owner in enumerate(self.owners) if owner == self.processes.rank]

    def map(self, compute: Callable[[int], T]) -> Iterator[T]:
        """What each item gives, computed by the process that has it: in process 0 of all items in
        their order, in the others of none, but all must go through it to its end.

        Args:
            compute: from an item's number.
        """
        if self.processes.size == 1:
            yield from map(compute, self.own)
            return
        waiting: dict[int, T] = {}  # in process 0: until it is their turn
        turn = 0
        for k in range(max(map(self.owners.count, range(self.processes.size)))):
            for found in self.processes.gather({i: compute(i) for i in self.own[k : k + 1]}):
                waiting |= found
            while turn in waiting:
                yield waiting.pop(turn)
                turn += 1

    def all(self, compute: Callable[[int], T]) -> list[T]:
        """As `map`, as a list in every process."""
        return self.processes.broadcast(list(self.map(compute)))
