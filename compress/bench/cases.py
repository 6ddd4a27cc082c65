"""Caches to measure attention on: random pages in random order, what must come out, and the named
formats."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry, table_entries
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.kernels.gpu.attention import attention
from kvfold.kernels.gpu.queries import prepare_queries
from kvfold.kernels.gpu.records import PagedCache, Regions
from kvfold.kernels.pages import UNIT, page_address
from kvfold.kernels.quantizer import decode, encode

Pair = tuple[Format, Format]
DISTINCT = 64  # pages of different content while timing; the others repeat them
POISON = 0xFF  # bytes that are NaN as e4m3 and as float16


def classes(head_dim: int, *parts: tuple[int, int]) -> Format:
    """Keys in classes: (eighths of the head, levels)."""
    return Format(tuple((head_dim * eighths // 8, levels) for eighths, levels in parts))


# K and V of a layer by name; parameters are e4m3, one group
PAIRS: dict[str, Callable[[int], Pair]] = {
    "k2v2": lambda d: (uniform(d, 4), uniform(d, 4)),
    "best": lambda d: (classes(d, (2, 16), (1, 8), (2, 4), (2, 2), (1, 0)), uniform(d, 4)),
    "best-b": lambda d: (
        classes(d, (1, 16), (3, 4), (3, 2), (1, 0)),
        uniform(d, 4),
    ),  # another layer's pattern
    "k2v1.6": lambda d: (uniform(d, 4), uniform(d, 3)),
    "k4v4": lambda d: (uniform(d, 16), uniform(d, 16)),
    "16": lambda d: (raw16(d), raw16(d)),
}


def pair(name: str, head_dim: int) -> Pair:
    """Key and value format of a name.

    Raises:
        KvfoldError: a name that is not in the table, or a head that its formats do not cut.
    """
    if name not in PAIRS:
        raise KvfoldError(
            f"--formats names '{name}', which is not in the table; choose from {', '.join(PAIRS)}."
        )
    if head_dim % 64:
        raise KvfoldError(
            f"head_dim {head_dim} is not a multiple of 64, which the measured formats need; choose another."
        )
    return PAIRS[name](head_dim)


def finer(fmt: Format) -> Format:
    """A format of the same classes with a bit more, two for uniform ones: what pages are lowered
    from."""
    up = {0: 2, 2: 4, 4: 8, 8: 16, 16: 32} if fmt.kind.symmetric else {2: 4, 3: 4, 4: 16, 16: 256}
    return Format(
        tuple((n, up[levels]) for n, levels in fmt.classes),
        fmt.params,
        fmt.param_dtype,
        fmt.group_size,
    )


@dataclass(frozen=True)
class Shape:
    """One decoding step: query heads, KV heads, sequences, tokens of each."""

    num_heads: int
    num_kv_heads: int
    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}x{self.batch}x{self.tokens}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From HEADS/KV_HEADSxBATCHxTOKENS.

        Raises:
            KvfoldError: the text has another form, or a number that is no size.
        """
        try:
            heads, batch, tokens = text.lower().split("x")
            num_heads, num_kv_heads = map(int, heads.split("/"))
            shape = cls(num_heads, num_kv_heads, int(batch), int(tokens))
        except ValueError:
            raise KvfoldError(
                f"Shape '{text}' is not HEADS/KV_HEADSxBATCHxTOKENS; write e.g. 32/8x16x32768."
            ) from None
        if (
            min(shape.num_kv_heads, shape.batch, shape.tokens) < 1
            or shape.num_heads % shape.num_kv_heads
        ):
            raise KvfoldError(
                f"Shape '{text}' needs sizes of 1 or more and heads that are a multiple of KV heads."
            )
        return shape


def random_pages(geometry: Geometry, formats: Pair, count: int, device: torch.device) -> Tensor:
    """Valid pages of normal keys and values, uint8 [count, bytes of a page], keys of all heads
    first."""
    shape = (count, geometry.num_kv_heads, geometry.page_tokens, geometry.head_dim)
    return torch.cat(
        [encode(torch.randn(shape, device=device), fmt).flatten(1) for fmt in formats], 1
    )


def fill_pages(slab: Tensor, pages: Tensor) -> None:
    """Repeats pages [n, bytes] through a slab [count, bytes]."""
    for start in range(0, len(slab), len(pages)):
        part = slab[start : start + len(pages)]
        part.copy_(pages[: len(part)])


def regions_of(geometry: Geometry) -> Regions:
    """The regions of a cache whose 16-bit rows are a ring, as kernels take them."""
    return Regions(geometry.sinks, geometry.window, geometry.page_tokens, geometry.ring)


@dataclass
class Case:
    """Packed caches of some sequences in `copies` copies, and one query for each head.

    Attributes:
        pages: uint8 [distinct, bytes], content of the pages. `slab`: the pages themselves, [count,
            bytes].
        content: int64 [copies, B, entries], which of `pages` a block table's entry holds.
        tables: int64 [copies, B, entries], addresses; behind a sequence's pages comes one of NaN,
            then zeros.
        states: int32 [B, 2].
        raw_keys, raw_values: float16 [copies, B, Hkv, sinks + ring, head_dim], NaN where nothing is
            held.
        query: [B, num_heads, 1, head_dim].
    """

    geometry: Geometry
    formats: Pair
    lengths: list[int]
    pages: Tensor
    slab: Tensor
    content: Tensor
    tables: Tensor
    states: Tensor
    raw_keys: Tensor
    raw_values: Tensor
    query: Tensor

    @property
    def packed_nbytes(self) -> int:
        """Bytes of pages that one call reads."""
        return sum(map(self.geometry.num_pages, self.lengths)) * self.pages.shape[1]

    def attend(self, out: Tensor, queries, copy: int = 0, splits: int = 0) -> Tensor:
        """The kernel's output [B, 1, num_heads, head_dim]. `queries`: from `prepare`. `splits`: 0
        chooses."""
        return attention(
            queries, self.cache(copy), [self.formats], out, regions_of(self.geometry), splits=splits
        )

    def cache(self, copy: int = 0) -> PagedCache:
        """One copy, as kernels take it."""
        return PagedCache(
            self.tables[copy], self.states, self.raw_keys[copy], self.raw_values[copy]
        )

    def prepare(self):
        """The query as the kernel reads it."""
        return prepare_queries(self.query, self.geometry.num_kv_heads, self.geometry.head_dim**-0.5)

    def held(self, b: int) -> list[int]:
        """16-bit rows of sequence b that hold a token, in the tokens' order."""
        return held_rows(self.geometry, self.lengths[b])

    def expected(self, b: int) -> Tensor:
        """Attention of sequence b in float32 over the decoded pages: [num_heads, head_dim]."""
        g = self.geometry
        found = self.pages[self.content[0, b, : g.num_pages(self.lengths[b])]]
        split = g.page_nbytes(self.formats[0])
        sides = []
        parts = (found[:, :split], found[:, split:])
        for part, fmt, raw in zip(
            parts, self.formats, (self.raw_keys, self.raw_values), strict=True
        ):
            packed = (
                decode(part.unflatten(1, (g.num_kv_heads, -1)), fmt, g.page_tokens)
                .transpose(0, 1)
                .flatten(1, 2)
            )
            sides.append(torch.cat((packed, raw[0, b][:, self.held(b)].float()), 1))
        keys, values = sides
        query = self.query[b, :, 0].float().unflatten(0, (g.num_kv_heads, -1))
        weights = (query @ keys.mT * g.head_dim**-0.5).softmax(-1)
        return (weights @ values).flatten(0, 1)


def held_rows(geometry: Geometry, length: int) -> list[int]:
    """16-bit rows that hold a token of a sequence, in the tokens' order."""
    g = geometry
    after = g.sinks + g.num_pages(length) * g.page_tokens
    return [
        *range(min(g.sinks, length)),
        *(g.sinks + (t - g.sinks) % g.ring for t in range(after, length)),
    ]


def make_case(
    geometry: Geometry,
    formats: Pair,
    num_heads: int,
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype = torch.float16,
    copies: int = 1,
    distinct: int = 0,
) -> Case:
    """Random caches of sequences of these lengths.

    Args:
        dtype: of the query.
        distinct: pages of different content, 0 for all.
    """
    g = geometry
    counts = [g.num_pages(n) for n in lengths]
    entries = table_entries(max(counts) + 1)
    total = copies * sum(counts)
    pages = random_pages(g, formats, min(distinct or total, max(total, 1)), device)
    spare = copies * len(lengths)
    slab = torch.full((total + spare, pages.shape[1]), POISON, dtype=torch.uint8, device=device)
    fill_pages(slab[:total], pages)
    order = torch.randperm(total, device=device)
    step = pages.shape[1] // UNIT
    first = page_address(slab[0])
    tables = torch.zeros(copies, len(lengths), entries, dtype=torch.int64, device=device)
    content = torch.zeros_like(tables)
    start = 0
    for c in range(copies):
        for b, count in enumerate(counts):
            part = order[start : start + count]
            tables[c, b, :count] = first + part * step
            tables[c, b, count] = first + (total + c * len(lengths) + b) * step
            content[c, b, :count] = part % len(pages)
            start += count
    states = torch.tensor(
        [[n, count] for n, count in zip(lengths, counts, strict=True)],
        dtype=torch.int32,
        device=device,
    )
    shape = (copies, len(lengths), g.num_kv_heads, g.raw_rows, g.head_dim)
    empty = torch.ones(len(lengths), g.raw_rows, dtype=torch.bool)
    for b, length in enumerate(lengths):
        empty[b, held_rows(g, length)] = False
    nothing = empty.to(device)[None, :, None, :, None]
    raw = [
        torch.randn(shape, dtype=torch.float16, device=device).masked_fill_(nothing, torch.nan)
        for _ in range(2)
    ]
    query = (2 * torch.randn(len(lengths), num_heads, 1, g.head_dim, device=device)).to(dtype)
    return Case(
        g, formats, list(lengths), pages, slab, content, tables, states, raw[0], raw[1], query
    )
