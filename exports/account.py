"""The byte account of a cache: what the allocator budgets, the artifact states and `cache.nbytes` must equal to the byte.

One sequence of L tokens in one layer holds, resident:

    raw rows     (sinks + ring) × num_kv_heads × head_dim × 2 (K, V) × 2 bytes, allocated whole; ring: room for the window
                 and one open page, in whole pages
    pages        packed_tokens(L) / page_tokens × num_kv_heads × (key format + value format bytes of a page)
    block table  8 bytes an entry, grown TABLE_STEP entries at a time
    state        8 bytes: length and number of pages

Where pages come in several formats ("rungs", policy="progressive"), each page has the bytes of its own, and to each sequence and
layer belong, besides, the boundaries between runs of pages of one rung:

    segments     (rungs + 1) × 4 bytes
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.kernels.attention import packed_tokens
from kvfold.kernels.formats import Format

TABLE_STEP = 16  # entries by which a block table grows
ENTRY_NBYTES = 8  # of a block table: a page's address
RAW_NBYTES = 2  # of one element in the sinks and the window
STATE_NBYTES = 8  # of one sequence in one layer: length and number of pages, int32
SEGMENT_NBYTES = 4  # of one boundary between pages of two rungs, int32


@dataclass(frozen=True)
class Geometry:
    """What the size of a cache depends on besides the formats.

    Attributes:
        num_kv_heads, head_dim: of the model.
        sinks, window, page_tokens: in tokens.
    """

    num_kv_heads: int
    head_dim: int
    sinks: int
    window: int
    page_tokens: int

    @property
    def ring(self) -> int:
        """Slots of the window and the page that fills behind it, a multiple of page_tokens: a page's rows lie in a run."""
        return -(-(self.window + self.page_tokens) // self.page_tokens) * self.page_tokens

    @property
    def raw_rows(self) -> int:
        """Tokens that the 16-bit buffer of one sequence has room for."""
        return self.sinks + self.ring

    def num_pages(self, tokens: int) -> int:
        """Pages of one sequence of `tokens` tokens in one layer."""
        return packed_tokens(tokens, self.sinks, self.window, self.page_tokens) // self.page_tokens

    def table_nbytes(self, entries: int) -> int:
        """Bytes of one layer and sequence besides pages, where the block table has so many entries: raw rows, table, state."""
        return (
            self.raw_rows * self.num_kv_heads * self.head_dim * 2 * RAW_NBYTES + entries * ENTRY_NBYTES + STATE_NBYTES
        )

    def fixed_nbytes(self, tokens: int) -> int:
        """Bytes of one layer and sequence that no format changes: raw rows, block table, state. 0 for no tokens."""
        if tokens == 0:
            return 0
        return self.table_nbytes(-(-self.num_pages(tokens) // TABLE_STEP) * TABLE_STEP)

    def page_nbytes(self, fmt: Format) -> int:
        """Bytes of one page's keys or values in a format, all KV heads."""
        return self.num_kv_heads * fmt.nbytes(self.page_tokens)

    def pair_nbytes(self, key: Format, value: Format) -> int:
        """Bytes of one page, keys and values, all KV heads."""
        return self.page_nbytes(key) + self.page_nbytes(value)

    def segments_nbytes(self, rungs: int) -> int:
        """Bytes of one sequence's segment boundaries in one layer; none where all pages have one format."""
        return (rungs + 1) * SEGMENT_NBYTES if rungs > 1 else 0

    def side_nbytes(self, fmt: Format, tokens: int) -> int:
        """Bytes of all pages' keys or values of one sequence in one layer."""
        return self.num_pages(tokens) * self.page_nbytes(fmt)

    def elements(self, tokens: int, num_layers: int) -> int:
        """Cached elements of one sequence, K and V."""
        return 2 * num_layers * self.num_kv_heads * self.head_dim * tokens


def cache_nbytes(geometry: Geometry, formats: Sequence[tuple[Format, Format]], tokens: int) -> int:
    """Resident bytes of one sequence's cache.

    Args:
        geometry: of the cache.
        formats: (key format, value format) of each layer.
        tokens: length of the sequence.
    """
    return batch_nbytes(geometry, formats, [tokens])


def batch_nbytes(geometry: Geometry, formats: Sequence[tuple[Format, Format]], lengths: Sequence[int]) -> int:
    """Resident bytes of the caches of a batch whose sequences share no page. `lengths`: tokens of each, without padding.

    Every sequence's block table is as long as the longest one's, and a sequence of no tokens holds its raw rows too.
    """
    longest = max(lengths)
    fixed = len(formats) * len(lengths) * geometry.fixed_nbytes(longest) if longest else 0
    return fixed + sum(geometry.side_nbytes(k, n) + geometry.side_nbytes(v, n) for k, v in formats for n in lengths)


def payload_bits(formats: Sequence[tuple[Format, Format]]) -> float:
    """Mean bits per packed element, codes and parameters only."""
    return sum(k.payload_bits + v.payload_bits for k, v in formats) / (2 * len(formats))
