"""What the launching functions take together: a cache's tensors, its regions, the formats of its
pages, and what is done to logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from kvfold.kernels.formats import Format


@dataclass(frozen=True)
class Regions:
    """Which tokens of a sequence stand where; see kernels/attention.py.

    Attributes:
        sinks: first tokens, always in 16 bits.
        window: last tokens, in 16 bits at the least.
        page_tokens: tokens of a page.
        ring: slots behind the sinks' rows that tokens take in turn; 0: the rows hold the tokens
            behind the pages in order.
    """

    sinks: int
    window: int
    page_tokens: int
    ring: int = 0


class PagedCache(NamedTuple):
    """One layer's cache of B sequences on the device.

    Attributes:
        table: int64 [B, entries], addresses of pages (`page_address`), in rising position.
        state: int32 [B, 2], tokens and pages of each sequence.
        raw_keys, raw_values: float16 [B, Hkv, rows, head_dim], same strides: sinks, then what
            `Regions.ring` says.
        segments: int32 [B, R + 1], contiguous, where pages have R formats: pages segments[b, r] …
            segments[b, r + 1] − 1 of sequence b are of format r, the oldest of format 0. Column 0
            counts as 0 and column R as the number of pages, whatever they hold: a page that comes
            due joins the last format without a write, and `append_step` must be given that one.
            None for one format.
    """

    table: Tensor
    state: Tensor
    raw_keys: Tensor
    raw_values: Tensor
    segments: Tensor | None = None


class PageFormat(NamedTuple):
    """How pages are written.

    Attributes:
        key, value: formats of a head's keys and values.
        key_clip, value_clip: float32 [Hkv] or [Hkv, groups], factors on (minimum, maximum) of
            formats that have one; None for 1.
    """

    key: Format
    value: Format
    key_clip: Tensor | None = None
    value_clip: Tensor | None = None


class FormatChange(NamedTuple):
    """Pages of one layer that go from one format to another.

    Attributes:
        sources, pages: addresses (`page_address`) of the pages that are read and of those that are
            written, as many.
        old, new: how those were written and how these will be, of one head_dim; clips of `old` mean
            nothing, those of `new` are contiguous.
    """

    sources: Sequence[int]
    pages: Sequence[int]
    old: PageFormat
    new: PageFormat


class KeyTransform(NamedTuple):
    """What is done to keys before they are stored, z = M(k − μ), and to queries, q·M⁻¹.

    Attributes:
        matrix, offset, query_matrix: float32 [Hkv, head_dim, head_dim], [Hkv, head_dim] and [Hkv,
            head_dim, head_dim]: M, μ and M⁻¹; None for the identity and zero. Contiguous.
    """

    matrix: Tensor | None = None
    offset: Tensor | None = None
    query_matrix: Tensor | None = None


class LogitOptions(NamedTuple):
    """What is done to logits.

    Attributes:
        softcap: cap·tanh(logit / cap); 0 or None for none.
        sink_logits: [num_heads], logits that join the denominator only (attention sinks of
            gpt-oss), or None.
        sliding: tokens that a query sees at the most; 0 for all.
    """

    softcap: float | None = None
    sink_logits: Tensor | None = None
    sliding: int = 0
