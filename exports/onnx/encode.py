"""Encodes pages in ONNX nodes, byte for byte as `kernels.quantizer.encode` does, with no operation
that a runtime might lack: codes are float32 until the last cast, since numbers below 256 are exact
there, and bits of e4m3 and float16 come from comparisons, for want of a bit cast.
"""

import numpy as np

from kvfold.exports.onnx.codec import Side, e4m3_values
from kvfold.exports.onnx.graph import FLOAT, INT32, UINT8, Graph
from kvfold.kernels.kinds import symmetric
from kvfold.kernels.kinds.interface import levels_of
from kvfold.kernels.kinds.levels import TRIT
from kvfold.kernels.kinds.storage import FIELDS
from kvfold.kernels.kinds.trits import TRIT_CHANNELS, TRITS_PER_BYTE, trit_parts

TINY = float(np.finfo(np.float32).tiny)


def e4m3_thresholds() -> np.ndarray:
    """float32 [126]: |x| rounds to the code that counts how many of these it reaches; halfway goes to the even code."""
    values = e4m3_values()[:127]
    middle = (values[:-1] + values[1:]) / 2
    odd = np.arange(1, 127) % 2 == 1
    return np.where(odd, np.nextafter(middle, np.float32(np.inf)), middle).astype(np.float32)


def encode(side: Side, g: Graph, x: str, clip: str | None = None) -> str:
    """float16 [B, Hkv, n·P, D], n ≥ 1 → uint8 [B, n, Hkv · nbytes].

    clip: float32, broadcast against [Hkv, 1, 1, groups]; None for 1.
    """
    fmt = side.fmt
    blocks = g.reshape(g.cast(x, FLOAT), 0, 0, -1, side.page, fmt.head_dim)  # [B, Hkv, n, P, D]
    if fmt.raw:
        parts = [g.reshape(_float16_bytes(side, g, blocks), 0, 0, 0, side.page * fmt.head_dim * 2)]
    else:
        codes, params = (_symmetric if fmt.kind.symmetric else _asymmetric)(side, g, blocks, clip)
        parts = []
        for plane in fmt.planes:
            own = g.slice(codes, 4, plane.start, plane.start + plane.channels)
            if plane.width == TRIT:
                parts += _pack_trits(side, g, own, plane.channels)
                continue
            if plane.shift:
                own = g.op("Floor", g.op("Mul", own, g.number(0.5**plane.shift)))
            own = g.op("Mod", own, g.number(2.0**plane.width), fmod=1)
            parts.append(_pack_plane(side, g, own, plane.channels, plane.width))
        parts.append(params)
    page = g.transpose(g.concat(parts, 3), 0, 2, 1, 3)  # [B, n, Hkv, nbytes]
    return g.reshape(page, 0, 0, side.nbytes)


def _symmetric(side: Side, g: Graph, x: str, clip: str | None) -> tuple[str, str]:
    """(codes float32 [B, Hkv, n, P, D], parameters uint8 [B, Hkv, n, P])."""
    runs = side.coded
    own = (
        g.concat([g.slice(x, 4, a, b) for a, b in runs], 4)
        if runs != [(0, side.fmt.head_dim)]
        else x
    )
    root = _rounded(
        side, g, g.op("Sqrt", g.op("ReduceMean", g.op("Mul", own, own), g.ints(4), keepdims=1))
    )
    data, scale = _store(side, g, _best_scale(side, g, x, root))
    return _symmetric_codes(side, g, x, scale), data


def _symmetric_codes(side: Side, g: Graph, x: str, scale: str) -> str:
    """Codes, float32, of numbers whose scale is known; the two broadcast."""
    each = levels_of(side.fmt)
    levels = np.array(each, np.float32)
    steps = g.array([side.fmt.kind.step(n) for n in each])
    divisor = g.op("Mul", g.op("Max", scale, g.number(TINY)), steps)
    codes = g.op("Floor", g.op("Add", g.op("Div", x, divisor), g.array(levels / 2)))
    return g.clamp(codes, g.number(0.0), g.array(np.maximum(levels - 1, 0)))


def _best_scale(side: Side, g: Graph, x: str, root: str) -> str:
    """The scale of kinds/symmetric.py, [B, Hkv, n, P, 1]: all factors side by side in a dimension
    of their own, in front."""
    each = levels_of(side.fmt)
    levels = np.array(each, np.float32)
    steps = g.array([side.fmt.kind.step(n) for n in each])
    weights = g.array([symmetric.SYMMETRIC.weight(n) for n in each])

    def units(y: str) -> str:
        most = g.number(symmetric.MOST_UNITS)
        whole = g.op("Round", g.clamp(y, g.number(-symmetric.MOST_UNITS), most))
        return g.cast(g.total(g.cast(whole, INT32), -1, keep=True), FLOAT)

    one = g.number(1.0)
    inverse = g.op("Div", one, g.op("Max", root, g.number(TINY)))
    v = g.op("Mul", x, inverse)
    size = g.op("Max", units(g.op("Mul", g.op("Mul", v, weights), v)), one)
    factors = g.array(np.reshape(symmetric.FACTORS, (-1, 1, 1, 1, 1, 1)))
    scales = _rounded(side, g, g.op("Mul", root, factors))
    ratio = g.op("Mul", scales, inverse)
    in_steps = g.op("Mul", v, g.op("Div", one, steps))
    middle = g.array((levels - 1) / 2)
    u = g.op("Mul", in_steps, g.op("Div", one, g.op("Max", ratio, g.number(TINY))))
    top = g.array(np.maximum(levels - 1, 0))
    codes = g.op("Round", g.clamp(g.op("Add", u, middle), g.number(0.0), top))
    back = g.op("Mul", g.op("Sub", codes, middle), g.op("Mul", ratio, steps))
    n = g.op("Sub", v, back)
    weighted = g.op("Mul", n, weights)
    along = units(g.op("Mul", weighted, v))
    part = g.op("Mul", along, g.op("Div", along, size))
    cost = g.op(
        "Add", units(g.op("Mul", weighted, n)), g.op("Mul", part, g.number(symmetric.ALONG))
    )
    best = g.op("ArgMin", cost, axis=0, keepdims=1)
    return g.op("Squeeze", g.op("GatherElements", scales, best, axis=0), g.ints(0))


def _asymmetric(side: Side, g: Graph, x: str, clip: str | None) -> tuple[str, str]:
    """(codes float32 [B, Hkv, n, P, D], parameters uint8 [B, Hkv, n, 2 · groups · P · size])."""
    groups, dim, top = side.groups, side.fmt.head_dim, float(side.fmt.classes[0][1] - 1)
    grouped = g.op(
        "Reshape", x, g.op("Concat", g.op("Shape", x, end=4), g.ints(groups, dim // groups), axis=0)
    )
    low = g.op("ReduceMin", grouped, g.ints(5), keepdims=0)
    high = g.op("ReduceMax", grouped, g.ints(5), keepdims=0)
    if clip is not None:
        low, high = g.op("Mul", low, clip), g.op("Mul", high, clip)
    span = g.op("Div", g.op("Sub", high, low), g.number(top))
    pair = g.op(
        "Concat", *(g.op("Unsqueeze", t, g.ints(5)) for t in (low, span)), axis=5
    )  # [B, Hkv, n, P, G, 2]
    data, pair = _store(side, g, g.reshape(pair, 0, 0, 0, 0, 2 * groups))
    ends = g.op(
        "Reshape", pair, g.op("Concat", g.op("Shape", pair, end=4), g.ints(groups, 2), axis=0)
    )
    minimum, scale = (g.slice(ends, 5, i, i + 1) for i in (0, 1))
    u = g.op("Div", g.op("Sub", grouped, minimum), g.op("Max", scale, g.number(TINY)))
    codes = g.clamp(g.op("Round", u), g.number(0.0), g.number(top))
    return g.op("Reshape", codes, g.op("Shape", x)), data


def _store(side: Side, g: Graph, values: str) -> tuple[str, str]:
    """Parameters [B, Hkv, n, P, p] → (bytes in the order of words [B, Hkv, n, p · P · size],
    rounded parameters)."""
    count, size = side.fmt.num_params, side.fmt.param_nbytes
    if size == 2:
        rounded = _rounded(side, g, values)
        data = _float16_bytes(side, g, rounded)  # [..., p, 2]
    else:
        data = _e4m3_bytes(side, g, values)
        rounded = _from_e4m3(g, data)
    data = g.reshape(data, 0, 0, 0, FIELDS, side.rows, count, size)
    return g.reshape(
        g.transpose(data, 0, 1, 2, 5, 4, 3, 6), 0, 0, 0, count * side.page * size
    ), rounded


def _rounded(side: Side, g: Graph, values: str) -> str:
    """float32 parameters as their stored type has them."""
    if side.fmt.param_nbytes == 2:
        return g.cast(g.half(values), FLOAT)
    return _from_e4m3(g, _e4m3_bytes(side, g, values))


def _from_e4m3(g: Graph, data: str) -> str:
    return g.op("Gather", g.array(np.nan_to_num(e4m3_values())), g.cast(data, INT32))


def _negative(side: Side, g: Graph, x: str) -> str:
    """1 where the sign bit is set, −0 included, else 0."""
    return g.cast(g.op("Less", g.op("Div", g.number(1.0), x), g.number(0.0)), FLOAT)


def _e4m3_bytes(side: Side, g: Graph, x: str) -> str:
    reached = g.op(
        "GreaterOrEqual", g.op("Unsqueeze", g.op("Abs", x), g.ints(-1)), g.array(e4m3_thresholds())
    )
    code = g.total(g.cast(reached, FLOAT), -1)
    return g.cast(g.op("Add", code, g.op("Mul", _negative(side, g, x), g.number(128.0))), UINT8)


def _float16_bytes(side: Side, g: Graph, x: str) -> str:
    """float32 → the two bytes of its float16, saturating: uint8 [..., 2]. Arithmetic on exact
    numbers, for want of a bit cast."""
    x = g.cast(g.half(x), FLOAT)
    size = g.op("Abs", x)
    bounds = g.array(2.0 ** np.arange(-14, 16))
    exponent = g.total(
        g.cast(g.op("GreaterOrEqual", g.op("Unsqueeze", size, g.ints(-1)), bounds), FLOAT), -1
    )  # 0 … 30
    unit = g.op(
        "Gather", g.array(2.0 ** (25 - np.maximum(np.arange(31), 1))), g.cast(exponent, INT32)
    )
    whole = g.op("Mul", g.op("Relu", g.op("Sub", exponent, g.number(1.0))), g.number(1024.0))
    word = g.op(
        "Add",
        g.op("Add", whole, g.op("Mul", size, unit)),
        g.op("Mul", _negative(side, g, x), g.number(32768.0)),
    )
    high = g.op("Floor", g.op("Mul", word, g.number(1 / 256)))
    low = g.op("Sub", word, g.op("Mul", high, g.number(256.0)))
    return g.cast(
        g.op("Concat", *(g.op("Unsqueeze", t, g.ints(-1)) for t in (low, high)), axis=-1), UINT8
    )


def _pack_plane(side: Side, g: Graph, codes: str, n: int, width: int) -> str:
    """Codes [B, Hkv, n, P, channels] < 2**width → uint8 [B, Hkv, n, bytes]; see bits.pack_plane."""
    rows, nbytes = side.rows, side.page * n * width // 8
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


def _pack_trits(side: Side, g: Graph, codes: str, n: int) -> list[str]:
    """Codes [B, Hkv, n, P, channels] → the parts of a ternary plane, uint8 [B, Hkv, n, bytes];
    see trits.pack_trits."""
    rows, tiles = side.rows, n // TRIT_CHANNELS
    whole, left = trit_parts(n)
    fields = g.reshape(codes, 0, 0, 0, FIELDS, rows, tiles, TRIT_CHANNELS)
    numbered = g.reshape(
        g.transpose(fields, 0, 1, 2, 5, 3, 4, 6), 0, 0, 0, tiles * FIELDS, rows, TRIT_CHANNELS
    )
    first = g.reshape(
        g.slice(numbered, 3, 0, TRITS_PER_BYTE * whole),
        0,
        0,
        0,
        whole,
        TRITS_PER_BYTE,
        rows * TRIT_CHANNELS,
    )
    value = g.cast(
        g.total(g.op("Mul", first, g.array([[81.0], [27.0], [9.0], [3.0], [1.0]])), 4), INT32
    )
    scaled = g.op("Add", g.op("Mul", value, g.array(256, np.int32)), g.array(242, np.int32))
    halves = [
        g.cast(g.op("Div", scaled, g.array(243, np.int32)), FLOAT)
    ]  # [B, Hkv, n, whole, R · 16]
    rest = ""
    if left:
        last = g.reshape(
            g.slice(numbered, 3, TRITS_PER_BYTE * whole), 0, 0, 0, left, rows * TRIT_CHANNELS
        )
        rest = g.total(g.op("Mul", last, g.array(4.0 ** np.arange(left)[:, None])), 3, keep=True)
    if left > 2:
        halves.append(rest)
    data, count, parts = g.concat(halves, 3), whole + (left > 2), []
    if count > 1:
        pairs = g.reshape(
            g.slice(data, 3, 0, count // 2 * 2), 0, 0, 0, count // 2, 2, rows * TRIT_CHANNELS
        )
        parts.append(
            g.reshape(
                g.transpose(pairs, 0, 1, 2, 3, 5, 4), 0, 0, 0, count // 2 * rows * TRIT_CHANNELS * 2
            )
        )
    if count % 2:
        padded = _pad_rows(side, g, g.slice(data, 3, count - 1), 2)  # [B, Hkv, n, rows / 2, 2, 16]
        parts.append(
            g.reshape(
                g.transpose(padded, 0, 1, 2, 3, 5, 4), 0, 0, 0, -(-rows // 2) * TRIT_CHANNELS * 2
            )
        )
    if 0 < left <= 2:
        padded = _pad_rows(side, g, rest, 4)
        byte = g.reshape(padded, 0, 0, 0, -(-rows // 4), 2, 2, TRIT_CHANNELS)
        byte = g.total(
            g.op("Mul", byte, g.array([[1.0], [16.0]])), 5
        )  # [B, Hkv, n, lines, byte, 16]
        parts.append(
            g.reshape(
                g.transpose(byte, 0, 1, 2, 3, 5, 4), 0, 0, 0, -(-rows // 4) * TRIT_CHANNELS * 2
            )
        )
    return [g.cast(part, UINT8) for part in parts]


def _pad_rows(side: Side, g: Graph, data: str, multiple: int) -> str:
    """[B, Hkv, n, 1, R · 16] → [B, Hkv, n, rows / multiple, multiple, 16], with zeros behind the
    last row."""
    size = -(-side.rows // multiple)
    flat = g.reshape(data, 0, 0, 0, side.rows * TRIT_CHANNELS)
    extra = (size * multiple - side.rows) * TRIT_CHANNELS
    if extra:
        flat = g.op("Pad", flat, g.ints(0, 0, 0, 0, 0, 0, 0, extra), g.number(0.0))
    return g.reshape(flat, 0, 0, 0, size, multiple, TRIT_CHANNELS)
