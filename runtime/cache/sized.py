"""What a layer of the packed cache consists of, and how big it is."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvfold.exports.account import Geometry
from kvfold.exports.spec import LayerSpec
from kvfold.kernels.formats import Format
from kvfold.runtime.cache.page_table import PageTable
from kvfold.runtime.cache.sequence import Count
from kvfold.runtime.cache.shared import SharedState
from kvfold.runtime.cache.store import LayerStore
from kvfold.runtime.cache.window import RawWindow


class SizedLayer(CacheLayerMixin):
    """What can be asked of a layer, whatever it is used for.

    Args:
        rungs: what pages may be stored in, floor first.
        shared: by all layers of the cache.
        layer_idx: number of the layer.
    """

    held: LayerStore  # once there is anything

    def __init__(self, rungs: Sequence[LayerSpec], shared: SharedState, layer_idx: int) -> None:
        super().__init__()
        self.rungs, self.shared, self.layer_idx = list(rungs), shared, layer_idx
        self.sliding = shared.geometry.sliding_of(layer_idx)
        self._columns = Count(shared.clock)

    @property
    def geometry(self) -> Geometry:
        """Sinks, window, page size and the layer's head shape."""
        return self.shared.geometry.of_layer(self.layer_idx)

    @property
    def spec(self) -> LayerSpec:
        """The floor's formats and transforms."""
        return self.rungs[0]

    @property
    def formats(self) -> tuple[Format, Format]:
        """The floor's formats of keys and of values."""
        return self.spec.key.format, self.spec.value.format

    @property
    def window(self) -> RawWindow:
        """The 16-bit rows, once there are some."""
        return self.held.window

    @property
    def table(self) -> PageTable:
        """The sequences and their pages, once there are some."""
        return self.held.table

    @property
    def batch_size(self) -> int:
        """Sequences, once there are some."""
        return len(self.table.sequences)

    @property
    def columns(self) -> int:
        """Tokens seen, padding included: what transformers calls the sequence length."""
        return self._columns.value if self.is_initialized else 0

    def tensors(self) -> list[Tensor]:
        """Every tensor on the device that grows with the number of sequences or tokens."""
        return self.held.tensors() if self.is_initialized else []

    def own_tensors(self) -> list[Tensor]:
        """Every resident tensor but the pages."""
        return self.held.own_tensors() if self.is_initialized else []

    @property
    def host_nbytes(self) -> int:
        """Bytes in host memory, whoever shares them."""
        return self.table.pool.host_nbytes if self.is_initialized else 0

    @property
    def nbytes(self) -> int:
        """Resident bytes, on the device."""
        return self.held.nbytes if self.is_initialized else 0

    def lengths(self) -> list[int]:
        """Tokens of each sequence, without padding."""
        return [sequence.length for sequence in self.table.sequences] if self.is_initialized else []

    def page_counts(self, batch_size: int) -> list[int]:
        """Pages of each of `batch_size` sequences, those counted that are gone."""
        return (
            [len(s.pages) for s in self.held.table.sequences]
            if self.is_initialized
            else [0] * batch_size
        )

    def num_pages(self) -> int:
        """Distinct resident pages."""
        return len(self.table.own_pages()) if self.is_initialized else 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + (0 if self.shared.stepping else query_length), 0

    def report(self) -> dict[str, Any]:
        """See QuantizedKVCache.report."""
        g, lengths = self.geometry, self.lengths()
        seen = sum(min(n, self.sliding or n) for n in lengths)
        elements = 2 * g.num_kv_heads * g.head_dim * seen
        counts = [0] * len(self.rungs)
        if self.is_initialized:  # a fork has one rung
            counts = [self.num_pages()] if self.table.shares_pool else self.table.pool.counts
        names = [f"K {rung.key.format} | V {rung.value.format}" for rung in self.rungs]
        return {
            "tokens": lengths,
            "pages": dict(reversed(list(zip(names, counts, strict=True)))),
            "bytes": self.nbytes,
            "host_bytes": self.host_nbytes,
            "effective_bits": 8 * (self.nbytes + self.host_nbytes) / elements if elements else 0.0,
        }
