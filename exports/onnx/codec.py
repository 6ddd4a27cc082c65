"""The page codec as ONNX nodes: `kernels.quantizer` byte for byte, where a runtime has no code of
ours.

Decoding looks bytes up in tables: one Gather turns a byte into the numbers of all tokens or codes
in it, so nothing is shifted or masked. Bytes are transposed before they are looked up, while they
are still few, to rows of channels with tokens along them:

    keys or values    float32 [B, Hkv, coded channels, n·P]

Within a page tokens stand in the order that needs no further move (`Side.tokens`), which is the
order of words (FORMAT.md) where no plane has 4 bits. Attention doesn't mind the order of tokens, as
long as weights follow it (`to_words`, `from_words`). Scales stay apart and multiply scores or
weights, one number a token and group in place of one a channel.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from kvfold.errors import KvfoldError
from kvfold.exports.onnx.graph import INT32, Graph
from kvfold.kernels.formats import Format
from kvfold.kernels.kinds.levels import SIXTEEN, TRIT
from kvfold.kernels.kinds.storage import FIELDS
from kvfold.kernels.kinds.trits import TRIT_CHANNELS, TRITS_PER_BYTE, trit_parts

BYTES = np.arange(256)
ORDER_4BIT = (0, 2, 1, 3, 4, 6, 5, 7)  # fields as the bytes of a 4-bit plane hold them


def e4m3_values() -> np.ndarray:
    """What each of the 256 bytes means, float32 [256]; NaN at 127 and 255."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def fp16_values() -> np.ndarray:
    """What each 16-bit word means, float32 [65536], infinities and NaN as 0: no page holds them."""
    values = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    return np.where(np.isfinite(values), values, 0).astype(np.float32)


def word_order(page: int) -> np.ndarray:
    """Token of each place in the order of words, int64 [page]."""
    return np.arange(page).reshape(FIELDS, -1).T.reshape(-1)


@dataclass(frozen=True)
class Side:
    """Keys or values of one layer in pages.

    Attributes:
        fmt: the format. heads: KV heads. page: tokens of a page.
    """

    fmt: Format
    heads: int
    page: int

    def __post_init__(self) -> None:
        """Raises KvfoldError where there are no ONNX nodes for the format."""
        known = all(
            plane.storage.binary or plane.width in (TRIT, SIXTEEN) for plane in self.fmt.planes
        )
        if self.fmt.kind.device or not known:
            raise KvfoldError(
                f"There are no ONNX nodes for pages of '{self.fmt}'; compress with another format."
            )

    @property
    def rows(self) -> int:
        """Rows of words in a page."""
        return self.page // FIELDS

    @property
    def nbytes(self) -> int:
        """Bytes of a page, all heads."""
        return self.heads * self.fmt.nbytes(self.page)

    @property
    def groups(self) -> int:
        """Runs of channels with parameters of their own."""
        return self.fmt.num_groups

    @cached_property
    def coded(self) -> list[tuple[int, int]]:
        """(first, end) of runs of channels that are stored."""
        runs, start = [], 0
        for channels, levels in self.fmt.classes:
            if levels:
                runs.append((start, start + channels))
            start += channels
        return runs

    @cached_property
    def words(self) -> np.ndarray:
        """Token of each place in the order of words, int64 [P]."""
        return word_order(self.page)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token of each column that `decode` gives, int64 [P]."""
        if self.fmt.raw:
            return np.arange(self.page)
        if any(plane.width == 4 for plane in self.fmt.planes):
            return self.words.reshape(-1, FIELDS)[:, ORDER_4BIT].reshape(-1)
        return self.words

    def _to_order(self, g: Graph, x: str, have: np.ndarray, want: np.ndarray) -> str:
        places = np.argsort(have)[want]
        return x if (have == want).all() else g.op("Gather", x, g.array(places, np.int64), axis=-1)

    def to_words(self, g: Graph, x: str) -> str:
        """[..., P] in the order of `decode` → in the order of words."""
        return self._to_order(g, x, self.tokens, self.words)

    def from_words(self, g: Graph, x: str) -> str:
        """[..., P] in the order of words → in the order of `decode`."""
        return self._to_order(g, x, self.words, self.tokens)

    def decode(self, g: Graph, packed: str) -> tuple[str, str | None, str | None]:
        """uint8 [B, n, Hkv · nbytes] → (codes, scale, minimum).

        Returns:
            codes: float32 [B, Hkv, coded channels, n·P], as a token's scale of 1 makes them.
            scale, minimum: float32 [B, Hkv, groups, n, P], in the order of words; None where the
                format has none.
        """
        kind = self.fmt.kind
        heads = g.reshape(packed, 0, 0, self.heads, self.fmt.nbytes(self.page))
        offset, parts = 0, []
        found: dict[int, str] = {}
        levels = {}
        start = 0
        for channels, count in self.fmt.classes:
            levels[start] = count
            start += channels
        for plane in self.fmt.planes:
            part = g.slice(heads, 3, offset, offset + plane.nbytes(self.page))
            offset += plane.nbytes(self.page)
            if self.fmt.raw:
                return self._raw(g, part), None, None
            step = kind.step(levels[plane.start])
            middle = 0.0 if plane.shift else kind.middle(levels[plane.start])
            if plane.width == TRIT:
                data = self._trits(g, part, plane.channels, step, middle)
            else:
                data = self._plane(
                    g, part, plane.channels, plane.width, step, middle, 2**plane.shift
                )
            found[plane.start] = g.op("Add", found[plane.start], data) if plane.shift else data
        parts = list(found.values())
        params = self._params(g, g.slice(heads, 3, offset))
        codes = g.concat(parts, 2)
        if kind.symmetric:
            return codes, params, None
        return (
            codes,
            g.op("Slice", params, g.ints(1), g.ints(2**62), g.ints(2), g.ints(2)),
            g.op("Slice", params, g.ints(0), g.ints(2**62), g.ints(2), g.ints(2)),
        )

    def _plane(
        self, g: Graph, part: str, n: int, width: int, step: float, middle: float, unit: int
    ) -> str:
        """A plane of `width` bits of n channels → float32 [B, Hkv, n, pages · P]: (code · unit −
        middle) · step."""

        def look_up(data: str, codes: np.ndarray) -> str:
            table = ((codes * unit - middle) * np.float32(step)).astype(np.float32)
            return g.reshape(
                g.op("Gather", g.array(table), data), 0, 0, n if width > 1 else n // 2, -1
            )

        wide = any(plane.width == 4 for plane in self.fmt.planes)
        fields = np.array(ORDER_4BIT[:4] if wide else (0, 1, 2, 3))
        if width == 4:
            data = g.reshape(part, 0, 0, self.heads, 2, self.rows, n, 2)
            data = g.cast(
                g.transpose(data, 0, 2, 5, 1, 4, 3, 6), INT32
            )  # [B, Hkv, n, pages, R, set, byte]
            return look_up(data, np.stack((BYTES & 15, BYTES >> 4), 1))
        data = g.reshape(part, 0, 0, self.heads, self.rows, n * width // 2, 2)
        data = g.cast(
            g.transpose(data, 0, 2, 4, 1, 3, 5), INT32
        )  # [B, Hkv, channels, pages, R, byte]
        if width == 2:
            return look_up(data, BYTES[:, None] >> 2 * fields & 3)
        return g.concat(
            [look_up(data, BYTES[:, None] >> 2 * fields + half & 1) for half in (0, 1)], 2
        )

    def _trits(self, g: Graph, part: str, n: int, step: float, middle: float) -> str:
        """A ternary plane of n channels → float32 [B, Hkv, n, pages · P]: (code − middle) ·
        step."""
        rows, tiles = self.rows, n // TRIT_CHANNELS
        whole, left = trit_parts(n)
        count = whole + (left > 2)

        def value(codes: np.ndarray) -> np.ndarray:
            return ((codes - middle) * np.float32(step)).astype(np.float32)

        def lines(first: int, size: int, *shape: int) -> str:
            return g.reshape(g.slice(part, 3, first, first + size), 0, 0, self.heads, *shape)

        start = count // 2 * rows * TRIT_CHANNELS * 2
        halves = []
        if count > 1:  # [B, Hkv, 16, pages, R, bytes] of [B, pages, Hkv, pairs, R, 16, byte]
            pairs = g.transpose(
                lines(0, start, count // 2, rows, TRIT_CHANNELS, 2), 0, 2, 5, 1, 4, 3, 6
            )
            halves.append(g.reshape(pairs, 0, 0, 0, 0, rows, count // 2 * 2))
        if count % 2:
            size = -(-rows // 2)
            last = lines(start, size * TRIT_CHANNELS * 2, size, TRIT_CHANNELS, 2)
            start += size * TRIT_CHANNELS * 2
            last = g.reshape(g.transpose(last, 0, 2, 4, 1, 3, 5), 0, 0, 0, 0, 2 * size, 1)
            halves.append(g.slice(last, 4, 0, rows))
        data = g.cast(g.concat(halves, 5), INT32)
        digits = np.stack([((BYTES * 3**k) % 256) * 3 >> 8 for k in range(TRITS_PER_BYTE)], 1)
        five = g.op("Gather", g.array(value(digits)), g.slice(data, 5, 0, whole))
        numbered = [g.reshape(five, 0, 0, 0, 0, rows, TRITS_PER_BYTE * whole)]
        rest = np.stack([BYTES >> 2 * j & 3 for j in range(left)], 1) if left else BYTES
        if left > 2:
            tail = g.op("Gather", g.array(value(rest)), g.slice(data, 5, whole, whole + 1))
            numbered.append(g.reshape(tail, 0, 0, 0, 0, rows, left))
        elif left:
            size = -(-rows // 4)
            data = lines(start, size * TRIT_CHANNELS * 2, size, TRIT_CHANNELS, 2)
            data = g.cast(
                g.transpose(data, 0, 2, 4, 1, 3, 5), INT32
            )  # [B, Hkv, 16, pages, lines, byte]
            table = np.stack(
                [rest & 3, np.stack([BYTES >> 4 + 2 * j & 3 for j in range(left)], 1)], 1
            )
            tail = g.op("Gather", g.array(value(table)), data)
            numbered.append(g.slice(g.reshape(tail, 0, 0, 0, 0, 4 * size, left), 4, 0, rows))
        codes = g.reshape(g.concat(numbered, 5), 0, 0, 0, 0, rows, tiles, FIELDS)
        return g.reshape(g.transpose(codes, 0, 1, 5, 2, 3, 4, 6), 0, 0, n, -1)

    def _raw(self, g: Graph, part: str) -> str:
        data = g.reshape(part, 0, 0, self.heads, self.page, self.fmt.head_dim, 2)
        values = g.transpose(self._float16(g, data), 0, 2, 4, 1, 3)
        return g.reshape(values, 0, 0, self.fmt.head_dim, -1)

    def _float16(self, g: Graph, data: str) -> str:
        """Bytes [..., 2] → float32 [...]."""
        low, high = (
            g.op("Gather", g.cast(data, INT32), g.array(i, np.int64), axis=-1) for i in (0, 1)
        )
        return g.op(
            "Gather",
            g.array(fp16_values()),
            g.op("Add", low, g.op("Mul", high, g.array(256, np.int32))),
        )

    def _params(self, g: Graph, part: str) -> str:
        """→ float32 [B, Hkv, parameters, n, P], in the order of words."""
        count, size = self.fmt.num_params, self.fmt.param_nbytes
        if size == 2:
            values = self._float16(g, g.reshape(part, 0, 0, self.heads, count, self.page, 2))
        else:
            data = g.cast(g.reshape(part, 0, 0, self.heads, count, self.page), INT32)
            values = g.op("Gather", g.array(np.nan_to_num(e4m3_values())), data)
        return g.transpose(values, 0, 2, 3, 1, 4)
