"""Addresses of pages, as block tables hold them."""

import torch
from torch import Tensor

UNIT = 16  # bytes; pages are aligned to it
_anchors: dict[torch.device, Tensor] = {}


def anchor(device: torch.device) -> Tensor:
    """The tensor that block tables count from: one for each device, never freed, so entry 0 is
    readable memory."""
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
