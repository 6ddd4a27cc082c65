"""Kernels that write packed pages: from 16-bit rows, and from pages of a finer format.

A page is [keys of all heads | values of all heads]; block tables and page lists hold addresses as `page_address` gives them.
Bytes equal those of the reference, `quantizer.encode`. Runs under Triton's interpreter on a CPU too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.kernels.formats import Format
from kvfold.kernels.launch import launch
from kvfold.kernels.planes import page_layout
from kvfold.kernels.triton_attention import anchor
from kvfold.kernels.triton_bits import pick
from kvfold.kernels.triton_pages import write_block


@triton.jit
def _encode_kernel(
    anchor_ptr, pages, sequences, tokens, keys, values, key_clip, value_clip, stride_b, stride_h, stride_t, sinks, ring,
    K: tl.constexpr, V: tl.constexpr, K_CLIPS: tl.constexpr, V_CLIPS: tl.constexpr,
):  # fmt: skip
    """Grid: (pages, KV heads, keys or values)."""
    i = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    k_nbytes: tl.constexpr = pick(K, 8)
    v_nbytes: tl.constexpr = pick(V, 8)
    page = anchor_ptr + tl.load(pages + i) * 16
    rows = tl.load(sequences + i).to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    first = tl.load(tokens + i)
    if tl.program_id(2) == 0:
        clip = key_clip + head * K_CLIPS
        write_block(page + head * k_nbytes, clip, keys + rows, stride_t, first, sinks, ring, K, (), K_CLIPS)
    else:
        clip = value_clip + head * V_CLIPS
        block = page + heads * k_nbytes + head * v_nbytes
        write_block(block, clip, values + rows, stride_t, first, sinks, ring, V, (), V_CLIPS)


@triton.jit
def _lower_kernel(
    anchor_ptr, sources, pages, key_clip, value_clip,
    K: tl.constexpr, V: tl.constexpr, OLD_K: tl.constexpr, OLD_V: tl.constexpr,
    K_CLIPS: tl.constexpr, V_CLIPS: tl.constexpr,
):  # fmt: skip
    """Grid: (pages, KV heads, keys or values)."""
    i = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    k_nbytes: tl.constexpr = pick(K, 8)
    v_nbytes: tl.constexpr = pick(V, 8)
    old_k_nbytes: tl.constexpr = pick(OLD_K, 8)
    old_v_nbytes: tl.constexpr = pick(OLD_V, 8)
    source = anchor_ptr + tl.load(sources + i) * 16
    page = anchor_ptr + tl.load(pages + i) * 16
    if tl.program_id(2) == 0:
        old = source + head * old_k_nbytes
        write_block(page + head * k_nbytes, key_clip + head * K_CLIPS, old, 0, 0, 0, 0, K, OLD_K, K_CLIPS)
    else:
        old = source + heads * old_k_nbytes + head * old_v_nbytes
        block = page + heads * k_nbytes + head * v_nbytes
        write_block(block, value_clip + head * V_CLIPS, old, 0, 0, 0, 0, V, OLD_V, V_CLIPS)


def clips_of(clip: Tensor | None, fmt: Format, heads: int) -> int:
    """Clip factors of a head that a kernel reads: 0, 1 or one for each group.

    Raises:
        KvfoldError: clip's shape fits neither [heads] nor [heads, groups].
    """
    if clip is None or fmt.params != "scale_min":
        return 0
    if tuple(clip.shape) not in ((heads,), (heads, 1), (heads, fmt.num_groups)):
        raise KvfoldError(
            f"clip has shape {tuple(clip.shape)}; give one factor for each of {heads} heads, or for each head and group."
        )
    return clip.numel() // heads


def warps_for(page_tokens: int, head_dim: int) -> int:
    """Warps of a program that writes one head's page: about 32 elements a thread."""
    return min(16, max(1, page_tokens * triton.next_power_of_2(head_dim) // 1024))


def encode_pages(
    keys: Tensor,
    values: Tensor,
    key_format: Format,
    value_format: Format,
    pages: Tensor,
    sequences: Tensor,
    tokens: Tensor,
    *,
    page_tokens: int,
    key_clip: Tensor | None = None,
    value_clip: Tensor | None = None,
    sinks: int = 0,
    ring: int = 0,
) -> None:
    """Packs whole pages of 16-bit rows, keys and values in one launch; returns nothing and waits for nothing.

    Args:
        keys, values: float16 [B, Hkv, rows, head_dim], the same strides, the last one 1; keys in their stored basis.
        pages: int64 [n], addresses of the pages to be written (`page_address`).
        sequences: int32 [n], the sequence that each page belongs to.
        tokens: int32 [n], the first token of each page. Token t is row t, or with ring > 0 row
            sinks + (t − sinks) mod ring.
        key_clip, value_clip: float32 [Hkv] or [Hkv, groups], factors on (minimum, maximum); None for 1.
    Raises:
        KvfoldError: keys or values are not float16 or lie differently, or a clip has another shape.
    """
    if str(keys.dtype) != "torch.float16" or keys.dtype != values.dtype or keys.stride(-1) != 1:
        raise KvfoldError(f"Pages are packed from float16 rows, not {keys.dtype} and {values.dtype}; cast them first.")
    if keys.shape != values.shape or keys.stride() != values.stride():
        raise KvfoldError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must have one shape and one layout."
        )
    heads = keys.shape[1]
    if not pages.numel():
        return
    none = anchor(keys.device).view(torch.float32)  # a pointer of the right type that nothing reads
    launch(
        _encode_kernel, (pages.numel(), heads, 2),
        anchor(keys.device), pages, sequences, tokens, keys, values,
        key_clip if key_clip is not None else none, value_clip if value_clip is not None else none,
        *keys.stride()[:3], sinks, ring,
        K=tuple(page_layout(key_format, page_tokens)), V=tuple(page_layout(value_format, page_tokens)),
        K_CLIPS=clips_of(key_clip, key_format, heads), V_CLIPS=clips_of(value_clip, value_format, heads),
        num_warps=warps_for(page_tokens, keys.shape[3]), enable_fp_fusion=False,
    )  # fmt: skip


def lower_pages(
    sources: Tensor,
    pages: Tensor,
    old: tuple[Format, Format],
    new: tuple[Format, Format],
    *,
    num_kv_heads: int,
    page_tokens: int,
    key_clip: Tensor | None = None,
    value_clip: Tensor | None = None,
) -> None:
    """Re-quantises pages of one layer: decodes and encodes a field of rows at a time, without a 16-bit copy in memory.

    Args:
        sources, pages: int64 [n], addresses of the pages to be read and to be written; none may overlap.
        old, new: (key format, value format) of the pages read and of the pages written, of one head_dim.
        key_clip, value_clip: as in `encode_pages`.
    Raises:
        KvfoldError: a clip has another shape.
    """
    if not pages.numel():
        return
    none = anchor(pages.device).view(torch.float32)
    launch(
        _lower_kernel, (pages.numel(), num_kv_heads, 2),
        anchor(pages.device), sources, pages,
        key_clip if key_clip is not None else none, value_clip if value_clip is not None else none,
        K=tuple(page_layout(new[0], page_tokens)), V=tuple(page_layout(new[1], page_tokens)),
        OLD_K=tuple(page_layout(old[0], page_tokens)), OLD_V=tuple(page_layout(old[1], page_tokens)),
        K_CLIPS=clips_of(key_clip, new[0], num_kv_heads), V_CLIPS=clips_of(value_clip, new[1], num_kv_heads),
        num_warps=warps_for(page_tokens, new[0].head_dim), enable_fp_fusion=False,
    )  # fmt: skip
