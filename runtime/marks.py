"""Keys and values that are NaN or infinite in a decoding step, which waits for nothing: the kernel that appends a row leaves a mark
on the device, and the host reads the marks before a page is packed.

A row is packed no sooner than a window after it came, so what is marked is reported before it reaches a page. Only without a
window a page ends with the row of its own step: there the host looks once more, before the next step.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.runtime.view import Padding

if TYPE_CHECKING:
    from kvfold.runtime.branches import Branches

NAME = "marks"  # in Padding.scratch: like the queries' buffer, no part of what is cached


def marks_of(padding: Padding, batch_size: int, device: torch.device) -> Tensor:
    """The marks int64 [B] of the cache that a layer belongs to; they stay where they are, as a CUDA graph needs."""
    from kvfold.kernels.triton_append import empty_marks

    found = padding.scratch.get(NAME)
    if found is None or len(found) != batch_size:
        found = padding.scratch[NAME] = empty_marks(batch_size, device)
    return found


def not_finite(layer_idx: int, name: str, position: int, sequence: int, end: str = "") -> FloatingPointError:
    """The error of a key or value, at a column, that is not finite."""
    return FloatingPointError(
        f"Layer {layer_idx} computed a {name} that is NaN or infinite at position {position} of sequence {sequence}; "
        + (end or "it was not cached.")
    )


def look_before_packing(cache: "Branches", tokens: int) -> None:
    """`look` if the next `tokens` columns complete a page, or are several; else nothing, and the host waits for nothing.

    This is the one wait of a decoding step, at most one in page_tokens for each sequence: a page is due, and the device must have
    computed what it will hold.
    """
    first = cache.layers[0]
    if NAME not in cache.padding.scratch or not first.is_initialized:
        return
    if first.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return  # whoever replays the step looks before
    g = cache.geometry
    due = [g.num_pages(n + tokens) > g.num_pages(n) for n in first.length]
    late = g.window == 0 and any(g.num_pages(n) > g.num_pages(max(0, n - 1)) for n in first.length)
    if tokens > 1 or any(due) or late:
        look(cache)


def look(cache: "Branches") -> None:
    """Waits for the device and reads the marks of all steps so far.

    Raises:
        FloatingPointError: a key or value was NaN or infinite. The cache ends before the column that had it, as if nothing had come
            since; if a sliding window has left behind what that takes, it must be reset.
    """
    marks = cache.padding.scratch.get(NAME)
    if marks is None:
        return
    from kvfold.kernels.triton_append import UNMARKED, read_mark

    found = marks.tolist()
    if all(mark == UNMARKED for mark in found):
        return
    pads = cache.padding.columns or [0] * len(found)
    columns = [(read_mark(mark)[0] + pads[b], b) for b, mark in enumerate(found) if mark != UNMARKED]
    column, b = min(columns)
    _, layer_idx, name = read_mark(found[b])
    remove, end = cache.tokens - column, ""
    try:
        for layer in cache.layers:
            layer.check_crop(-remove)
        cache.take_back(len(cache.layers), remove)
        unmark(cache)
    except KvfoldError:
        end = "a sliding window has left behind what going back takes, so reset() the cache or take a new one."
    raise not_finite(layer_idx, name, column, b, end)


def unmark(cache: "Branches") -> None:
    """After a crop: marks of tokens that are gone go with them, without a wait."""
    marks = cache.padding.scratch.get(NAME)
    if marks is None or not cache.layers[0].is_initialized:
        return
    from kvfold.kernels.triton_append import LABELS, UNMARKED

    ends = torch.tensor(cache.layers[0].length, dtype=torch.int64) * LABELS.value
    marks.masked_fill_(marks >= ends.to(marks.device, non_blocking=True), UNMARKED)
