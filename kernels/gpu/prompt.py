"""What many queries of a prompt read of the pages together, through a library's attention.

The split-K kernel unpacks a page again for every 16 columns of queries: right for a step, for a
prompt most of its time. So where all queries of a call read the same first pages, those are decoded
to float16 a bounded run at a time, scratch that the next run overwrites, and a library's
FlashAttention goes over them without a mask. It gives the logarithm of its sum of weights too, so
that runs are merged as the parts of split-K are. Runs under Triton's interpreter on a CPU too, with
plain torch in the library's place.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.kernels.compile.launch import launch
from kvfold.kernels.formats import Format
from kvfold.kernels.gpu.device.codec import read_header, to_fp16
from kvfold.kernels.gpu.device.columns import NBYTES
from kvfold.kernels.gpu.device.constants import LOG2_E
from kvfold.kernels.gpu.device.kinds import decode_elements
from kvfold.kernels.gpu.device.tiles import TOKEN_TILE, tile_width
from kvfold.kernels.gpu.kinds import own_code
from kvfold.kernels.gpu.tables import format_tables, table_length, warps_for
from kvfold.kernels.kinds.storage import FIELDS
from kvfold.kernels.pages import anchor

SCRATCH_NBYTES = 64 << 20  # of decoded keys and values at a time
FLASH_DIM = 256  # the most channels of a head that PyTorch's flash attention has
KEY_SCALE = 64.0  # decoded keys carry the softmax scale; times this they lie in float16's middle


class PageRun(NamedTuple):
    """Pages of one pair of formats."""

    key_format: Format
    value_format: Format
    first: int  # entry of the block table
    end: int


@triton.jit(
    do_not_specialize=["table_length"],
    do_not_specialize_on_alignment=["pages", "factors", "keys", "values"],
)
def _decode_kernel(
    anchor_ptr,
    pages,
    factors,
    keys,
    values,
    tables,
    table_length,
    ROWS: tl.constexpr,
    OWN: tl.constexpr,
):
    """Grid: (pages, KV heads, keys or values). A tile holds some channels of all tokens."""
    i = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    tokens: tl.constexpr = 8 * ROWS
    width: tl.constexpr = tile_width(TOKEN_TILE, tokens)
    block = anchor_ptr + tl.load(pages + i) * 16
    if tl.program_id(2) == 0:
        table = tables
        to = keys
        factor = tl.load(factors + head)
    else:
        table = tables + table_length
        block += heads * tl.load(tables + NBYTES)
        to = values
        factor = 1.0
    block += head * tl.load(table + NBYTES)
    header = read_header(table)
    dim = header.head_dim
    to += (head.to(tl.int64) * tl.num_programs(0) + i) * (tokens * dim)
    t = tl.arange(0, tokens)[:, None]
    for first in range(0, dim, width):
        c = first + tl.arange(0, width)[None, :]
        x = decode_elements(block, table, header, t // ROWS, t % ROWS, c, c < dim, OWN, ROWS)
        tl.store(to + t * dim + c, to_fp16(x * factor), mask=c < dim)


def decode_pages(
    pages: Tensor,
    key_format: Format,
    value_format: Format,
    factors: Tensor,
    keys: Tensor,
    values: Tensor,
    page_tokens: int,
) -> None:
    """Decodes pages, in the order given.

    Args:
        pages: int64 [n], addresses (`page_address`).
        factors: float32 [Hkv], what the keys of a head are multiplied with.
        keys, values: float16 [Hkv, n·page_tokens, head_dim], contiguous; written.
    """
    dim = keys.shape[2]
    launch(
        _decode_kernel, (pages.numel(), keys.shape[0], 2),
        anchor(pages.device), pages, factors, keys, values,
        format_tables([[key_format, value_format]], page_tokens, pages.device), table_length(dim),
        ROWS=page_tokens // FIELDS, OWN=own_code([key_format, value_format]), num_warps=warps_for(page_tokens),
    )  # fmt: skip


def plain_attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention without a mask, by a library on a GPU.

    Args:
        query: float16 [1, Hkv, T, head_dim]; keys, values: float16 [1, Hkv, S, head_dim].
    Returns:
        (float16 [1, Hkv, T, head_dim], float32 [1, Hkv, T], natural logarithms of the sums of
        weights)
    """
    if query.is_cuda and query.shape[-1] > FLASH_DIM:
        out, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, keys, values, None, True, scale=scale
        )
        return out, sums[..., : query.shape[2]]  # which is padded
    if query.is_cuda:
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            query, keys, values, 0.0, False, False, scale=scale
        )
        return found[0], found[1]
    scores = query.float() @ keys.float().mT * scale
    return (scores.softmax(-1) @ values.float()).half(), scores.logsumexp(-1)


def read_together(
    query: Tensor,
    scale: Tensor,
    runs: Sequence[PageRun],
    table: Tensor,
    page_tokens: int,
    out: Tensor,
    ml: Tensor,
    mean: Callable[[int, int], Tensor] | None = None,
) -> None:
    """Attention of all queries of one sequence to whole runs of pages, as one part for the merge.

    Args:
        query, scale: `data` and `scale` of a `Queries` of one sequence.
        runs: pages that every query reads.
        table: int64 [entries], addresses of the sequence's pages.
        out: float32 [Hkv · query blocks, N, head_dim], a part of the outputs, with weights' sum 1;
            written.
        ml: float32 [Hkv · query blocks, 2, N], logarithms to base 2 of the sums of weights, and
            ones; written.
        mean: what keys were stored without, if anything: (first entry, end) → float32 [Hkv, tokens,
            head_dim] in their stored basis.
    """
    heads, dim = query.shape[1], query.shape[-1]
    flat = query.view(1, heads, -1, dim)
    tokens = max(1, SCRATCH_NBYTES // (4 * heads * dim * page_tokens)) * page_tokens
    tokens = min(tokens, max(run.end - run.first for run in runs) * page_tokens)
    keys, values = (
        torch.empty(heads * tokens * dim, dtype=torch.float16, device=query.device)
        for _ in range(2)
    )
    factors = scale.view(heads) * (KEY_SCALE / LOG2_E.value)
    total = sums = None
    step = tokens // page_tokens
    for run in runs:
        for first in range(run.first, run.end, step):
            pages = table[first : min(first + step, run.end)]
            shape = (heads, len(pages) * page_tokens, dim)
            k, v = (x[: heads * shape[1] * dim].view(shape) for x in (keys, values))
            decode_pages(pages, run.key_format, run.value_format, factors, k, v, page_tokens)
            if mean is not None:
                k.copy_(k.float() + mean(first, first + len(pages)) * factors[:, None, None])
            part, part_sums = plain_attention(flat, k[None], v[None], 1 / KEY_SCALE)
            if total is None or sums is None:
                total, sums = part.float(), part_sums
            else:  # weights e^sums and e^part_sums
                total.lerp_(part.float(), torch.sigmoid(part_sums - sums)[..., None])
                sums = torch.logaddexp(sums, part_sums)
    assert total is not None and sums is not None
    out.copy_(total.reshape(out.shape))
    ml[:, 0] = sums.view(ml[:, 0].shape) * LOG2_E.value
    ml[:, 1] = 1.0
