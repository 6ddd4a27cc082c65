"""Keys and values that are NaN or infinite in a decoding step, which waits for nothing: the kernel that appends a row leaves a mark
on the device, and the host reads the marks before a page is packed.

A row is packed no sooner than a window after it came, so what is marked is reported before it reaches a page. Only without a
window a page ends with the row of its own step: there the host looks once more, before the next step.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.runtime.cache.upload import on_device
from kvfold.runtime.cache.view import Padding

if TYPE_CHECKING:
    from kvfold.runtime.cache.branches import Branches

NAME = "marks"  # in Padding.scratch: like the queries' buffer, no part of what is cached
ASKED = "asked marks"  # there too: a copy on its way to the host
LEAD = 2  # steps before a page that the host asks for the marks, so that they are there when it needs them


def marks_of(padding: Padding, batch_size: int, device: torch.device) -> Tensor:
    """The marks int64 [B] of the cache that a layer belongs to; they stay where they are, as a CUDA graph needs."""
    from kvfold.kernels.triton_append import empty_marks

    found = padding.scratch.get(NAME)
    if found is None or len(found) != batch_size:
        padding.scratch.pop(ASKED, None)
        found = padding.scratch[NAME] = empty_marks(batch_size, device)
    return found


def not_finite(layer_idx: int, name: str, position: int, sequence: int, end: str = "") -> FloatingPointError:
    """The error of a key or value, at a column, that is not finite."""
    return FloatingPointError(
        f"Layer {layer_idx} computed a {name} that is NaN or infinite at position {position} of sequence {sequence}; "
        + (end or "it was not cached.")
    )


def look_before_packing(cache: "Branches", tokens: int) -> None:
    """Sees to it that the host knows the marks of what the next `tokens` columns pack.

    On a GPU it asks for them some steps before a page is due, if the window is that long, and reads the answer when the page is
    due: by then the steps that it waits for are done. Without a window, and before a chunk, it is a `look`.
    """
    first, g = cache.layers[0], cache.geometry
    if NAME not in cache.padding.scratch or not first.is_initialized:
        return
    due = any(g.num_pages(n + tokens) > g.num_pages(n) for n in first.length)
    ahead = lead(cache) if tokens == 1 else 0
    if ahead and due:
        _answer(cache)
    elif ahead:
        soon = any(g.num_pages(n + 1 + ahead) > g.num_pages(n) for n in first.length)
        if soon and not _asked_within(cache, ahead):
            _ask(cache)
    elif (
        tokens > 1 or due or (g.window == 0 and any(g.num_pages(n) > g.num_pages(max(0, n - 1)) for n in first.length))
    ):
        look(cache)


def lead(cache: "Branches") -> int:
    """Steps before a page at which the marks are asked for; 0: they are read when the page is due."""
    return min(cache.geometry.window, LEAD) if cache.layers[0].device.type == "cuda" else 0


def asked_before(cache: "Branches", steps: int) -> int:
    """Of a page that comes due with the `steps`-th step from here: the number of the step before which the host looks or asks."""
    ahead = lead(cache)
    if not ahead or NAME not in cache.padding.scratch or (steps <= ahead and _asked_within(cache, ahead)):
        return steps
    return max(1, steps - ahead)


def _asked_within(cache: "Branches", steps: int) -> bool:
    asked = cache.padding.scratch.get(ASKED)
    return asked is not None and 0 <= cache.tokens - asked[0] <= steps


def _ask(cache: "Branches") -> None:
    """Starts a copy of the marks of all columns so far to the host."""
    marks = cache.padding.scratch[NAME]
    host, event = marks.clone(), None
    if marks.device.type == "cuda":
        host = torch.empty(len(marks), dtype=torch.int64, pin_memory=True)
        host.copy_(marks, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    cache.padding.scratch[ASKED] = (cache.tokens, host, event)


def _answer(cache: "Branches") -> None:
    """Reads the copy, waiting for no step later than it; `look` if there is none, or one from before a row that is packed now."""
    asked = cache.padding.scratch.get(ASKED)
    if asked is None or not 0 <= cache.tokens + 1 - asked[0] <= cache.geometry.window:
        look(cache)
        return
    _, host, event = asked
    if event is not None:
        event.synchronize()
    _report(cache, host.tolist())


def look(cache: "Branches") -> None:
    """Waits for the device and reads the marks of all steps so far.

    Raises:
        FloatingPointError: a key or value was NaN or infinite. The cache ends before the column that had it, as if nothing had come
            since; if a sliding window has left behind what that takes, it must be reset.
    """
    marks = cache.padding.scratch.get(NAME)
    if marks is not None:
        _report(cache, marks.tolist())


def _report(cache: "Branches", found: list[int]) -> None:
    """Raises what `look` says if one of the marks was set."""
    from kvfold.kernels.triton_append import UNMARKED, read_mark

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
    cache.padding.scratch.pop(ASKED, None)
    if marks is None or not cache.layers[0].is_initialized:
        return
    from kvfold.kernels.triton_append import LABELS, UNMARKED

    ends = on_device([n * LABELS.value for n in cache.layers[0].length], torch.int64, marks.device)
    marks.masked_fill_(marks >= ends, UNMARKED)
