"""Attention of a decoding step over the blocks of an engine's pool: the split-K kernel of
attention.py, which finds pages and 16-bit rows by block tables.

Nothing is read by the host, and the grid goes by what the tables have room for, so a step can be
captured in a CUDA graph and replayed at other lengths.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.kernels.compile.launch import INTERPRET, launch, multiprocessors
from kvfold.kernels.formats import Format, raw16
from kvfold.kernels.gpu.attention import (
    AHEAD_STAGES,
    FOUR_BIT_REGISTERS,
    MOST_SLOTS,
    PLAIN_LOGITS,
    RAW_BLOCK,
    ROW_UNIT,
    STAGES,
    WAVE,
    _attention_kernel,
    pick_splits,
)
from kvfold.kernels.gpu.kinds import device_layout
from kvfold.kernels.gpu.merge import merge_parts
from kvfold.kernels.gpu.queries import Queries
from kvfold.kernels.gpu.records import LogitOptions, Regions
from kvfold.kernels.pages import UNIT

WAVES = 4  # of programs, so that sequences of several lengths leave few multiprocessors idle
LEAST_SHARED = 4096  # tokens of a part, where it is for that alone that a sequence is divided


class BlockCache(NamedTuple):
    """One layer's cache in an engine's pool, and B sequences that have one new token each.

    Block 0 of both is nobody's and never written, its bytes finite numbers: where a sequence has no
    page, what is read there is multiplied by 0.

    Attributes:
        packed: uint8 [blocks, bytes], pages side by side from the first byte on; its address and the
            step from block to block are multiples of 16.
        raw: float16 [blocks, Hkv, tokens of a block, 2·head_dim], keys, then values; that number of
            tokens is a power of two.
        table, raw_table: int32 [B, entries], blocks of each sequence in rising position.
        lengths: int32 [B], contiguous: tokens of each sequence, the new one included; 0 for a
            sequence that is not there.
        slots: int64 [B or more], contiguous: block · tokens of a block + place of each new token's
            row; negative for none.
        page_stride: bytes from a page to the next, a multiple of 16.
        pages_per_block: of `packed`.
        first_place: places of a sequence, as many as pages, before that of its first page.
    """

    packed: Tensor
    raw: Tensor
    table: Tensor
    raw_table: Tensor
    lengths: Tensor
    slots: Tensor
    page_stride: int
    pages_per_block: int
    first_place: int

    @property
    def raw_shift(self) -> int:
        """Logarithm of the tokens of a raw block."""
        return self.raw.shape[2].bit_length() - 1

    @property
    def page_steps(self) -> tuple[int, int, int]:
        """(first place, from block to block, from page to page), the steps in units of 16 bytes."""
        return self.first_place, self.packed.stride(0) // UNIT, self.page_stride // UNIT


def check_blocks(cache: BlockCache) -> None:
    """Raises KvfoldError where blocks lie otherwise in memory than kernels read them."""
    rows, packed = cache.raw, cache.packed
    steps = (*rows.stride()[:3], rows.shape[3] // 2)
    odd = any(step % ROW_UNIT.value for step in steps) or rows.data_ptr() % UNIT
    if rows.stride(3) != 1 or odd:
        raise KvfoldError(
            f"16-bit rows with steps {rows.stride()} are not aligned to 16 bytes; "
            "use a head_dim that is a multiple of 8."
        )
    if packed.data_ptr() % UNIT or packed.stride(0) % UNIT or cache.page_stride % UNIT:
        raise KvfoldError(
            f"Blocks {packed.stride(0)} bytes apart with pages {cache.page_stride} bytes apart are not "
            f"aligned to {UNIT} bytes; give a pool that is."
        )
    if rows.shape[2] & (rows.shape[2] - 1):
        raise KvfoldError(
            f"A raw block has {rows.shape[2]} tokens, which is no power of two; use one that is."
        )


def attend_blocks(
    queries: Queries,
    cache: BlockCache,
    formats: tuple[Format, Format],
    out: Tensor,
    regions: Regions,
    logits: LogitOptions = PLAIN_LOGITS,
    *,
    splits: int = 0,
) -> Tensor:
    """Attention of the newest token of each sequence.

    Args:
        queries: one of each sequence, from `append_blocks`.
        cache: of one layer, the new tokens and their pages written.
        formats: (key format, value format) of every page.
        out: [B, num_heads, head_dim], any float type; written, with zeros where no sequence is.
        regions: of the cache; its ring is not read.
        logits: what is done to them.
        splits: programs that share the pages of one head and sequence; 0 chooses.
    """
    batch, kv_heads, _, padded, dim = queries.data.shape
    page_tokens, places, device = regions.page_tokens, batch * kv_heads, out.device
    tokens = cache.table.shape[1] * cache.pages_per_block * page_tokens
    splits = splits or min(_splits(places, tokens, device), MOST_SLOTS)
    partial = torch.empty(places, splits, padded, dim, dtype=torch.float32, device=device)
    ml = torch.empty(places, splits, 2, padded, dtype=torch.float32, device=device)
    mean, shift = queries.mean, queries.shift
    none, scale = cache.lengths, queries.scale  # in place of what is not there: nothing reads them
    term: tuple = (scale, scale, scale, scale, 0, 0)
    if mean is not None:
        turns = mean.tables
        term = (mean.coefficients, mean.bias, turns.spans, turns.within, mean.bias.shape[3], 0)
    cap = float(logits.softcap or 0.0)
    keys, values = cache.raw.chunk(2, -1)
    k_layout, v_layout = (device_layout(fmt, page_tokens) for fmt in formats)
    ahead = k_layout.ahead or v_layout.ahead
    stages = AHEAD_STAGES if ahead else STAGES
    four_bit = all(levels == 16 for fmt in formats for _, levels in fmt.classes)
    launch(
        _attention_kernel, (splits, kv_heads, batch),
        # queries and cache
        queries.data, scale, scale if shift is None else shift, cache.packed, cache.table, cache.lengths, none,
        keys, values, partial, ml, none, none,
        # numbers
        0, cache.table.stride(0), regions.sinks, regions.window, 0, logits.sliding, 1, splits, splits, 1, 0, 1,
        *(step // ROW_UNIT.value for step in cache.raw.stride()[:3]), *term,
        cache.raw_table, cache.raw_table.stride(0), cache.raw_shift, *cache.page_steps,
        K=k_layout, V=v_layout, R=device_layout(raw16(dim), page_tokens), N=padded, COLUMNS=queries.columns,
        GROUP=queries.group, PROMPT=False, MASKED=logits.sliding > 0, CAP=cap, SHIFT=shift is not None and cap > 0,
        MEAN=0 if mean is None else mean.tables.within.shape[1], STAGES=stages, PREFETCH=ahead, BLOCK=RAW_BLOCK,
        INTERPRET=INTERPRET, PER_BLOCK=cache.pages_per_block, num_warps=1, num_stages=stages,
        maxnreg=FOUR_BIT_REGISTERS if four_bit else None,
    )  # fmt: skip
    merge_parts(
        partial,
        ml,
        out[:, None],
        logits.sink_logits,
        None if cap else shift,
        cache.lengths,
        queries,
        regions,
        new=0,
        advance=False,
        in_order=False,
    )
    return out


def _splits(places: int, tokens: int, device: torch.device) -> int:
    """Programs that share the pages of one head and sequence."""
    count = multiprocessors(device)
    one_wave = pick_splits(places, tokens, device)
    even = min(-(-WAVES * WAVE * count // places), tokens // LEAST_SHARED)
    return max(one_wave, even)
