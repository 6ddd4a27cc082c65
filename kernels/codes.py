"""Products with packed tokens that never decode them: a query against the codes of keys, weights
against the codes of values.

decode writes every element out: x̂ = s·(c − z) + m. A product with a few rows needs less: channel
steps go into the query, a token's scale and minimum into its score (or into its weight, for
values), and z and m become one term of rank one. What is left is a product with integers c, and a
bit field of a masked word is an integer as it stands, c·2^k, whose power of two goes into the score
too (kinds/bits.py draws the words). All arithmetic is float32, as in `quantizer.decode`, and
differs from it by rounding only.

Tokens of a run of pages stand in the order (field, page, row): token `field·R + row` of a page, R =
page_tokens / 8.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvfold.kernels.formats import Format, Plane
from kvfold.kernels.kinds.params import load_param
from kvfold.kernels.kinds.storage import FIELDS

BLOCK_ELEMENTS = 2**17  # unpacked at a time on a CPU, so that they stay in a core's cache


def field_order(x: Tensor, page_tokens: int) -> Tensor:
    """[..., pages·page_tokens] in rising position → [..., 8·pages·R] in the order of `Codes`."""
    return x.unflatten(-1, (-1, FIELDS, page_tokens // FIELDS)).transpose(-3, -2).flatten(-3)


class Piece(NamedTuple):
    """Codes of one plane, or of half of one, of a block of pages, unpacked."""

    first: int  # page of the block
    start: int  # channel
    codes: Tensor  # float32 [num_kv_heads, 8·pages·R, channels], times what `factors` undo
    factors: Tensor | None  # float32 [8, 1, 1], of each field; None for 1


@cache
def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor that outlives an inference mode."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def scratch(
    buffers: dict | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Undefined memory, contiguous: on a CPU, where new pages of it cost more than what is written
    there, a buffer that stays."""
    size = math.prod(shape)
    if buffers is None or device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device).view(shape)
    if dtype not in buffers or len(buffers[dtype]) < size:
        with torch.inference_mode(False):
            buffers[dtype] = torch.empty(size, dtype=dtype)
    return buffers[dtype][:size].view(shape)


class Codes:
    """Keys or values of a run of pages of one format, packed as they are.

    Args:
        packed: uint8 [pages, num_kv_heads, fmt.nbytes(page_tokens)].
        fmt: their format.
        page_tokens: tokens of a page, a multiple of 8.
        buffers: memory to work in, for all who take turns with it; see `scratch`.
    """

    def __init__(
        self, packed: Tensor, fmt: Format, page_tokens: int, buffers: dict | None = None
    ) -> None:
        self.packed, self.fmt, self.page_tokens, self.buffers = packed, fmt, page_tokens, buffers
        self.num_pages, self.num_kv_heads = packed.shape[:2]
        self.rows = page_tokens // FIELDS

    def __len__(self) -> int:
        return self.num_kv_heads

    def products(self, query: Tensor) -> Tensor:
        """query float32 [num_kv_heads, m, head_dim] times the keys, transposed → float32
        [num_kv_heads, m, n]."""
        steps, centres = self._channels()
        if steps is not None:
            query = query * steps
        shape = (self.fmt.num_groups, *query.shape[:2], FIELDS, self.num_pages, self.rows)
        out = query.new_zeros(shape)
        for piece in self._pieces():
            for group, codes, outer in self._groups(piece):
                part = (query[..., outer] @ codes.mT).unflatten(-1, (FIELDS, -1, self.rows))
                place = out[group, :, :, :, piece.first : piece.first + part.shape[-2]]
                if piece.factors is None:
                    place += part
                else:
                    place.addcmul_(part, piece.factors)
        out = out.flatten(3)
        if self.fmt.raw:
            return out[0]
        params = self._params()
        if centres is not None:
            return out[0].sub_((query * centres).sum(-1, keepdim=True)).mul_(params[0])
        sums = query.unflatten(-1, (self.fmt.num_groups, -1)).sum(-1)[
            ..., None
        ]  # [Hkv, m, groups, 1]
        total = out[0].mul_(params[1])
        for group in range(self.fmt.num_groups):
            if group:
                total.addcmul_(out[group], params[2 * group + 1])
            total.addcmul_(sums[:, :, group], params[2 * group])
        return total

    def weighted(self, weights: Tensor) -> Tensor:
        """weights float32 [num_kv_heads, m, n] times the values → float32 [num_kv_heads, m,
        head_dim]."""
        out = weights.new_zeros(*weights.shape[:2], self.fmt.head_dim)
        scaled = [weights]
        params = None
        if not self.fmt.raw:
            params = self._params()
            scaled = [weights * s for s in (params[1::2] if self.fmt.kind.minimum else params)]
        fields = [x.unflatten(-1, (FIELDS, self.num_pages, self.rows)) for x in scaled]
        for piece in self._pieces():
            pages = slice(piece.first, piece.first + piece.codes.shape[1] // self.page_tokens)
            for group, codes, outer in self._groups(piece):
                rows = fields[group][:, :, :, pages]
                rows = rows if piece.factors is None else rows * piece.factors
                out[..., outer] += rows.flatten(2) @ codes
        steps, centres = self._channels()
        if steps is not None and centres is not None:
            return out.sub_(scaled[0].sum(-1, keepdim=True) * centres).mul_(steps)
        if params is not None:
            minima = torch.cat([weights @ m.mT for m in params[::2]], -1)  # [Hkv, m, groups]
            out += minima.repeat_interleave(self.fmt.head_dim // self.fmt.num_groups, -1)
        return out

    def _channels(self) -> tuple[Tensor | None, Tensor | None]:
        """Steps and zero points of the channels of codes without a minimum, float32 [head_dim]
        each."""
        kind = self.fmt.kind
        if not kind.symmetric:
            return None, None
        levels = [n for size, n in self.fmt.classes for _ in range(size)]
        steps, centres = tuple(kind.step(n) for n in levels), tuple(kind.middle(n) for n in levels)
        device = self.packed.device
        return _constant(steps, torch.float32, device), _constant(centres, torch.float32, device)

    def _groups(self, piece: Piece) -> Iterator[tuple[int, Tensor, slice]]:
        """Where a piece meets the parameter groups: (group, its codes, channels of the head)."""
        size = self.fmt.head_dim // self.fmt.num_groups
        end = piece.start + piece.codes.shape[-1]
        if self.fmt.num_groups == 1:
            yield 0, piece.codes, slice(piece.start, end)
            return
        for group in range(piece.start // size, -(-end // size)):
            first, last = max(piece.start, group * size), min(end, (group + 1) * size)
            yield (
                group,
                piece.codes[..., first - piece.start : last - piece.start],
                slice(first, last),
            )

    def _params(self) -> Tensor:
        """float32 [parameters, num_kv_heads, 1, n]."""
        size = self.fmt.param_nbytes
        first = self.packed.shape[-1] - self.page_tokens * self.fmt.num_params * size
        rows = self.packed[..., first:].unflatten(-1, (self.fmt.num_params, -1, FIELDS * size))
        values = load_param(rows, self.fmt.param_dtype)  # [pages, Hkv, p, R, 8]
        return values.permute(2, 1, 4, 0, 3).flatten(2).unsqueeze(2)

    def _pieces(self) -> Iterator[Piece]:
        """Unpacks a block of pages of a plane at a time, into memory that the next one is unpacked
        into."""
        offset = 0
        elements = BLOCK_ELEMENTS if self.packed.device.type == "cpu" else 32 * BLOCK_ELEMENTS
        for plane in self.fmt.planes:
            end = offset + plane.nbytes(self.page_tokens)
            step = max(1, elements // (self.num_kv_heads * self.page_tokens * plane.channels))
            unpack = (
                self._masked if plane.storage.binary and self.fmt.kind.uniform else self._tokenwise
            )
            yield from unpack(self.packed[..., offset:end], plane, step)
            offset = end

    def _tokenwise(self, data: Tensor, plane: Plane, step: int) -> Iterator[Piece]:
        """Codes that are no fields of words, or of levels that are not uniform, and 16-bit values.
        data: uint8 [pages, Hkv, bytes of a head's plane]."""
        for first in range(0, self.num_pages, step):
            part = data[first : first + step]
            found = self.fmt.kind.values(
                plane.storage.unpack(part, self.page_tokens, plane.channels)
            )
            fields = found.unflatten(2, (FIELDS, -1)).permute(
                1, 2, 0, 3, 4
            )  # [Hkv, 8, pages, R, channels]
            codes = scratch(self.buffers, fields.shape, torch.float32, data.device).copy_(fields)
            yield Piece(first, plane.start, codes.flatten(1, 3), None)

    def _masked(self, data: Tensor, plane: Plane, step: int) -> Iterator[Piece]:
        """Binary codes: fields of masked words. data: uint8 [pages, Hkv, bytes of a head's
        plane]."""
        width, device = plane.width, data.device
        sets, halves = 2 if width == 4 else 1, 2 if width == 1 else 1
        table = data.view(torch.int16).unflatten(-1, (sets, 1, self.rows, -1))
        table = table.permute(1, 2, 3, 0, 4, 5)  # [Hkv, sets, 1, pages, R, n]
        for half in range(halves):
            # of the fields in their order, from the lowest bit on; the last one's top bit is a
            # word's sign
            places = (0, 8, 4, 12) if width == 4 else tuple(range(half, 16, 2))
            masks = _constant(
                tuple((((2**width - 1 << p,),),) for p in places[:-1]), torch.int16, device
            )
            powers = (*(2.0**-p for p in places[:-1]), 1.0) * sets
            factors = _constant(
                tuple(((power * 2**plane.shift,),) for power in powers), torch.float32, device
            )
            size = 0  # pages that the buffers are cut for
            for first in range(0, self.num_pages, step):
                words = table[:, :, :, first : first + step]
                if words.shape[3] != size:
                    size = words.shape[3]
                    shape = (*words.shape[:2], len(places), *words.shape[3:])
                    found = scratch(self.buffers, shape, torch.int16, device)
                    unpacked = scratch(self.buffers, shape, torch.float32, device)
                    low, last, codes = found[:, :, :-1], found[:, :, -1:], unpacked.flatten(1, 4)
                torch.bitwise_and(words, masks, out=low)
                torch.bitwise_right_shift(words, places[-1], out=last).bitwise_and_(2**width - 1)
                unpacked.copy_(found)
                yield Piece(first, plane.start + half * plane.channels // halves, codes, factors)
