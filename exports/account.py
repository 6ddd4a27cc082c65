"""The byte account of a cache: what the allocator budgets,
the artifact states and `cache.nbytes` must equal to the byte.

One sequence of L tokens in one layer holds, resident:

    raw rows     (sinks + ring) × num_kv_heads × head_dim × 2 (K, V) × 2 bytes, allocated whole;
    ring: room for the
                 window, one open page and the rollback, in whole pages
    pages        packed_tokens(L) / page_tokens × num_kv_heads × (key format + value format bytes of
    a page); in a layer
                 with a sliding window less those that no later query sees, nor one after a crop by
                 the rollback
    block table  8 bytes an entry, LEAST_ENTRIES or a power of two above; pages that are gone keep
    their entry state        8 bytes: length and number of pages

and, of a hybrid model (exports/hybrids.py), for all its layers together

    states       recurrent states and last inputs of convolutions, as transformers keeps them: the
                 same bytes at any length

Where pages come in several formats ("rungs", policy="progressive"), each page has the bytes of its
own, and to each sequence and layer belong, besides, the boundaries between runs of pages of one
rung:

    segments     (rungs + 1) × 4 bytes
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from kvfold.kernels.attention import packed_tokens
from kvfold.kernels.formats import Format

LEAST_ENTRIES = (
    16  # of a block table; it doubles as it grows, so that a captured step is seldom captured again
)
ENTRY_NBYTES = 8  # of a block table: a page's address
RAW_NBYTES = 2  # of one element in the sinks and the window
STATE_NBYTES = 8  # of one sequence in one layer: length and number of pages, int32
SEGMENT_NBYTES = 4  # of one boundary between pages of two rungs, int32


def table_entries(pages: int) -> int:
    """Entries of a block table with room for so many pages: none, or a power of two from
    LEAST_ENTRIES on."""
    return max(LEAST_ENTRIES, 1 << (pages - 1).bit_length()) if pages else 0


@dataclass(frozen=True)
class Geometry:
    """What the size of a cache depends on besides the formats.

    Attributes:
        num_kv_heads, head_dim: KV heads of a layer, and channels of one; where layers differ, those
            of the first.
        sinks, window, page_tokens: in tokens.
        sliding: for each layer the tokens that a query sees at the most, itself included, 0 for
            all; empty if no layer slides.
        rollback: tokens by which a sequence may be cropped as if they had never come; the ring is
            that much longer.
        state_nbytes: bytes of one sequence's states in all layers, which do not grow with tokens; 0
            where all layers attend.
        heads: (num_kv_heads, head_dim) of each layer, where layers differ; else empty.
        shared: layers whose keys and values later layers read too.
        chunked: what a query of a layer that slides sees at the most are the tokens of its chunk,
            counted from the sequence's first, and not the latest ones.
    """

    num_kv_heads: int
    head_dim: int
    sinks: int
    window: int
    page_tokens: int
    sliding: tuple[int, ...] = ()
    rollback: int = 0
    state_nbytes: int = 0
    heads: tuple[tuple[int, int], ...] = ()
    shared: tuple[int, ...] = ()
    chunked: bool = False

    def of_layer(self, layer: int) -> "Geometry":
        """The same with the heads of one layer, for all that is asked of a single layer."""
        return _with_heads(self, *self.heads[layer]) if self.heads else self

    @property
    def ring(self) -> int:
        """Slots of the window, the page that fills behind it and `rollback` more tokens, a multiple
        of page_tokens: a page's rows lie in a run."""
        return (
            -(-(self.window + self.page_tokens + self.rollback) // self.page_tokens)
            * self.page_tokens
        )

    @property
    def raw_rows(self) -> int:
        """Tokens that the 16-bit buffer of one sequence has room for."""
        return self.sinks + self.ring

    def sliding_of(self, layer: int) -> int:
        """Tokens that a query of a layer sees at the most; 0 for all."""
        return self.sliding[layer] if self.sliding else 0

    def num_pages(self, tokens: int) -> int:
        """Pages of one sequence of `tokens` tokens in one layer,
        those that a sliding window has left behind included."""
        return packed_tokens(tokens, self.sinks, self.window, self.page_tokens) // self.page_tokens

    def passed_pages(self, tokens: int, sliding: int) -> int:
        """First pages that no query from position `tokens` − rollback on sees; 0 without a sliding
        window."""
        if not sliding:
            return 0
        least = max(0, tokens - self.rollback)  # a crop may come back to here
        behind = max(0, least - sliding + 1 - self.sinks) // self.page_tokens
        return min(behind, self.num_pages(least))

    def held_pages(self, tokens: int, sliding: int = 0) -> int:
        """Resident pages of one sequence of `tokens` tokens in one layer, once its last query has
        attended."""
        return self.num_pages(tokens) - self.passed_pages(tokens, sliding)

    @property
    def token_elements(self) -> int:
        """Elements of one token in one layer, K and V."""
        return 2 * self.num_kv_heads * self.head_dim

    def table_nbytes(self, entries: int) -> int:
        """Bytes of one layer and sequence besides pages, where the block table has so many entries:
        raw rows, table, state."""
        return (
            self.raw_rows * self.token_elements * RAW_NBYTES + entries * ENTRY_NBYTES + STATE_NBYTES
        )

    def fixed_nbytes(self, tokens: int) -> int:
        """Bytes of one layer and sequence that no format changes: raw rows, block table, state. 0
        for no tokens."""
        if tokens == 0:
            return 0
        return self.table_nbytes(table_entries(self.num_pages(tokens)))

    def page_nbytes(self, fmt: Format) -> int:
        """Bytes of one page's keys or values in a format, all KV heads."""
        return self.num_kv_heads * fmt.nbytes(self.page_tokens)

    def pair_nbytes(self, key: Format, value: Format) -> int:
        """Bytes of one page, keys and values, all KV heads."""
        return self.page_nbytes(key) + self.page_nbytes(value)

    def segments_nbytes(self, rungs: int) -> int:
        """Bytes of one sequence's segment boundaries in one layer; none where all pages have one
        format."""
        return (rungs + 1) * SEGMENT_NBYTES if rungs > 1 else 0

    def side_nbytes(self, fmt: Format, tokens: int, sliding: int = 0) -> int:
        """Bytes of all resident pages' keys or values of one sequence in one layer."""
        return self.held_pages(tokens, sliding) * self.page_nbytes(fmt)

    def elements(self, tokens: int, num_layers: int) -> int:
        """Cached elements of one sequence, K and V: of every token that a later query may see."""
        return sum(
            self.of_layer(i).token_elements * min(tokens, self.sliding_of(i) or tokens)
            for i in range(num_layers)
        )

    def packed_elements(self, tokens: int, num_layers: int) -> int:
        """Elements in the resident pages of one sequence, K and V."""
        return self.page_tokens * sum(
            self.of_layer(i).token_elements * self.held_pages(tokens, self.sliding_of(i))
            for i in range(num_layers)
        )

    def raw_nbytes(self, num_layers: int) -> int:
        """Bytes of one sequence's 16-bit rows in all layers."""
        elements = sum(self.of_layer(i).token_elements for i in range(num_layers))
        return self.raw_rows * elements * RAW_NBYTES

    def all_fixed_nbytes(self, tokens: int, num_layers: int) -> int:
        """Bytes of one sequence that no format changes: `fixed_nbytes` of all layers, and states."""
        fixed = sum(self.of_layer(i).fixed_nbytes(tokens) for i in range(num_layers))
        return fixed + self.state_nbytes


@lru_cache(maxsize=256)
def _with_heads(geometry: Geometry, num_kv_heads: int, head_dim: int) -> Geometry:
    return replace(geometry, num_kv_heads=num_kv_heads, head_dim=head_dim, heads=())


def cache_nbytes(geometry: Geometry, formats: Sequence[tuple[Format, Format]], tokens: int) -> int:
    """Resident bytes of one sequence's cache.

    Args:
        geometry: sinks, window, page length and heads that the cache is made for.
        formats: (key format, value format) of each layer.
        tokens: length of the sequence.
    """
    return batch_nbytes(geometry, formats, [tokens])


def stepped_nbytes(
    geometry: Geometry, formats: Sequence[tuple[Format, Format]], tokens: int
) -> int:
    """What `cache_nbytes` was in artifacts of before block tables doubled:
    theirs grew by LEAST_ENTRIES entries at a time."""
    pages = geometry.num_pages(tokens)
    entries = -(-pages // LEAST_ENTRIES) * LEAST_ENTRIES
    fewer = (table_entries(pages) - entries) * ENTRY_NBYTES * len(formats)
    return cache_nbytes(geometry, formats, tokens) - fewer


def batch_nbytes(
    geometry: Geometry,
    formats: Sequence[tuple[Format, Format]],
    lengths: Sequence[int],
    new: int = 0,
) -> int:
    """Resident bytes of the caches of a batch whose sequences share no page.

    Every sequence's block table is as long as the longest one's, and a sequence of no tokens holds
    its raw rows too.

    Args:
        lengths: tokens of each sequence, without padding.
        new: 0: between two calls of the model. Else the most that is resident in the call that
            brings the last `new` tokens: the layer whose turn it is keeps what the first of their
            queries sees until all have attended, and so do, from their turn on, layers that others
            read too.
    """
    longest = max(lengths)
    fixed = geometry.all_fixed_nbytes(longest, len(formats))
    total = len(lengths) * fixed if longest else 0
    most = 0
    for i, (key, value) in enumerate(formats):
        page, sliding = geometry.of_layer(i).pair_nbytes(key, value), geometry.sliding_of(i)
        at_rest = sum(geometry.held_pages(n, sliding) for n in lengths)
        before = sum(geometry.held_pages(max(0, n - new), sliding) for n in lengths)
        within = sum(
            geometry.num_pages(n) - geometry.passed_pages(max(0, n - new), sliding) for n in lengths
        )
        kept = max(at_rest, before) if new else at_rest
        total += page * kept
        if i in geometry.shared and new:
            total += page * (within - kept)
        else:
            most = max(most, page * (within - kept))
    return total + most if new else total


def stock_nbytes(geometry: Geometry, tokens: int, num_layers: int) -> int:
    """Bytes of one sequence's unquantised cache of 16 bits, states included."""
    return 2 * geometry.elements(tokens, num_layers) + geometry.state_nbytes


def effective_bits(
    geometry: Geometry, nbytes: int, lengths: Sequence[int], num_layers: int
) -> float:
    """Bits for each element of keys and values: all that is resident but states, which are no
    elements and do not grow with tokens.

    Args:
        nbytes: of the caches of sequences of `lengths` tokens together.
    """
    elements = sum(geometry.elements(n, num_layers) for n in lengths)
    return 8 * (nbytes - len(lengths) * geometry.state_nbytes) / elements


def payload_bits(formats: Sequence[tuple[Format, Format]]) -> float:
    """Mean bits per packed element, codes and parameters only."""
    return sum(k.payload_bits + v.payload_bits for k, v in formats) / (2 * len(formats))
