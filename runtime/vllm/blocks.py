"""Where a sequence's pages and 16-bit rows lie in the blocks of an engine's pool.

Each layer has two caches in one pool, whose blocks have the same bytes:

    packed   block_tokens tokens a block: pages_per_block pages, nothing else. Tokens of the sinks
             and of the window have their place too, which stays empty until their page is packed.
    raw      raw_block_tokens tokens a block: keys, then values, in float16. Sinks and window only.

A page begins behind the sinks, a block does not: the tokens of page p are N + p·P … N + (p + 1)·P −
1, and it lies in place p + ⌈N / P⌉ of the sequence, the first one that does not begin before the
page's own tokens. So a block's bytes depend on no token behind its own, which is what lets two
sequences with the same beginning share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.errors import KvfoldError
from kvfold.exports.account import RAW_NBYTES, Geometry
from kvfold.kernels.formats import Format
from kvfold.kernels.pages import UNIT

BLOCK_TOKENS = 128  # of a packed block, or the whole pages that fit in
LEAST_RAW_TOKENS = 8  # of a raw block


def stride_of(geometry: Geometry, formats: tuple[Format, Format]) -> int:
    """Bytes from a page of a layer to the next: its own, up to a multiple of what kernels align
    addresses to."""
    return -(-geometry.pair_nbytes(*formats) // UNIT) * UNIT


@dataclass(frozen=True)
class BlockLayout:
    """Tokens of the regions of a sequence and of the blocks they lie in.

    Attributes:
        sinks, window, page_tokens: as in Geometry.
        block_tokens: of a packed block, a multiple of page_tokens.
        raw_block_tokens: of a raw block, a divisor of block_tokens.
    """

    sinks: int
    window: int
    page_tokens: int
    block_tokens: int
    raw_block_tokens: int

    @property
    def pages_per_block(self) -> int:
        """Pages of one layer in a packed block."""
        return self.block_tokens // self.page_tokens

    @property
    def sink_blocks(self) -> int:
        """Raw blocks of a sequence that hold its sinks."""
        return -(-self.sinks // self.raw_block_tokens)

    def raw_window(self, drafts: int = 0) -> int:
        """Latest tokens whose 16-bit rows the next query may read: the window, the page that fills
        behind it, and drafts that may turn out wrong."""
        return self.window + self.page_tokens + drafts

    @property
    def first_place(self) -> int:
        """Places of a sequence, as many as pages, before that of its first page."""
        return -(-self.sinks // self.page_tokens)

    def place(self, page: int) -> tuple[int, int]:
        """Where a sequence's page lies: (entry of its block table, page of that block)."""
        return divmod(page + self.first_place, self.pages_per_block)


def block_layout(
    geometry: Geometry, formats: Sequence[tuple[Format, Format]], block_tokens: int | None = None
) -> BlockLayout:
    """The layout of an artifact's caches.

    Args:
        geometry: of all KV heads, or of those of one rank.
        formats: (key format, value format) of each layer.
        block_tokens: of a packed block; None for the usual number.
    Raises:
        KvfoldError: block_tokens has no whole pages.
    """
    page = geometry.page_tokens
    tokens = block_tokens or max(page, BLOCK_TOKENS // page * page)
    if tokens % page:
        raise KvfoldError(
            f"A block of {tokens} tokens is not made of whole pages, which have {page} in this artifact; "
            f"give --block-size a multiple of {page}, or leave it out."
        )
    packed = tokens // page * sum(stride_of(geometry, pair) for pair in formats)
    token = len(formats) * geometry.num_kv_heads * geometry.head_dim * 2 * RAW_NBYTES
    # as many tokens as fill a packed block's bytes, in powers of two
    raw = LEAST_RAW_TOKENS
    while tokens % (2 * raw) == 0 and 2 * raw * token <= packed:
        raw *= 2
    return BlockLayout(geometry.sinks, geometry.window, page, tokens, raw)
