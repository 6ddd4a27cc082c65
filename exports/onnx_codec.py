"""The page codec as ONNX nodes: `kernels.quantizer` byte for byte, where a runtime has no code of ours.

Decoding looks bytes up in tables: one Gather turns a byte into the numbers of all tokens or codes in it, so nothing is shifted
or masked. Bytes are transposed before they are looked up, while they are still few, to rows of channels with tokens along them:

    keys or values    float32 [B, Hkv, coded channels, n·P]

Within a page tokens stand in the order that needs no further move (`Side.tokens`), which is the order of words (FORMAT.md)
where no plane has 4 bits. Attention doesn't mind the order of tokens, as long as weights follow it (`to_words`, `from_words`).
Scales stay apart and multiply scores or weights, one number a token and group in place of one a channel.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from kvfold.exports.onnx_graph import FLOAT, INT32, UINT8, Graph
from kvfold.kernels.formats import GAUSSIAN_STEP, TRIT, Format
from kvfold.kernels.packing import FIELDS, TRIT_CHANNELS, TRITS_PER_BYTE, trit_parts

BYTES = np.arange(256)
TINY = float(np.finfo(np.float32).tiny)
ORDER_4BIT = (0, 2, 1, 3, 4, 6, 5, 7)  # fields as the bytes of a 4-bit plane hold them


def e4m3_values() -> np.ndarray:
    """What each of the 256 bytes means, float32 [256]; NaN at 127 and 255."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def e4m3_thresholds() -> np.ndarray:
    """float32 [126]: |x| rounds to the code that counts how many of these it reaches; halfway goes to the even code."""
    values = e4m3_values()[:127]
    middle = (values[:-1] + values[1:]) / 2
    odd = np.arange(1, 127) % 2 == 1
    return np.where(odd, np.nextafter(middle, np.float32(np.inf)), middle).astype(np.float32)


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
        """Runs of channels with a (minimum, scale) of their own; 1 for other formats."""
        return self.fmt.num_groups if self.fmt.params == "scale_min" else 1

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
        if self.fmt.params == "none":
            return np.arange(self.page)
        if any(plane.width == 4 for plane in self.fmt.planes):
            return self.words.reshape(-1, FIELDS)[:, ORDER_4BIT].reshape(-1)
        return self.words

    # -- decode ------------------------------------------------------------------------------------------------------

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
            scale, minimum: float32 [B, Hkv, groups, n, P], in the order of words; None where the format has none.
        """
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
            step, middle = 1.0, 0.0
            if self.fmt.params == "scale":
                step = GAUSSIAN_STEP[levels[plane.start]]
                middle = 0.0 if plane.shift else (levels[plane.start] - 1) / 2
            if plane.width == 16:
                return self._raw(g, part), None, None
            if plane.width == TRIT:
                data = self._trits(g, part, plane.channels, step, middle)
            else:
                data = self._plane(g, part, plane.channels, plane.width, step, middle, 2**plane.shift)
            found[plane.start] = g.op("Add", found[plane.start], data) if plane.shift else data
        parts = list(found.values())
        params = self._params(g, g.slice(heads, 3, offset))
        codes = g.concat(parts, 2)
        if self.fmt.params == "scale":
            return codes, params, None
        return (
            codes,
            g.op("Slice", params, g.ints(1), g.ints(2**62), g.ints(2), g.ints(2)),
            g.op("Slice", params, g.ints(0), g.ints(2**62), g.ints(2), g.ints(2)),
        )

    def _plane(self, g: Graph, part: str, n: int, width: int, step: float, middle: float, unit: int) -> str:
        """A plane of `width` bits of n channels → float32 [B, Hkv, n, pages · P]: (code · unit − middle) · step."""

        def look_up(data: str, codes: np.ndarray) -> str:
            table = ((codes * unit - middle) * np.float32(step)).astype(np.float32)
            return g.reshape(g.op("Gather", g.array(table), data), 0, 0, n if width > 1 else n // 2, -1)

        wide = any(plane.width == 4 for plane in self.fmt.planes)
        fields = np.array(ORDER_4BIT[:4] if wide else (0, 1, 2, 3))
        if width == 4:
            data = g.reshape(part, 0, 0, self.heads, 2, self.rows, n, 2)
            data = g.cast(g.transpose(data, 0, 2, 5, 1, 4, 3, 6), INT32)  # [B, Hkv, n, pages, R, set, byte]
            return look_up(data, np.stack((BYTES & 15, BYTES >> 4), 1))
        data = g.reshape(part, 0, 0, self.heads, self.rows, n * width // 2, 2)
        data = g.cast(g.transpose(data, 0, 2, 4, 1, 3, 5), INT32)  # [B, Hkv, channels, pages, R, byte]
        if width == 2:
            return look_up(data, BYTES[:, None] >> 2 * fields & 3)
        return g.concat([look_up(data, BYTES[:, None] >> 2 * fields + half & 1) for half in (0, 1)], 2)

    def _trits(self, g: Graph, part: str, n: int, step: float, middle: float) -> str:
        """A ternary plane of n channels → float32 [B, Hkv, n, pages · P]: (code − middle) · step."""
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
            pairs = g.transpose(lines(0, start, count // 2, rows, TRIT_CHANNELS, 2), 0, 2, 5, 1, 4, 3, 6)
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
            data = g.cast(g.transpose(data, 0, 2, 4, 1, 3, 5), INT32)  # [B, Hkv, 16, pages, lines, byte]
            table = np.stack([rest & 3, np.stack([BYTES >> 4 + 2 * j & 3 for j in range(left)], 1)], 1)
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
        low, high = (g.op("Gather", g.cast(data, INT32), g.array(i, np.int64), axis=-1) for i in (0, 1))
        return g.op("Gather", g.array(fp16_values()), g.op("Add", low, g.op("Mul", high, g.array(256, np.int32))))

    def _params(self, g: Graph, part: str) -> str:
        """→ float32 [B, Hkv, parameters, n, P], in the order of words."""
        count, size = self.fmt.num_params, self.fmt.param_nbytes
        if size == 2:
            values = self._float16(g, g.reshape(part, 0, 0, self.heads, count, self.page, 2))
        else:
            data = g.cast(g.reshape(part, 0, 0, self.heads, count, self.page), INT32)
            values = g.op("Gather", g.array(np.nan_to_num(e4m3_values())), data)
        return g.transpose(values, 0, 2, 3, 1, 4)

    # -- encode ------------------------------------------------------------------------------------------------------

    def encode(self, g: Graph, x: str, clip: str | None = None) -> str:
        """float16 [B, Hkv, n·P, D], n ≥ 1 → uint8 [B, n, Hkv · nbytes].

        clip: float32, broadcast against [Hkv, 1, 1, groups]; None for 1.
        """
        fmt = self.fmt
        blocks = g.reshape(g.cast(x, FLOAT), 0, 0, -1, self.page, fmt.head_dim)  # [B, Hkv, n, P, D]
        if fmt.params == "none":
            parts = [g.reshape(self._float16_bytes(g, blocks), 0, 0, 0, self.page * fmt.head_dim * 2)]
        else:
            codes, params = (self._symmetric if fmt.params == "scale" else self._asymmetric)(g, blocks, clip)
            parts = []
            for plane in fmt.planes:
                own = g.slice(codes, 4, plane.start, plane.start + plane.channels)
                if plane.width == TRIT:
                    parts += self._pack_trits(g, own, plane.channels)
                    continue
                if plane.shift:
                    own = g.op("Floor", g.op("Mul", own, g.number(0.5**plane.shift)))
                own = g.op("Mod", own, g.number(2.0**plane.width), fmod=1)
                parts.append(self._pack_plane(g, own, plane.channels, plane.width))
            parts.append(params)
        page = g.transpose(g.concat(parts, 3), 0, 2, 1, 3)  # [B, n, Hkv, nbytes]
        return g.reshape(page, 0, 0, self.nbytes)

    def _symmetric(self, g: Graph, x: str, clip: str | None) -> tuple[str, str]:
        """(codes float32 [B, Hkv, n, P, D], parameters uint8 [B, Hkv, n, P])."""
        runs = self.coded
        own = g.concat([g.slice(x, 4, a, b) for a, b in runs], 4) if runs != [(0, self.fmt.head_dim)] else x
        tau = g.op("Sqrt", g.op("ReduceMean", g.op("Mul", own, own), g.ints(4), keepdims=1))
        data, tau = self._store(g, tau)
        levels = np.array([n for channels, n in self.fmt.classes for _ in range(channels)], np.float32)
        steps = [GAUSSIAN_STEP.get(n, 1.0) for channels, n in self.fmt.classes for _ in range(channels)]
        divisor = g.op("Mul", g.op("Max", tau, g.number(TINY)), g.array(steps))
        codes = g.op("Floor", g.op("Add", g.op("Div", x, divisor), g.array(levels / 2)))
        return g.clamp(codes, g.number(0.0), g.array(np.maximum(levels - 1, 0))), data

    def _asymmetric(self, g: Graph, x: str, clip: str | None) -> tuple[str, str]:
        """(codes float32 [B, Hkv, n, P, D], parameters uint8 [B, Hkv, n, 2 · groups · P · size])."""
        groups, dim, top = self.groups, self.fmt.head_dim, float(self.fmt.classes[0][1] - 1)
        grouped = g.op("Reshape", x, g.op("Concat", g.op("Shape", x, end=4), g.ints(groups, dim // groups), axis=0))
        low = g.op("ReduceMin", grouped, g.ints(5), keepdims=0)
        high = g.op("ReduceMax", grouped, g.ints(5), keepdims=0)
        if clip is not None:
            low, high = g.op("Mul", low, clip), g.op("Mul", high, clip)
        span = g.op("Div", g.op("Sub", high, low), g.number(top))
        pair = g.op("Concat", *(g.op("Unsqueeze", t, g.ints(5)) for t in (low, span)), axis=5)  # [B, Hkv, n, P, G, 2]
        data, pair = self._store(g, g.reshape(pair, 0, 0, 0, 0, 2 * groups))
        ends = g.op("Reshape", pair, g.op("Concat", g.op("Shape", pair, end=4), g.ints(groups, 2), axis=0))
        minimum, scale = (g.slice(ends, 5, i, i + 1) for i in (0, 1))
        u = g.op("Div", g.op("Sub", grouped, minimum), g.op("Max", scale, g.number(TINY)))
        codes = g.clamp(g.op("Round", u), g.number(0.0), g.number(top))
        return g.op("Reshape", codes, g.op("Shape", x)), data

    def _store(self, g: Graph, values: str) -> tuple[str, str]:
        """Parameters [B, Hkv, n, P, p] → (bytes in the order of words [B, Hkv, n, p · P · size], rounded parameters)."""
        count, size = self.fmt.num_params, self.fmt.param_nbytes
        if size == 2:
            rounded = g.cast(g.half(values), FLOAT)
            data = self._float16_bytes(g, rounded)  # [..., p, 2]
        else:
            data = g.op("Unsqueeze", self._e4m3_bytes(g, values), g.ints(5))
            rounded = g.op(
                "Gather", g.array(np.nan_to_num(e4m3_values())), g.cast(g.reshape(data, 0, 0, 0, 0, count), INT32)
            )
        data = g.reshape(data, 0, 0, 0, FIELDS, self.rows, count, size)
        return g.reshape(g.transpose(data, 0, 1, 2, 5, 4, 3, 6), 0, 0, 0, count * self.page * size), rounded

    def _negative(self, g: Graph, x: str) -> str:
        """1 where the sign bit is set, −0 included, else 0."""
        return g.cast(g.op("Less", g.op("Div", g.number(1.0), x), g.number(0.0)), FLOAT)

    def _e4m3_bytes(self, g: Graph, x: str) -> str:
        reached = g.op("GreaterOrEqual", g.op("Unsqueeze", g.op("Abs", x), g.ints(-1)), g.array(e4m3_thresholds()))
        code = g.total(g.cast(reached, FLOAT), -1)
        return g.cast(g.op("Add", code, g.op("Mul", self._negative(g, x), g.number(128.0))), UINT8)

    def _float16_bytes(self, g: Graph, x: str) -> str:
        """float32 → the two bytes of its float16, saturating: uint8 [..., 2]. Arithmetic on exact numbers, for want of a bit cast."""
        x = g.cast(g.half(x), FLOAT)
        size = g.op("Abs", x)
        bounds = g.array(2.0 ** np.arange(-14, 16))
        exponent = g.total(
            g.cast(g.op("GreaterOrEqual", g.op("Unsqueeze", size, g.ints(-1)), bounds), FLOAT), -1
        )  # 0 … 30
        unit = g.op("Gather", g.array(2.0 ** (25 - np.maximum(np.arange(31), 1))), g.cast(exponent, INT32))
        whole = g.op("Mul", g.op("Relu", g.op("Sub", exponent, g.number(1.0))), g.number(1024.0))
        word = g.op(
            "Add", g.op("Add", whole, g.op("Mul", size, unit)), g.op("Mul", self._negative(g, x), g.number(32768.0))
        )
        high = g.op("Floor", g.op("Mul", word, g.number(1 / 256)))
        low = g.op("Sub", word, g.op("Mul", high, g.number(256.0)))
        return g.cast(g.op("Concat", *(g.op("Unsqueeze", t, g.ints(-1)) for t in (low, high)), axis=-1), UINT8)

    def _pack_plane(self, g: Graph, codes: str, n: int, width: int) -> str:
        """Codes [B, Hkv, n, P, channels] < 2**width → uint8 [B, Hkv, n, bytes]; see packing.pack_plane."""
        rows, nbytes = self.rows, self.page * n * width // 8
        if width == 4:
            parts = g.reshape(codes, 0, 0, 0, 2, 2, 2 * rows * n)  # set, nibble, (byte, R, channel)
            data = g.total(g.op("Mul", parts, g.array([[1.0], [16.0]])), 4)
            data = g.transpose(g.reshape(data, 0, 0, 0, 2, 2, rows * n), 0, 1, 2, 3, 5, 4)
        else:
            parts = g.reshape(codes, 0, 0, 0, 2, 4, rows, 2 // width, n * width // 2)
            weight = 4.0 ** np.arange(4)[:, None, None, None] * 2.0 ** np.arange(2 // width)[:, None]
            data = g.transpose(
                g.total(g.op("Mul", parts, g.array(weight)), 4, 6), 0, 1, 2, 4, 5, 3
            )  # [.., R, channel, byte]
        return g.cast(g.reshape(data, 0, 0, 0, nbytes), UINT8)

    def _pack_trits(self, g: Graph, codes: str, n: int) -> list[str]:
        """Codes [B, Hkv, n, P, channels] → the parts of a ternary plane, uint8 [B, Hkv, n, bytes]; see packing.pack_trits."""
        rows, tiles = self.rows, n // TRIT_CHANNELS
        whole, left = trit_parts(n)
        fields = g.reshape(codes, 0, 0, 0, FIELDS, rows, tiles, TRIT_CHANNELS)
        numbered = g.reshape(g.transpose(fields, 0, 1, 2, 5, 3, 4, 6), 0, 0, 0, tiles * FIELDS, rows, TRIT_CHANNELS)
        first = g.reshape(
            g.slice(numbered, 3, 0, TRITS_PER_BYTE * whole), 0, 0, 0, whole, TRITS_PER_BYTE, rows * TRIT_CHANNELS
        )
        value = g.cast(g.total(g.op("Mul", first, g.array([[81.0], [27.0], [9.0], [3.0], [1.0]])), 4), INT32)
        scaled = g.op("Add", g.op("Mul", value, g.array(256, np.int32)), g.array(242, np.int32))
        halves = [g.cast(g.op("Div", scaled, g.array(243, np.int32)), FLOAT)]  # [B, Hkv, n, whole, R · 16]
        rest = ""
        if left:
            last = g.reshape(g.slice(numbered, 3, TRITS_PER_BYTE * whole), 0, 0, 0, left, rows * TRIT_CHANNELS)
            rest = g.total(g.op("Mul", last, g.array(4.0 ** np.arange(left)[:, None])), 3, keep=True)
        if left > 2:
            halves.append(rest)
        data, count, parts = g.concat(halves, 3), whole + (left > 2), []
        if count > 1:
            pairs = g.reshape(g.slice(data, 3, 0, count // 2 * 2), 0, 0, 0, count // 2, 2, rows * TRIT_CHANNELS)
            parts.append(
                g.reshape(g.transpose(pairs, 0, 1, 2, 3, 5, 4), 0, 0, 0, count // 2 * rows * TRIT_CHANNELS * 2)
            )
        if count % 2:
            padded = self._pad_rows(g, g.slice(data, 3, count - 1), 2)  # [B, Hkv, n, rows / 2, 2, 16]
            parts.append(g.reshape(g.transpose(padded, 0, 1, 2, 3, 5, 4), 0, 0, 0, -(-rows // 2) * TRIT_CHANNELS * 2))
        if 0 < left <= 2:
            padded = self._pad_rows(g, rest, 4)
            byte = g.reshape(padded, 0, 0, 0, -(-rows // 4), 2, 2, TRIT_CHANNELS)
            byte = g.total(g.op("Mul", byte, g.array([[1.0], [16.0]])), 5)  # [B, Hkv, n, lines, byte, 16]
            parts.append(g.reshape(g.transpose(byte, 0, 1, 2, 3, 5, 4), 0, 0, 0, -(-rows // 4) * TRIT_CHANNELS * 2))
        return [g.cast(part, UINT8) for part in parts]

    def _pad_rows(self, g: Graph, data: str, multiple: int) -> str:
        """[B, Hkv, n, 1, R · 16] → [B, Hkv, n, rows / multiple, multiple, 16], with zeros behind the last row."""
        size = -(-self.rows // multiple)
        flat = g.reshape(data, 0, 0, 0, self.rows * TRIT_CHANNELS)
        extra = (size * multiple - self.rows) * TRIT_CHANNELS
        if extra:
            flat = g.op("Pad", flat, g.ints(0, 0, 0, 0, 0, 0, 0, extra), g.number(0.0))
        return g.reshape(flat, 0, 0, 0, size, multiple, TRIT_CHANNELS)
