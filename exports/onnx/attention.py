"""One layer of the packed cache as ONNX nodes: append, pack what leaves the window, attend. See
kernels/attention.py for the rule of who reads what, and FORMAT.md for the bytes of a page.

The cache of a layer is three tensors, all sequences of a batch equally long:

    pages     uint8 [B, n, bytes of a page]      keys of each KV head, then values of each, as the
    runtime packs them key_rows, value_rows     float16 [B, Hkv, R, D]      the sinks, then all
    tokens behind the last page
"""

from dataclasses import dataclass, field

import numpy as np

from kvfold.exports.account import Geometry
from kvfold.exports.onnx.codec import Side, word_order
from kvfold.exports.onnx.encode import encode
from kvfold.exports.onnx.graph import FLOAT, FLOAT16, UINT8, Constants, Graph
from kvfold.exports.onnx.key_mean import TurningMean
from kvfold.exports.spec import KeySpec, LayerSpec


@dataclass(frozen=True)
class Call:
    """What a layer's attention was called with, besides tensors.

    Attributes:
        index: of the layer.
        num_heads: of the queries.
        scaling: factor on the logits.
        softcap: logits become softcap · tanh(logits / softcap); None for none.
        sliding: tokens that a query sees at the most; 0 for all.
    """

    index: int
    num_heads: int
    scaling: float
    softcap: float | None = None
    sliding: int = 0


@dataclass(frozen=True)
class CacheTensor:
    """A tensor of one layer's cache: its name's last part, its ONNX type, and its dimensions, free
    ones by name."""

    name: str
    dtype: int
    dims: tuple[str | int, ...]


@dataclass
class Sizes:
    """Names of int64 [1] tensors that all layers of a graph share."""

    packed: str  # tokens in pages, after this call
    pages: str  # after this call
    new_pages: str
    due: str  # bool [1]: there are new pages
    queries: str  # int64 [T]: positions of this call's tokens
    page_places: str  # int64 [n·P]: positions of tokens in pages, in the order of words
    row_places: str  # int64 [R]: positions of the rows that attention reads
    places: str  # both
    late: str  # bool [R]: which rows are no sinks
    masks: dict[int, str] = field(default_factory=dict)  # sliding → what each query reads


def raw_tensors(geometry: Geometry) -> list[CacheTensor]:
    """The 16-bit cache of one layer: float16 [B, Hkv, L, D] of keys and of values."""
    dims = ("batch", geometry.num_kv_heads, "past", geometry.head_dim)
    return [CacheTensor(name, FLOAT16, dims) for name in ("key", "value")]


def packed_tensors(geometry: Geometry, spec: LayerSpec) -> list[CacheTensor]:
    """The packed cache of one layer."""
    nbytes = geometry.page_nbytes(spec.key.format) + geometry.page_nbytes(spec.value.format)
    dims = ("batch", geometry.num_kv_heads, "rows", geometry.head_dim)
    rows = [CacheTensor(name, FLOAT16, dims) for name in ("key_rows", "value_rows")]
    return [CacheTensor("pages", UINT8, ("batch", "pages", nbytes)), *rows]


class PackedAttention:
    """Writes the layers of one graph.

    Args:
        geometry: sinks, window, page length and heads that the graph's cache tensors have.
        specs: one LayerSpec a layer; None for the 16-bit cache, which has rows only.
        single: the graph is for one new token at a time.
    """

    def __init__(self, geometry: Geometry, specs: list[LayerSpec] | None, single: bool) -> None:
        self.geometry, self.specs, self.single = geometry, specs, single
        self.sizes: Sizes | None = None
        self.means: dict[tuple[float, ...], TurningMean] = {}

    def write(
        self, constants: Constants, call: Call, tensors: list[str]
    ) -> tuple[Graph, list[str]]:
        """Nodes of one layer.

        Args:
            tensors: query [B, H, T, D], key and value [B, Hkv, T, D], float32; the layer's cache; a
                sink logit for each head where the model has them, [H].
        Returns:
            The nodes, and (output [B, T, H, D], the cache with the new tokens in it).
        """
        g = Graph(constants)
        query, key, value, *cache = tensors
        spec = self.specs[call.index] if self.specs else None
        sinks_logit = cache.pop() if len(cache) > (3 if spec else 2) else None
        dim = self.geometry.head_dim
        past = cache[-2:]
        self.sizes = self.sizes or self._sizes(g, key, past[0], cache[0] if spec else None)
        grouped = g.reshape(query, 0, self.geometry.num_kv_heads, -1, dim)  # [B, Hkv, G·T, D]
        query = g.op("Mul", grouped, g.number(call.scaling))
        shift = None
        if spec and spec.key.offset is not None:
            key, shift = self._take_mean(g, call, spec.key, query, key, sinks_logit)
        if spec and spec.key.matrix is not None:
            key = g.op("MatMul", key, g.array(spec.key.matrix.mT.numpy()))
        if spec and spec.key.query_matrix is not None:
            query = g.op("MatMul", query, g.array(spec.key.query_matrix.numpy()))
        raw = [g.concat([old, g.half(new)], 2) for old, new in zip(past, (key, value), strict=True)]
        if spec is None:
            out = self._attend(g, call, query, None, None, raw, sinks_logit, shift)
            return g, [out, *raw]
        sides = (
            Side(spec.key.format, self.geometry.num_kv_heads, self.geometry.page_tokens),
            Side(spec.value.format, self.geometry.num_kv_heads, self.geometry.page_tokens),
        )
        pages, *kept = self._pack(g, spec, sides, cache[0], raw)
        out = self._attend(
            g, call, query, sides, pages, kept if self.single else raw, sinks_logit, shift
        )
        return g, [out, pages, *kept]

    def _sizes(self, g: Graph, key: str, past: str, pages: str | None) -> Sizes:
        geo, new = self.geometry, g.size(key, 2)
        rows = g.op("Add", g.size(past, 2), new)
        if pages is None:
            places, queries = _count(g, g.ints(0), rows), _count(g, g.size(past, 2), rows)
            return Sizes(g.ints(0), "", "", "", queries, "", places, places, "")
        before = g.op("Mul", g.size(pages, 1), g.ints(geo.page_tokens))
        total = g.op("Add", rows, before)
        seen = g.op("Sub", total, g.ints(geo.sinks + geo.window))
        count = g.op("Div", g.op("Max", seen, g.ints(0)), g.ints(geo.page_tokens))
        packed = g.op("Mul", count, g.ints(geo.page_tokens))
        new_pages = g.op("Sub", count, g.size(pages, 1))
        first = g.op(
            "Unsqueeze",
            g.op("Mul", _count(g, g.ints(0), count), g.ints(geo.page_tokens)),
            g.ints(1),
        )
        page_places = g.reshape(
            g.op("Add", first, g.ints(*(word_order(geo.page_tokens) + geo.sinks))), -1
        )
        base = (
            packed if self.single else before
        )  # tokens in pages that lie between the sinks and other rows
        place = _count(g, g.ints(0), g.op("Sub", total, base))
        late = g.op("GreaterOrEqual", place, g.ints(geo.sinks))
        row_places = g.op("Where", late, g.op("Add", place, base), place)
        queries, places = (
            _count(g, g.op("Sub", total, new), total),
            g.concat([page_places, row_places], 0),
        )
        due = g.op("Greater", new_pages, g.ints(0))
        return Sizes(packed, count, new_pages, due, queries, page_places, row_places, places, late)

    def _take_mean(
        self, g: Graph, call: Call, spec: KeySpec, query: str, key: str, sinks_logit: str | None
    ) -> tuple[str, str | None]:
        """(keys without their mean, what every logit of the scaled queries [B, Hkv, G·T, D] lacks
        of it; None where softmax doesn't see that)."""
        assert self.sizes and spec.offset is not None
        if spec.frequencies is not None:
            if spec.frequencies not in self.means:
                self.means[spec.frequencies] = TurningMean(spec.tables(self.geometry.sinks))
            mean, sizes = self.means[spec.frequencies], self.sizes
            lacking = mean.logits(g, query, spec.offset, sizes.places)
            return mean.subtract(g, key, spec.offset, sizes.queries), lacking
        offset = g.array(spec.offset.numpy()[:, None])
        seen = call.softcap is not None or sinks_logit is not None
        shift = g.total(g.op("Mul", query, offset), -1, keep=True) if seen else None
        return g.op("Sub", key, offset), shift

    # -- append ------------------------------------------------------------------------------------

    def _pack(
        self, g: Graph, spec: LayerSpec, sides: tuple[Side, Side], pages: str, raw: list[str]
    ) -> list[str]:
        """Moves whole pages of the rows behind the sinks to `pages`, if any are due: (pages, key
        rows, value rows)."""
        assert self.sizes
        sinks = self.geometry.sinks
        then, other = Graph(g.constants), Graph(g.constants)
        leaving = then.op("Mul", self.sizes.new_pages, then.ints(self.geometry.page_tokens))
        cut = then.op("Add", leaving, then.ints(sinks))
        coded, kept = [], []
        for side, clip, rows in zip(sides, (spec.key.clip, spec.value.clip), raw, strict=True):
            factor = None if clip is None else then.array(clip.numpy().reshape(len(clip), 1, 1, -1))
            coded.append(encode(side, then, then.slice(rows, 2, sinks, cut), factor))
            tail = then.slice(rows, 2, cut)
            kept.append(then.concat([then.slice(rows, 2, 0, sinks), tail], 2) if sinks else tail)
        longer = then.concat([pages, then.concat(coded, 2)], 1)
        same = [other.op("Identity", t) for t in (pages, *raw)]
        return g.choose(self.sizes.due, (then, [longer, *kept]), (other, same))

    # -- attend ------------------------------------------------------------------------------------

    def _attend(
        self,
        g: Graph,
        call: Call,
        query: str,
        sides: tuple[Side, Side] | None,
        pages: str | None,
        raw: list[str],
        sinks_logit: str | None,
        shift: str | None,
    ) -> str:
        """Softmax attention of queries [B, Hkv, G·T, D], scaled and in the keys' basis → [B, T, H,
        D]."""
        assert self.sizes
        key_rows, value_rows = (g.cast(rows, FLOAT) for rows in raw)
        scores = [g.op("MatMul", query, g.transpose(key_rows, 0, 1, 3, 2))]
        if sides:
            split = sides[0].nbytes
            data = [g.slice(pages, 2, 0, split), g.slice(pages, 2, split)]  # type: ignore[arg-type]
            scores.insert(0, self._score(g, sides[0], query, data[0]))
        logits = g.concat(scores, 3)
        if shift is not None:
            logits = g.op("Add", logits, shift)
        if call.softcap is not None:
            logits = g.op(
                "Mul",
                g.op("Tanh", g.op("Mul", logits, g.number(1 / call.softcap))),
                g.number(call.softcap),
            )
        logits = self._visible(g, call, logits, bool(sides))
        if sinks_logit is not None:
            kv_heads = self.geometry.num_kv_heads
            grouped = g.op(
                "Reshape",
                logits,
                g.op(
                    "Concat",
                    g.ints(0, 0, call.num_heads // kv_heads, -1),
                    g.size(logits, 3),
                    axis=0,
                ),
            )
            column = g.reshape(sinks_logit, 1, kv_heads, -1, 1, 1)
            column = g.op(
                "Expand", column, g.op("Concat", g.op("Shape", grouped, end=4), g.ints(1), axis=0)
            )
            logits = g.concat([logits, g.reshape(column, 0, 0, -1, 1)], 3)
        weights = g.op("Softmax", logits, axis=-1)
        packed = self.sizes.packed
        end = g.op("Add", packed, g.size(raw[0], 2))  # a sink logit's column stands behind
        out = g.op("MatMul", g.slice(weights, 3, packed, end), value_rows)
        if sides:
            out = g.op("Add", out, self._sum(g, sides[1], g.slice(weights, 3, 0, packed), data[1]))
        return g.transpose(
            g.reshape(out, 0, call.num_heads, -1, self.geometry.head_dim), 0, 2, 1, 3
        )

    def _score(self, g: Graph, side: Side, query: str, packed: str) -> str:
        """Queries times packed keys: [B, Hkv, G·T, n·P], tokens in the order of words."""
        groups, page = side.groups, side.page
        codes, scale, minimum = side.decode(g, packed)
        own = g.concat([g.slice(query, 3, a, b) for a, b in side.coded], 3)
        channels = sum(b - a for a, b in side.coded) // groups
        own = g.transpose(
            g.reshape(own, 0, 0, 0, groups, channels), 0, 1, 3, 2, 4
        )  # [B, Hkv, groups, G·T, channels]
        scores = g.op("MatMul", own, g.reshape(codes, 0, 0, groups, channels, -1))
        scores = side.to_words(
            g, g.reshape(scores, 0, 0, 0, 0, -1, page)
        )  # [B, Hkv, groups, G·T, n, P]
        if scale is not None:
            scores = g.op("Mul", scores, g.op("Unsqueeze", scale, g.ints(3)))
        if minimum is not None:
            sums = g.op("Unsqueeze", g.total(own, -1, keep=True), g.ints(5))
            scores = g.op("Add", scores, g.op("Mul", sums, g.op("Unsqueeze", minimum, g.ints(3))))
        if groups > 1:
            scores = g.total(scores, 2, keep=True)
        return g.reshape(g.op("Squeeze", scores, g.ints(2)), 0, 0, 0, -1)

    def _sum(self, g: Graph, side: Side, weights: str, packed: str) -> str:
        """Packed values weighted: [B, Hkv, G·T, n·P], tokens in the order of words → [B, Hkv, G·T,
        D]."""
        groups, page, dim = side.groups, side.page, side.fmt.head_dim
        codes, scale, minimum = side.decode(g, packed)
        channels = sum(b - a for a, b in side.coded) // groups
        flat = g.op("Unsqueeze", weights, g.ints(2))  # [B, Hkv, 1, G·T, n·P]
        scaled = g.reshape(flat, 0, 0, 0, 0, -1, page)
        if scale is not None:
            scaled = g.op("Mul", scaled, g.op("Unsqueeze", scale, g.ints(3)))
        scaled = g.transpose(g.reshape(side.from_words(g, scaled), 0, 0, 0, 0, -1), 0, 1, 2, 4, 3)
        out = g.op(
            "MatMul", g.reshape(codes, 0, 0, groups, channels, -1), scaled
        )  # [B, Hkv, groups, channels, G·T]
        if minimum is not None:
            column = g.reshape(minimum, 0, 0, groups, -1, 1)
            out = g.op("Add", out, g.transpose(g.op("MatMul", flat, column), 0, 1, 2, 4, 3))
        # onnxruntime leaves a product over no tokens at all unwritten
        assert self.sizes
        some = g.op("Greater", self.sizes.pages, g.ints(0))
        out = g.op("Where", some, g.transpose(out, 0, 1, 4, 2, 3), g.number(0.0))
        out = g.reshape(out, 0, 0, 0, groups * channels)
        if groups * channels == dim:
            return out
        place = np.concatenate([np.eye(dim, dtype=np.float32)[a:b] for a, b in side.coded])
        return g.op("MatMul", out, g.array(place))  # channels without codes are zero

    # -- who sees what -----------------------------------------------------------------------------

    def _visible(self, g: Graph, call: Call, logits: str, packed: bool) -> str:
        """Logits with −inf where a query doesn't look.
        A single token looks at everything but what slid out of its window."""
        assert self.sizes
        if self.single and not call.sliding:
            return logits
        if call.sliding not in self.sizes.masks:
            self.sizes.masks[call.sliding] = self._mask(g, call.sliding, packed)
        seen = self.sizes.masks[call.sliding]
        groups = call.num_heads // self.geometry.num_kv_heads
        width = g.size(logits, 3)
        by_query = g.op("Reshape", logits, g.op("Concat", g.ints(0, 0, groups, -1), width, axis=0))
        masked = g.op("Where", seen, by_query, g.number(-np.inf))
        return g.op("Reshape", masked, g.op("Concat", g.ints(0, 0, -1), width, axis=0))

    def _mask(self, g: Graph, sliding: int, packed: bool) -> str:
        """bool [T, n·P + R]: which packed tokens and which rows each query reads."""
        assert self.sizes
        geo, sizes = self.geometry, self.sizes
        query = g.op("Unsqueeze", sizes.queries, g.ints(1))  # [T, 1]
        seen = g.op("LessOrEqual", sizes.row_places, query)
        if packed:
            whole = g.op("Max", g.op("Sub", query, g.ints(geo.sinks + geo.window - 1)), g.ints(0))
            whole = g.op(
                "Mul", g.op("Div", whole, g.ints(geo.page_tokens)), g.ints(geo.page_tokens)
            )
            limit = g.op("Add", whole, g.ints(geo.sinks))
            outside = g.op(
                "Or", g.op("Not", sizes.late), g.op("GreaterOrEqual", sizes.row_places, limit)
            )
            seen = g.op("And", seen, outside)
            seen = g.concat([g.op("Less", sizes.page_places, limit), seen], 1)
        if sliding:
            seen = g.op(
                "And", seen, g.op("Greater", sizes.places, g.op("Sub", query, g.ints(sliding)))
            )
        return seen


def _count(g: Graph, start: str, end: str) -> str:
    """int64 [end − start]: start … end − 1; both int64 [1]."""
    ends = [g.op("Squeeze", bound, g.ints(0)) for bound in (start, end)]
    return g.op("Range", *ends, g.array(1, np.int64))
