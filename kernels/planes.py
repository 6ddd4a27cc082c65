"""What the Triton kernels that write pages are compiled for: a format as constant tuples of classes and their planes.

Reading cuts a head into tensor-core operands (tiles.py); writing takes a class at a time, whatever its channels.
"""

from functools import cache
from typing import NamedTuple

from kvfold.errors import KvfoldError
from kvfold.kernels.formats import GAUSSIAN_STEP, RAW, TRIT, Format
from kvfold.kernels.packing import FIELDS, TRIT_CHANNELS, trit_parts


class PlaneLayout(NamedTuple):
    """One plane of a class."""

    width: int  # bits: 1, 2 or 4
    shift: int  # position of these bits in the code
    offset: int  # bytes from the head's block to the plane


class ClassLayout(NamedTuple):
    """One class of a format."""

    start: int  # first channel
    channels: int
    levels: int
    step: float  # of symmetric codes, in units of the token's scale; else 1
    halves: bool  # a plane of one bit joins channels j and j + channels/2 in a word
    planes: tuple  # PlaneLayout tuples


class TritWriting(NamedTuple):
    """Where ternary codes go; see packing.py."""

    whole: int  # bytes of five codes
    left: int  # codes left over
    words: int  # word tiles of R rows


class PageLayout(NamedTuple):
    """One head's block in a page, as a kernel's constants.

    Attributes:
        kind: "scale", "scale_min" or "raw".
        classes: ClassLayout tuples; of a ternary or raw format the only class has no planes.
        trits: TritWriting as a tuple, or () if the codes are binary.
        groups, group_size: parameter groups, channels of each.
        params: bytes from the head's block to the first parameter.
        fp16: parameters are float16, else e4m3.
        rows: R, rows of words in a page.
        nbytes: of one head's block.
        head_dim: channels.
        coded: channels of more than 0 levels.
    """

    kind: str
    classes: tuple
    trits: tuple
    groups: int
    group_size: int
    params: int
    fp16: bool
    rows: int
    nbytes: int
    head_dim: int
    coded: int


@cache
def page_layout(fmt: Format, page_tokens: int) -> PageLayout:
    """The constants of a format in pages of `page_tokens` tokens.

    Raises:
        KvfoldError: page_tokens is not a power of two from 8 to 128.
    """
    if page_tokens not in (8, 16, 32, 64, 128):
        raise KvfoldError(f"page_tokens={page_tokens} is not a power of two from 8 to 128; choose one that is.")
    nbytes = fmt.nbytes(page_tokens)
    kind = "raw" if fmt.params == "none" else fmt.params
    classes: list[tuple] = []
    trits: tuple = ()
    offset = first = 0
    for channels, levels in fmt.classes:
        own = [p for p in fmt.planes if p.start == first and levels not in (0, 3, RAW)]
        planes = []
        for plane in own:
            planes.append(tuple(PlaneLayout(plane.width, plane.shift, offset)))
            offset += plane.nbytes(page_tokens)
        step = GAUSSIAN_STEP.get(levels, 1.0) if kind == "scale" else 1.0
        halves = any(p.width == 1 for p in own)
        classes.append(tuple(ClassLayout(first, channels, levels, step, halves, tuple(planes))))
        first += channels
    if any(p.width == TRIT for p in fmt.planes):
        whole, left = trit_parts(fmt.head_dim // TRIT_CHANNELS * TRIT_CHANNELS)
        trits = tuple(TritWriting(whole, left, (whole + (left > 2)) // 2))
    return PageLayout(
        kind=kind,
        classes=tuple(classes),
        trits=trits,
        groups=fmt.num_groups,
        group_size=fmt.head_dim // fmt.num_groups,
        params=nbytes - page_tokens * fmt.num_params * fmt.param_nbytes,
        fp16=fmt.param_dtype == "fp16",
        rows=page_tokens // FIELDS,
        nbytes=nbytes,
        head_dim=fmt.head_dim,
        coded=sum(channels for channels, levels in fmt.classes if levels),
    )
