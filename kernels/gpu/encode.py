"""Kernels that write packed pages: from 16-bit rows, and from pages of a finer format.

A page is [keys of all heads | values of all heads]; block tables and page lists hold addresses as
`page_address` gives them. Bytes equal those of the reference, `quantizer.encode`. Runs under
Triton's interpreter on a CPU too.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.kernels.compile.launch import launch
from kvfold.kernels.gpu.clips import clip_strides
from kvfold.kernels.gpu.device.codec import PackedBlock, RawRows, read_header
from kvfold.kernels.gpu.device.columns import NBYTES
from kvfold.kernels.gpu.device.pages import write_block
from kvfold.kernels.gpu.kinds import DeviceCode, own_code
from kvfold.kernels.gpu.records import FormatChange, PageFormat
from kvfold.kernels.gpu.tables import format_tables, table_length, warps_for
from kvfold.kernels.kinds.storage import FIELDS
from kvfold.kernels.pages import anchor

UNROLL: tl.constexpr = tl.constexpr(4)  # fields of 16-bit rows at a time
# numbers that say how one page goes down: addresses of the page that is read, of the one that is
# written and of their formats' tables, and of each side the address of its clip and the numbers
# from one head's factor, and one group's, to the next one's
JOB: tl.constexpr = tl.constexpr(9)


# numbers that vary from call to call, or from format to format, must not each compile a kernel of
# their own
@triton.jit(
    do_not_specialize=[
        "k_clip_h", "k_clip_g", "v_clip_h", "v_clip_g", "table_length", "stride_b", "stride_h", "stride_t",
        "sinks", "ring",
    ],
    do_not_specialize_on_alignment=["pages", "sequences", "tokens", "keys", "values", "k_clip", "v_clip"],
)  # fmt: skip
def _encode_kernel(
    anchor_ptr, pages, sequences, tokens, keys, values, tables, k_clip, v_clip, k_clip_h, k_clip_g, v_clip_h, v_clip_g,
    table_length, stride_b, stride_h, stride_t, sinks, ring, ROWS: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Grid: (pages, KV heads, keys or values)."""
    i = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    block = anchor_ptr + tl.load(pages + i) * 16
    start = tl.load(tokens + i)
    end = start + 8 * ROWS
    if ring > 0:
        start = sinks + (start - sinks) % ring
        end = sinks + ring
    if tl.program_id(2) == 0:
        table = tables
        src = keys
        clip = k_clip + head * k_clip_h
        clipped = k_clip_h
        clip_step = k_clip_g
    else:
        block += heads * tl.load(tables + NBYTES)
        table = tables + table_length
        src = values
        clip = v_clip + head * v_clip_h
        clipped = v_clip_h
        clip_step = v_clip_g
    block += head * tl.load(table + NBYTES)
    src += tl.load(sequences + i).to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    rows = RawRows(src, stride_t, start, end, ring)
    write_block(block, table, clip, clip_step, clipped, rows, ROWS, False, OWN, UNROLL)


@triton.jit(do_not_specialize=["table_length"], do_not_specialize_on_alignment=["jobs"])
def _lower_kernel(
    anchor_ptr, jobs, table_length, ROWS: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Grid: (pages, KV heads, keys or values). Formats and clips are found by their addresses, as
    pages are, so that pages of all layers and rungs go down together."""
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    side = tl.program_id(2)
    job = jobs + tl.program_id(0) * JOB
    src = anchor_ptr + tl.load(job) * 16
    block = anchor_ptr + tl.load(job + 1) * 16
    tables = anchor_ptr.to(tl.pointer_type(tl.int32)) + tl.load(job + 2)
    if side > 0:
        src += heads * tl.load(tables + 2 * table_length + NBYTES)
        block += heads * tl.load(tables + NBYTES)
    table = tables + side * table_length
    old = table + 2 * table_length
    src += head * tl.load(old + NBYTES)
    block += head * tl.load(table + NBYTES)
    factors = job + 3 + 3 * side
    clipped = tl.load(factors + 1)
    clip = anchor_ptr.to(tl.pointer_type(tl.float32)) + tl.load(factors) + head * clipped
    write_block(
        block,
        table,
        clip,
        tl.load(factors + 2),
        clipped,
        PackedBlock(src, old, read_header(old)),
        ROWS,
        True,
        OWN,
        1,
    )


def encode_pages(
    keys: Tensor,
    values: Tensor,
    fmt: PageFormat,
    pages: Tensor,
    sequences: Tensor,
    tokens: Tensor,
    *,
    page_tokens: int,
    sinks: int = 0,
    ring: int = 0,
) -> None:
    """Packs whole pages of 16-bit rows, keys and values in one launch; returns nothing and waits
    for nothing.

    Args:
        keys, values: float16 [B, Hkv, rows, head_dim], the same strides, the last one 1; keys in
            their stored basis.
        fmt: of the pages.
        pages: int64 [n], addresses of the pages to be written (`page_address`).
        sequences: int32 [n], the sequence that each page belongs to.
        tokens: int32 [n], the first token of each page. Token t is row t, or with ring > 0 row
            sinks + (t − sinks) mod ring; a ring has room for a page.
    Raises:
        KvfoldError: keys or values are not float16 or lie differently, or a clip has another shape.
    """
    if str(keys.dtype) != "torch.float16" or keys.dtype != values.dtype or keys.stride(-1) != 1:
        raise KvfoldError(
            f"Pages are packed from float16 rows, not {keys.dtype} and {values.dtype}; cast them first."
        )
    if keys.shape != values.shape or keys.stride() != values.stride():
        raise KvfoldError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must have one shape and one layout."
        )
    heads = keys.shape[1]
    if not pages.numel():
        return
    if any(x.data_ptr() % 16 or any(n % 8 for n in x.stride()[:3]) for x in (keys, values)):
        keys, values = (x.clone(memory_format=torch.contiguous_format) for x in (keys, values))
    launch(
        _encode_kernel,
        (pages.numel(), heads, 2),
        anchor(keys.device),
        pages,
        sequences,
        tokens,
        keys,
        values,
        format_tables([[fmt.key, fmt.value]], page_tokens, keys.device),
        *_clips(fmt, heads, keys.device),
        table_length(keys.shape[3]),
        *keys.stride()[:3],
        sinks,
        ring,
        ROWS=page_tokens // FIELDS,
        OWN=own_code([fmt.key, fmt.value]),
        num_warps=warps_for(page_tokens),
        enable_fp_fusion=False,
    )


class LowerJobs(NamedTuple):
    """Pages that go down in one launch, on the device.

    Attributes:
        pages: int64 [n, JOB], of each page the numbers that JOB counts; contiguous.
        head_dim: of all formats.
        own: code of the formats' kinds that need their own.
    """

    pages: Tensor
    head_dim: int
    own: tuple[DeviceCode, ...]


def lower_jobs(
    work: Iterable[FormatChange], *, num_kv_heads: int, page_tokens: int, device: torch.device
) -> list[LowerJobs]:
    """What `lower_pages` reads, sent to the device without a wait: one launch for pages of any
    layers and formats, but for those whose kinds of code have code of their own.

    Args:
        work: pages by layer and format; none that is written may be read as well, or overlap. The
            formats' clips must live until `lower_pages` was called.
        device: of the pages.
    Raises:
        KvfoldError: a clip has another shape, page_tokens is not a power of two from 8 to 128, or
            the formats of one step down are of several head_dim.
    """
    found: dict[tuple[int, tuple[DeviceCode, ...]], list[int]] = {}
    for step in work:
        fmt, old = step.new, step.old
        own = own_code([fmt.key, fmt.value, old.key, old.value])
        words = found.setdefault((fmt.key.head_dim, own), [])
        # kept for as long as the process lives
        tables = format_tables([[fmt.key, fmt.value], [old.key, old.value]], page_tokens, device)
        rest = [_address(tables)]
        for clip, side in ((fmt.key_clip, fmt.key), (fmt.value_clip, fmt.value)):
            strides = clip_strides(clip, side, num_kv_heads)
            rest += [0 if clip is None else _address(clip), *strides]
        for pair in zip(step.sources, step.pages, strict=True):
            words += pair
            words += rest
    return [
        LowerJobs(_sent(words, device).view(-1, JOB.value), head_dim, own)
        for (head_dim, own), words in found.items()
    ]


def lower_pages(jobs: LowerJobs, *, num_kv_heads: int, page_tokens: int) -> None:
    """Re-quantises pages: decodes and encodes a field of rows at a time, without a 16-bit copy in
    memory. Returns nothing and waits for nothing.

    Args:
        jobs: from `lower_jobs`, for as many heads and tokens of a page.
    """
    if not jobs.pages.numel():
        return
    launch(
        _lower_kernel,
        (len(jobs.pages), num_kv_heads, 2),
        anchor(jobs.pages.device),
        jobs.pages,
        table_length(jobs.head_dim),
        ROWS=page_tokens // FIELDS,
        OWN=jobs.own,
        num_warps=warps_for(page_tokens),
        enable_fp_fusion=False,
    )


def _sent(words: list[int], device: torch.device) -> Tensor:
    """int64 words on the device, from pinned memory."""
    pinned = torch.tensor(words, dtype=torch.int64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def _address(x: Tensor) -> int:
    """Elements of 4 bytes from the anchor to x."""
    return (x.data_ptr() - anchor(x.device).data_ptr()) // 4


def _clips(fmt: PageFormat, heads: int, device: torch.device) -> tuple[Tensor | int, ...]:
    """Clips of keys and values, and numbers from one head's first factor, and one group's, to the
    next one's, of each."""
    none = anchor(device).view(torch.float32)  # a pointer of the right type that nothing reads
    clips = [none if clip is None else clip for clip in (fmt.key_clip, fmt.value_clip)]
    return (
        *clips,
        *clip_strides(fmt.key_clip, fmt.key, heads),
        *clip_strides(fmt.value_clip, fmt.value, heads),
    )
