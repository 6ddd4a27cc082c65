"""Clips, factors on (minimum, maximum), as the kernels that write pages read them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.kernels.formats import Format


def clip_strides(clip: Tensor | None, fmt: Format, heads: int) -> tuple[int, int]:
    """Numbers from one head's first factor to the next one's, and from one group's to the next
    one's; (0, 0): there are none.

    Raises:
        KvfoldError: clip's shape fits neither [heads] nor [heads, groups].
    """
    if clip is None or not fmt.kind.minimum:
        return 0, 0
    if tuple(clip.shape) not in ((heads,), (heads, 1), (heads, fmt.num_groups)):
        raise KvfoldError(
            f"clip has shape {tuple(clip.shape)}; "
            f"give one factor for each of {heads} heads, or for each head and group."
        )
    count = clip.numel() // heads
    return count, int(count > 1)


def clips_of(
    clips: Sequence[Tensor | None], formats: Sequence[Format], heads: int
) -> tuple[Tensor | None, int, int, int]:
    """Factors of all rungs and the numbers from one rung, head and group to the next; with (None,
    0, 0, 0) all are 1."""
    if len(clips) == 1:
        return clips[0], 0, *clip_strides(clips[0], formats[0], heads)
    strides = [clip_strides(clip, fmt, heads) for clip, fmt in zip(clips, formats, strict=True)]
    used = tuple(clip if each else None for clip, (each, _) in zip(clips, strides, strict=True))
    groups = max(fmt.num_groups for fmt in formats)
    if all(clip is None for clip in used):
        return None, 0, 0, 0
    name = (
        groups,
        *(None if clip is None else (clip.device, clip.data_ptr(), clip.shape) for clip in used),
    )
    if name not in _side_by_side:
        _side_by_side[name] = (
            used,
            _joined(used, heads, groups),
        )  # as long as one is kept, its address names it
    return _side_by_side[name][1], heads * groups, groups, 1


_side_by_side: dict[tuple, tuple[tuple[Tensor | None, ...], Tensor]] = {}


def _joined(clips: Sequence[Tensor | None], heads: int, groups: int) -> Tensor:
    """float32 [rungs, heads, groups] of clips of up to as many groups."""
    device = next(clip.device for clip in clips if clip is not None)
    with torch.inference_mode(False):
        out = torch.ones(len(clips), heads, groups, dtype=torch.float32, device=device)
        for row, clip in zip(out, clips, strict=True):
            if clip is not None:
                factors = clip.clone().view(heads, -1)
                row[:, : groups if factors.shape[1] == 1 else factors.shape[1]] = factors
    return out
