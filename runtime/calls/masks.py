"""What an attention mask asks for: left padding, which kernels know, holes, which the plain-torch
reference can compute too, and the rest, which is refused.

Masks of transformers: two dimensions [B, columns seen and new], 0 where a column is hidden from
all; four dimensions [B, 1, T, columns], True or 0 where a query may look; or a dict of the latter,
one for each type of layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.runtime.cache.upload import on_device

HIDDEN = -1e4  # an additive mask hides what it takes below this: e^-10000 is 0
# attribute of a 2-D mask that was read: its Columns and its version, which grows as it is written
TAG = "kvfold_columns"
UNKNOWN, MADE = -1, -2  # versions of tensors of inference mode, which count none
FULL, SLIDING = "full_attention", "sliding_attention"  # keys of a dict of masks


class Columns(NamedTuple):
    """What a 2-D mask says of each sequence's first `width` columns."""

    width: int
    leads: tuple[int, ...]  # hidden columns before the first visible one
    shown: tuple[int, ...]  # visible columns


@dataclass(frozen=True)
class Place:
    """Where the new columns of a call stand.

    Attributes:
        seen, tokens: columns in the cache, and new ones.
        pads: of each sequence, leading columns that were padding and are not cached.
        windows: of each layer, tokens that a query sees at the most, 0 for all.
    """

    seen: int
    tokens: int
    pads: tuple[int, ...]
    windows: tuple[int, ...] = (0,)

    @property
    def width(self) -> int:
        return self.seen + self.tokens


def read_columns(mask: Tensor, width: int) -> Columns:
    """Reads a mask [B, n]; columns that it lacks are hidden, as to transformers. On a GPU this
    waits for the device, unless the mask is one that `grown` knows."""
    known, version = getattr(mask, TAG, (None, UNKNOWN))
    if (
        known is not None
        and known.width == width
        and version == (MADE if mask.is_inference() else mask._version)
    ):
        return known
    visible = (mask != 0)[:, :width]
    leads = (
        visible.cumsum(-1).eq(0).sum(-1)
        + (width - visible.shape[1]) * visible.any(-1).logical_not()
    )
    found = torch.stack((leads, visible.sum(-1))).tolist()
    return note(mask, Columns(width, tuple(found[0]), tuple(found[1])))


def grown(old: Any, new: Any) -> None:
    """Tells of a mask [B, n] that it is `old`, with columns behind it that are visible: then no
    step need read it."""
    known, version = getattr(old, TAG, (None, UNKNOWN))
    if (
        known is None
        or known.width != old.shape[1]
        or not (old.is_inference() or version == old._version)
    ):
        return
    more = new.shape[1] - known.width
    # of a sequence that was hidden altogether the padding ends where the new columns begin
    note(new, Columns(new.shape[1], known.leads, tuple(n + more for n in known.shown)), made=True)


def note(mask: Tensor, columns: Columns, made: bool = False) -> Columns:
    """Remembers what a mask says with the mask itself. Whether a tensor of inference mode is
    written later can't be known: one that isn't `made` by generate is read each time."""
    version = (MADE if made else UNKNOWN) if mask.is_inference() else mask._version
    setattr(mask, TAG, (columns, version))
    return columns


def settle(columns: Columns, pads: Sequence[int], seen: int) -> tuple[list[int], bool]:
    """What a 2-D mask means to a cache.

    Args:
        columns: of the mask.
        pads: padding of each sequence as known so far; of one whose padding hasn't ended with the
            `seen` columns, at least that.
        seen: columns in the cache.
    Returns:
        (padding of each sequence, whether nothing but padding is hidden)
    Raises:
        KvfoldError: the mask shows columns that are not cached, because an earlier mask said that
            they are padding.
    """
    found, plain = [], True
    for b, (lead, shown) in enumerate(zip(columns.leads, columns.shown, strict=True)):
        known = min(pads[b], seen) if pads else 0
        pad = lead if known == seen else known  # nothing has come yet
        if shown and lead < known:
            raise KvfoldError(
                f"attention_mask shows column {lead} of sequence {b}, but an earlier mask said "
                f"that its first {known} columns are "
                "padding, which is not cached; give every call of a cache a mask with the same left padding."
            )
        found.append(pad)
        plain = plain and shown == columns.width - pad
    return found, plain


def read_squares(mask: Any, place: Place, device: torch.device) -> tuple[Any, bool]:
    """Checks masks of four dimensions, or a dict of them.

    Returns:
        (the same as bool [B, 1, T, columns], whether nothing but padding, the future and what lies
        behind a window is hidden)
    Raises:
        KvfoldError: not one of these; or a mask that hides less than a causal one, or more by
            adding to logits.
    """
    if not isinstance(mask, dict):
        return read_square(mask, place, sorted(set(place.windows)), device)
    windows = {FULL: [0], SLIDING: sorted({w for w in place.windows if w})}
    found, plain = {}, True
    for kind, part in mask.items():
        if kind not in windows:
            raise KvfoldError(
                f"attention_mask has '{kind}', but layers are of types {FULL} and {SLIDING}; leave it out."
            )
        if part is not None:
            part, own = read_square(part, place, windows[kind], device)
            plain = plain and own
        found[kind] = part
    return found, plain


def read_square(
    mask: Any, place: Place, windows: Sequence[int], device: torch.device
) -> tuple[Tensor, bool]:
    """Checks one mask of four dimensions for layers with these windows; see read_squares."""
    batch, wanted = len(place.pads), (len(place.pads), 1, place.tokens, place.width)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise KvfoldError(
            f"attention_mask is {shape}, but must be [B, columns], 0 where hidden, or "
            f"{list(wanted)}, True where visible."
        )
    if mask.shape[1] != 1:
        raise KvfoldError(
            f"attention_mask has {mask.shape[1]} heads, but a packed cache takes one mask for all "
            f"heads; give {list(wanted)}."
        )
    if (
        mask.shape[0] not in (1, batch)
        or mask.shape[2] not in (1, place.tokens)
        or mask.shape[3] != place.width
    ):
        raise KvfoldError(
            f"attention_mask is {list(mask.shape)}, but this call needs {list(wanted)}; give that."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise KvfoldError(
            f"attention_mask of four dimensions is {mask.dtype}; give bool, True where visible, "
            "or 0 and -inf of a float type."
        )
    mask = mask.to(device)
    visible = (mask if mask.dtype == torch.bool else mask == 0).expand(wanted)
    biased = torch.zeros((), dtype=torch.bool, device=device)
    if mask.dtype != torch.bool:
        biased = ~((mask == 0) | (mask <= HIDDEN)).all()
    query = torch.arange(place.seen, place.width, device=device)[:, None]
    column = torch.arange(place.width, device=device)
    pads = on_device(list(place.pads), torch.int64, device)[:, None, None, None]
    real, padding, ahead = (
        query >= pads,
        column < pads,
        column > query,
    )  # what padding attends to is read by nobody
    odd = [biased, (visible & ahead & real).any(), (visible & padding & real).any()]
    for window in windows:
        behind = (column <= query - window) if window else torch.zeros_like(ahead)
        odd.append((visible & behind & real).any())
        odd.append(((visible != ~(padding | ahead | behind)) & real).any())
    flags = torch.stack(odd).tolist()
    if flags[0]:
        raise KvfoldError(
            "attention_mask adds to logits, but a packed cache can only hide or show: 0 where "
            "visible, -inf (or below -10000) where not; "
            "run such a call inside `with runtime.plain_cache(model):`."
        )
    if flags[1]:
        raise KvfoldError(
            "attention_mask shows a query tokens that come after it (a prefix that looks both "
            "ways), but a packed cache is causal; "
            "run such a call inside `with runtime.plain_cache(model):`."
        )
    if flags[2]:
        raise KvfoldError(
            "attention_mask shows columns that an earlier mask said are padding, which is not "
            "cached; give every call of a cache a "
            "mask with the same left padding."
        )
    for window, shown in zip(windows, flags[3::2], strict=True):
        if shown:
            raise KvfoldError(
                f"attention_mask shows tokens behind the sliding window ({window} tokens) of some "
                "layers, whose cache has let them go; "
                f"give a dict of masks, one for '{FULL}' and one for '{SLIDING}'."
            )
    return visible, not any(flags[4::2])
