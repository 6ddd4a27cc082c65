"""Old pages in host memory: they leave the device as they are, packed, and come back through a
staging buffer that layers share.

What a cache may hold on the device is its `kv_budget`. When a new page would pass it, the oldest
page of the layer with the fewest pages in host memory moves there, pinned where the device is a
GPU. Such a page has a slot, for good: its place in the layer's chunks of host memory is its place
in the staging buffer, so its entry in a block table is written once and kernels never know. Before
a layer attends, its chunks are copied into the buffer. With two buffers, of which layers take
turns, the next layer's are copied meanwhile, on a stream of their own.

The buffer must hold the layer with the most pages in host memory, so a budget reaches about as many
times further as there are layers to a buffer. Each step copies every page in host memory once: it
is the link to the host that limits the speed.
"""

import heapq
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvfold.kernels.pages import page_address
from kvfold.runtime.cache.pool import PagePool

CHUNK_PAGES = 16  # pages that are taken, and copied, together


class Pager:
    """What the layers of a cache, and of its forks, share: the staging buffers, and the bytes that
    they leave to pages.

    Args:
        sizes: bytes of a page of each layer.
        chunk_pages: slots by which host memory and staging buffers grow.
        buffers: staging buffers that layers take turns with; 2 to copy one layer's pages while
            another attends.
    """

    def __init__(
        self, sizes: Sequence[int], chunk_pages: int = CHUNK_PAGES, buffers: int = 1
    ) -> None:
        self.sizes, self.chunk_pages, self.buffers = list(sizes), chunk_pages, buffers
        self.limit = 0  # bytes of pages and staging buffers on the device, see `admit`
        self.most = 1  # new pages that may wait for their bytes together
        self.pools: weakref.WeakValueDictionary[int, PagingPool] = (
            weakref.WeakValueDictionary()
        )  # by layer
        self._fixed: weakref.WeakKeyDictionary[Any, int] = (
            weakref.WeakKeyDictionary()
        )  # bytes of caches besides pages
        self.stages: list[list[Tensor]] = [[] for _ in range(buffers)]
        self.held: list[weakref.ref | None] = [None] * buffers  # whose pages each buffer has
        self.stream: torch.cuda.Stream | None = None
        self.copied: list[torch.cuda.Event | None] = [
            None
        ] * buffers  # the end of a copy that was started early

    def new(self) -> "Pager":
        """Another one of the same kind, for a cache that begins anew."""
        return Pager(self.sizes, self.chunk_pages, self.buffers)

    def add(self, pool: "PagingPool") -> None:
        """Moves the pages of this pool too."""
        self.pools[pool.index] = pool

    # -- bytes -------------------------------------------------------------------------------------

    def chunk_nbytes(self, buffer: int) -> int:
        """Bytes of a chunk of a staging buffer, which must do for all layers that use it."""
        return self.chunk_pages * max(self.sizes[buffer :: self.buffers], default=0)

    def staging(self, chunks: dict[int, int]) -> int:
        """Bytes of staging buffers for so many chunks of host memory in each layer."""
        most = [
            max((n for i, n in chunks.items() if i % self.buffers == b), default=0)
            for b in range(self.buffers)
        ]
        return sum(n * self.chunk_nbytes(b) for b, n in enumerate(most))

    @property
    def nbytes(self) -> int:
        """Bytes of the staging buffers."""
        return sum(t.nbytes for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Every chunk of the staging buffers."""
        return [chunk for stage in self.stages for chunk in stage]

    @property
    def allotted(self) -> int:
        """Bytes of pages and staging buffers on the device."""
        return sum(pool.nbytes for pool in self.pools.values()) + self.nbytes

    @property
    def host_nbytes(self) -> int:
        """Bytes in host memory."""
        return sum(pool.host_nbytes for pool in self.pools.values())

    def needed(self, new: int, waiting: int) -> int:
        """The least bytes of pages and staging buffers on the device, once every layer has `new`
        pages more.

        Args:
            waiting: of these, pages that wait for their bytes together and so can't leave.
        """
        counts = {i: len(self.pools[i]) if i in self.pools else 0 for i in range(len(self.sizes))}
        chunks = {i: -(-(n + new) // self.chunk_pages) for i, n in counts.items()}
        for i, pool in self.pools.items():
            chunks[i] = max(chunks[i], len(pool.chunks))
        out = self.staging(chunks) + waiting * max(self.sizes)
        if any(pool.chunks for pool in self.pools.values()):
            return out
        return min(out, sum((n + new) * self.sizes[i] for i, n in counts.items()))

    def join(self, owner: Any, like: Any) -> None:
        """The cache of policy `owner` shares pages from here on, and is as large as that of
        `like`."""
        self._fixed[owner] = self._fixed.get(like, 0)

    def leave(self, owner: Any) -> None:
        """The cache of policy `owner` has no pages here any more."""
        self._fixed.pop(owner, None)

    def most_fixed(self, owner: Any, fixed: int) -> int:
        """The most bytes besides pages of one cache, if that of `owner` has `fixed`."""
        return max(
            [fixed, *(nbytes for other, nbytes in self._fixed.items() if other is not owner)]
        )

    def reserve(self, owner: Any, fixed: int, budget: int) -> None:
        """Leaves `budget` less the `fixed` bytes of the cache of `owner` to pages and staging
        buffers."""
        self._fixed[owner] = fixed
        self.limit = budget - max(self._fixed.values())

    def admit(self, owner: Any, fixed: int, budget: int, new: int = 0) -> None:
        """`reserve`, and makes room in what is left; `new`: pages that each layer is about to
        get."""
        self.reserve(owner, fixed, budget)
        self.push_out(0)
        on_device = self.allotted + new * sum(self.sizes) <= self.limit
        self.most = max(
            1, new if on_device else (self.limit - self.needed(new, 0)) // max(self.sizes)
        )

    def spare(self, nbytes: int) -> bool:
        """`push_out`, which moves nothing if there would not be room with all pages in host
        memory."""
        if self.allotted + nbytes <= self.limit:
            return True
        # with few layers to a buffer all pages in host memory may take more than some
        return self.needed(0, 0) + nbytes <= self.limit and self.push_out(nbytes)

    def push_out(self, nbytes: int) -> bool:
        """Moves pages to host memory until `nbytes` more fit on the device; False if there are none
        left to move.

        Pages go first, and the staging buffer grows when they are gone: at no instant is more on
        the device than `limit`.
        """
        pools = [pool for _, pool in sorted(self.pools.items())]
        resident = sum(pool.nbytes for pool in pools)
        chunks = {pool.index: len(pool.chunks) for pool in pools}
        enough = True
        while resident + self.staging(chunks) + nbytes > self.limit:
            movable = [pool for pool in pools if pool.movable() is not None]
            if not movable:
                enough = False
                break
            pool = min(movable, key=lambda pool: len(pool.slots))
            pool.push()
            resident -= pool.page_nbytes
            chunks[pool.index] = len(pool.chunks)
        self.fit()
        return enough

    # -- staging -----------------------------------------------------------------------------------

    def fit(self) -> None:
        """Gives the staging buffers as many chunks as the layers that use them have, and new slots
        their addresses."""
        for b, stage in enumerate(self.stages):
            count = max(
                (len(pool.chunks) for i, pool in self.pools.items() if i % self.buffers == b),
                default=0,
            )
            if len(stage) > count:
                self._wait(b)
                del stage[count:]
            for _ in range(count - len(stage)):
                stage.append(self._new_chunk(b))
        for pool in self.pools.values():
            pool.settle_addresses()

    def _new_chunk(self, buffer: int) -> Tensor:
        device = next(iter(self.pools.values())).device
        chunk = torch.empty(self.chunk_nbytes(buffer), dtype=torch.uint8, device=device)
        if self.buffers > 1 and device.type == "cuda":
            self.stream = self.stream or torch.cuda.Stream(device)
            chunk.record_stream(
                self.stream
            )  # whenever it is freed, a copy that was started early ends first
        return chunk

    def place(self, pool: "PagingPool", slot: int) -> Tensor:
        """A slot of the staging buffer, as a page of this pool."""
        first = slot % self.chunk_pages * pool.page_nbytes
        return self.stages[pool.index % self.buffers][slot // self.chunk_pages][
            first : first + pool.page_nbytes
        ]

    def bring(self, pool: "PagingPool") -> None:
        """Makes a layer's pages in host memory readable in the staging buffer, until another layer
        of that buffer is brought."""
        self._wait(pool.index % self.buffers)
        self._copy(pool)
        if self.buffers > 1:
            self._start((pool.index + 1) % len(self.sizes), pool.index)

    def _start(self, index: int, current: int) -> None:
        """Starts to copy the next layer's pages, if it has a buffer of its own."""
        pool = self.pools.get(index)
        if pool is None or not pool.chunks or index % self.buffers == current % self.buffers:
            return
        if pool.device.type != "cuda":
            self._copy(pool)
            return
        assert self.stream is not None  # chunks came with it
        self.stream.wait_stream(
            torch.cuda.current_stream(pool.device)
        )  # the buffer's last reader has attended
        with torch.cuda.stream(self.stream):
            self._copy(pool)
            self.copied[index % self.buffers] = self.stream.record_event()

    def _copy(self, pool: "PagingPool") -> None:
        b = pool.index % self.buffers
        held = self.held[b]
        own = held is not None and held() is pool
        for i in sorted(pool.stale) if own else range(len(pool.chunks)):
            chunk = pool.chunks[i]
            self.stages[b][i][: chunk.numel()].copy_(chunk, non_blocking=True)
        pool.copied()
        self.held[b] = weakref.ref(pool)

    def _wait(self, buffer: int) -> None:
        event = self.copied[buffer]
        if event is not None:
            event.wait(torch.cuda.current_stream(self.stages[buffer][0].device))
            self.copied[buffer] = None


class PagingPool(PagePool):
    """Pages of one layer, of which the oldest may be in host memory.

    Args:
        page_nbytes: bytes of a page.
        device: where pages begin.
        pager: of the cache.
        index: number of the layer.
    """

    def __init__(self, page_nbytes: int, device: torch.device, pager: Pager, index: int) -> None:
        super().__init__(page_nbytes, device)
        self.pager, self.index = pager, index
        self.chunks: list[Tensor] = []  # host memory, uint8 [chunk_pages · page_nbytes] each
        self.slots: dict[int, int] = {}  # of pages in host memory
        self.free: list[int] = []  # slots that no page has, a heap
        self.stale: set[int] = set()  # chunks that have changed since they were copied
        self.resident: dict[int, None] = {}  # pages on the device, oldest first
        self.waiting: set[int] = set()  # of them, those without bytes yet
        self._moved: list[int] = []  # pages whose slots have no address yet
        pager.add(self)

    def allocate(self, count: int, rung: int = -1) -> list[int]:
        """As PagePool.allocate; they stay on the device until `written` says that their bytes are
        there."""
        ids = []
        for _ in range(count):
            enough = self.pager.push_out(self.page_nbytes)
            assert enough  # the cache has seen that they fit
            ids += super().allocate(1, rung)
            self.resident[ids[-1]] = None
            self.waiting.add(ids[-1])
        return ids

    @property
    def most(self) -> int | None:
        return self.pager.most

    def written(self) -> None:
        self.waiting.clear()

    def movable(self) -> int | None:
        """The oldest page that may go to host memory."""
        return next((i for i in self.resident if i not in self.waiting), None)

    def push(self) -> None:
        """Moves the oldest page to host memory. Its slot gets an address when the staging buffer
        has grown to it."""
        number, size, per = self.movable(), self.page_nbytes, self.pager.chunk_pages
        assert number is not None
        if not self.free:
            pinned = self.device.type == "cuda"
            self.free = list(range(len(self.chunks) * per, (len(self.chunks) + 1) * per))
            self.chunks.append(torch.empty(per * size, dtype=torch.uint8, pin_memory=pinned))
        slot = heapq.heappop(self.free)
        place = self.chunks[slot // per][slot % per * size : (slot % per + 1) * size]
        place.copy_(self._pages[number], non_blocking=True)
        self._pages[number] = place
        del self.resident[number]
        self.slots[number] = slot
        self.stale.add(slot // per)
        self._moved.append(number)

    def copied(self) -> None:
        """What has changed is in the staging buffer."""
        self.stale.clear()

    def settle_addresses(self) -> None:
        """Pages that were moved get the addresses of their slots."""
        for number in self._moved:
            if number in self.slots:
                self._addresses[number] = page_address(self.pager.place(self, self.slots[number]))
        self.moves += len(self._moved)
        self._moved.clear()

    def release(self, ids: list[int]) -> None:
        super().release(ids)
        per, before = self.pager.chunk_pages, len(self.chunks)
        for i in ids:
            if i not in self._pages:
                self.resident.pop(i, None)
                self.waiting.discard(i)
                if i in self.slots:
                    heapq.heappush(self.free, self.slots.pop(i))
        used = -(-(max(self.slots.values(), default=-1) + 1) // per)
        if used < before:
            del self.chunks[used:]
            self.free = [slot for slot in self.free if slot < used * per]
            heapq.heapify(self.free)
            self.stale = {i for i in self.stale if i < used}
            self.pager.fit()

    def on_device(self, number: int) -> bool:
        return number in self.resident

    def page(self, number: int) -> Tensor:
        """A page's bytes where they lie, uint8 [page_nbytes]."""
        if number in self.slots and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # it may be on its way
        return self._pages[number]

    def bring(self) -> None:
        if self.chunks:
            self.pager.bring(self)

    def readable(self, ids: list[int]) -> list[Tensor]:
        self.bring()
        return [
            self.pager.place(self, self.slots[i]) if i in self.slots else self._pages[i]
            for i in ids
        ]

    @property
    def nbytes(self) -> int:
        """Bytes on the device, without the staging buffer."""
        return len(self.resident) * self.page_nbytes

    @property
    def host_nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)

    def tensors(self) -> list[Tensor]:
        return [self._pages[i] for i in self.resident]
