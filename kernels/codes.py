"""Products with packed tokens that never decode them: a query against the codes of keys, weights against the codes of values.

decode writes every element out: x̂ = s·(c − z) + m. A product with a few rows needs less: channel steps go into the query, a
token's scale and minimum into its score (or into its weight, for values), and z and m become one term of rank one. What is left
is a product with integers c, and a bit field of a masked word is an integer as it stands, c·2^k, whose power of two goes into the
score too (packing.py draws the words). All arithmetic is float32, as in `quantizer.decode`, and differs from it by rounding only.

Tokens of a run of pages stand in the order (field, page, row): token `field·R + row` of a page, R = page_tokens / 8.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvfold.kernels.formats import GAUSSIAN_STEP, TRIT, Format, Plane
from kvfold.kernels.packing import FIELDS, unpack_trits
from kvfold.kernels.quantizer import load_param


def field_order(x: Tensor, page_tokens: int) -> Tensor:
    """[..., pages·page_tokens] in rising position → [..., 8·pages·R] in the order of `Codes`."""
    return x.unflatten(-1, (-1, FIELDS, page_tokens // FIELDS)).transpose(-3, -2).flatten(-3)


class Piece(NamedTuple):
    """Codes of one plane, or of half of one, unpacked."""

    start: int  # first channel
    codes: Tensor  # float32 [num_kv_heads, n, channels], times what `factors` undo
    factors: Tensor | None  # float32 [8, 1], of each field; None for 1


@cache
def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor that outlives an inference mode."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


class Codes:
    """Keys or values of a run of pages of one format, packed as they are.

    Args:
        packed: uint8 [pages, num_kv_heads, fmt.nbytes(page_tokens)].
        fmt: their format.
        page_tokens: tokens of a page, a multiple of 8.
    """

    def __init__(self, packed: Tensor, fmt: Format, page_tokens: int) -> None:
        self.packed, self.fmt, self.page_tokens = packed, fmt, page_tokens
        self.num_pages, self.num_kv_heads = packed.shape[:2]
        self.tokens = self.num_pages * page_tokens

    def __len__(self) -> int:
        return self.num_kv_heads

    def products(self, query: Tensor) -> Tensor:
        """query float32 [num_kv_heads, m, head_dim] times the keys, transposed → float32 [num_kv_heads, m, n]."""
        out: list[Tensor | None] = [None] * self.fmt.num_groups
        steps, centres = self._channels()
        if steps is not None:
            query = query * steps
        for piece in self._pieces():
            for group, inner, outer in self._groups(piece):
                part = query[..., outer] @ piece.codes[..., inner].mT
                if piece.factors is not None:
                    part.unflatten(-1, (FIELDS, -1)).mul_(piece.factors)
                found = out[group]
                out[group] = part if found is None else found.add_(part)
        if self.fmt.params == "none":
            assert out[0] is not None
            return out[0]
        params = self._params()
        if centres is not None:
            assert out[0] is not None
            return out[0].sub_((query * centres).sum(-1, keepdim=True)).mul_(params[0])
        sums = query.unflatten(-1, (self.fmt.num_groups, -1)).sum(-1)  # [Hkv, m, groups]
        total = torch.zeros((), device=query.device)
        for group, part in enumerate(out):
            assert part is not None
            total = total + part.mul_(params[2 * group + 1]).addcmul_(sums[..., group, None], params[2 * group])
        return total

    def weighted(self, weights: Tensor) -> Tensor:
        """weights float32 [num_kv_heads, m, n] times the values → float32 [num_kv_heads, m, head_dim]."""
        out = torch.zeros(*weights.shape[:2], self.fmt.head_dim, device=weights.device)
        scaled = [weights]
        params = None
        if self.fmt.params != "none":
            params = self._params()
            scaled = [weights * params[0]] if self.fmt.params == "scale" else [weights * s for s in params[1::2]]
        for piece in self._pieces():
            for group, inner, outer in self._groups(piece):
                rows = scaled[group]
                if piece.factors is not None:
                    rows = (rows.unflatten(-1, (FIELDS, -1)) * piece.factors).flatten(-2)
                out[..., outer] += rows @ piece.codes[..., inner]
        steps, centres = self._channels()
        if centres is not None:
            return out.sub_(scaled[0].sum(-1, keepdim=True) * centres).mul_(steps)
        if params is not None:
            minima = torch.cat([weights @ m.mT for m in params[::2]], -1)  # [Hkv, m, groups]
            out += minima.repeat_interleave(self.fmt.head_dim // self.fmt.num_groups, -1)
        return out

    def _channels(self) -> tuple[Tensor | None, Tensor | None]:
        """Steps and zero points of the channels of "scale" codes, float32 [head_dim] each; 0 where nothing is coded."""
        if self.fmt.params != "scale":
            return None, None
        rows = [(GAUSSIAN_STEP.get(n, 0.0), (n - 1) / 2 if n else 0.0) for size, n in self.fmt.classes for _ in range(size)]
        steps, centres = zip(*rows, strict=True)
        device = self.packed.device
        return _constant(steps, torch.float32, device), _constant(centres, torch.float32, device)

    def _groups(self, piece: Piece) -> Iterator[tuple[int, slice, slice]]:
        """Where a piece meets the parameter groups: (group, channels of the piece, channels of the head)."""
        size = self.fmt.head_dim // self.fmt.num_groups
        end = piece.start + piece.codes.shape[-1]
        for group in range(piece.start // size, -(-end // size)):
            first, last = max(piece.start, group * size), min(end, (group + 1) * size)
            yield group, slice(first - piece.start, last - piece.start), slice(first, last)

    def _params(self) -> Tensor:
        """float32 [parameters, num_kv_heads, 1, n]."""
        size = self.fmt.param_nbytes
        first = self.packed.shape[-1] - self.page_tokens * self.fmt.num_params * size
        data = self.packed[..., first:].unflatten(-1, (self.fmt.num_params, -1, FIELDS * size))  # [pages, Hkv, p, R, 8·size]
        values = load_param(data, self.fmt.param_dtype)  # [pages, Hkv, p, R, 8]
        return values.permute(2, 1, 4, 0, 3).flatten(2).unsqueeze(2)

    def _pieces(self) -> Iterator[Piece]:
        """Unpacks a plane at a time, float32."""
        offset = 0
        for plane in self.fmt.planes:
            part = self.packed[..., offset : offset + plane.nbytes(self.page_tokens)]
            offset += plane.nbytes(self.page_tokens)
            if plane.width in (TRIT, 16):
                yield self._tokenwise(part, plane)
            else:
                yield from self._masked(part.view(torch.int16), plane)

    def _tokenwise(self, part: Tensor, plane: Plane) -> Piece:
        """Ternary codes, and 16-bit values, which stand token by token."""
        if plane.width == TRIT:
            found = unpack_trits(part, self.page_tokens, plane.channels)
        else:
            found = part.view(torch.float16).unflatten(-1, (self.page_tokens, -1))
        fields = found.unflatten(2, (FIELDS, -1)).permute(1, 2, 0, 3, 4)  # [Hkv, 8, pages, R, channels]
        return Piece(plane.start, fields.float().reshape(self.num_kv_heads, self.tokens, -1), None)

    def _masked(self, words: Tensor, plane: Plane) -> Iterator[Piece]:
        """Binary codes: fields of masked words. words: int16 [pages, Hkv, words of a head's plane]."""
        width, rows = plane.width, self.page_tokens // FIELDS
        sets = 2 if width == 4 else 1
        # [Hkv, sets, 1, pages·R, words of a row]
        table = words.unflatten(-1, (sets, 1, rows, -1)).permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        for half in range(2 if width == 1 else 1):
            # of the fields in their order, from the lowest bit on; the last one's top bit is a word's sign
            places = (0, 8, 4, 12) if width == 4 else tuple(range(half, 16, 2))
            masks = _constant(tuple((2**width - 1 << p,) for p in places[:-1]), torch.int16, words.device)
            found = table.new_empty(*table.shape[:2], len(places), *table.shape[3:])
            torch.bitwise_and(table, masks[:, None], out=found[:, :, :-1])
            last = found[:, :, -1:]
            torch.bitwise_right_shift(table, places[-1], out=last).bitwise_and_(2**width - 1)
            powers = (*(2.0**-p for p in places[:-1]), 1.0) * sets
            factors = _constant(tuple((power * 2**plane.shift,) for power in powers), torch.float32, words.device)
            codes = found.float().view(self.num_kv_heads, self.tokens, -1)
            yield Piece(plane.start + half * codes.shape[-1], codes, factors)
