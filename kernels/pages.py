"""Addresses of pages, as block tables hold them, and what pages of several formats hold."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kvfold.kernels.formats import Format
from kvfold.kernels.quantizer import decode

UNIT = 16  # bytes; pages are aligned to it
_anchors: dict[torch.device, Tensor] = {}


def anchor(device: torch.device) -> Tensor:
    """The tensor that block tables count from: one for each device, never freed, so entry 0 is readable memory."""
    if device not in _anchors:
        with torch.inference_mode(False):  # it outlives the mode of whoever asks first
            _anchors[device] = torch.zeros(1 << 22, dtype=torch.uint8, device=device)
    return _anchors[device]


def page_address(page: Tensor) -> int:
    """A page's entry in a block table: its address less the anchor's, in units of 16 bytes.

    Args:
        page: uint8, contiguous, aligned to 16 bytes.
    """
    return (page.data_ptr() - anchor(page.device).data_ptr()) // UNIT


def decode_rungs(
    pages: Sequence[Tensor],
    formats: Sequence[tuple[Format, Format]],
    segments: Sequence[int],
    num_kv_heads: int,
    page_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence's pages of several formats, in plain torch: what the attention kernels' `formats` and
    `segments` mean.

    Args:
        pages: uint8, [keys of all heads | values of all heads] each, in rising position.
        formats: (key format, value format) of each of R rungs.
        segments: R + 1 rising numbers; pages segments[r] … segments[r + 1] − 1 are of rung r. The first counts as 0, the
            last as the number of pages, whatever they are.
    Returns:
        Two float32 [num_kv_heads, len(pages)·page_tokens, head_dim].
    """
    edges = [0, *segments[1:-1], len(pages)]
    parts = []
    for pair, (start, end) in zip(formats, pairwise(edges), strict=True):
        split = num_kv_heads * pair[0].nbytes(page_tokens)
        for page in pages[start:end]:
            blocks = (page[:split], page[split:])
            parts.append([decode(x.view(num_kv_heads, -1), f, page_tokens) for x, f in zip(blocks, pair, strict=True)])
    if not parts:
        empty = torch.zeros(num_kv_heads, 0, formats[0][0].head_dim, dtype=torch.float32)
        return empty, empty
    return torch.cat([keys for keys, _ in parts], 1), torch.cat([values for _, values in parts], 1)
