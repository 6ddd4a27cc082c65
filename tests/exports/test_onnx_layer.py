"""The cache's ONNX nodes against the reference: bytes of pages, and attention over them, without a
model around it."""

from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
import torch

if absent := [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]:
    pytest.skip(f"{absent[0]} is missing: pip install 'kvfold[onnx]'", allow_module_level=True)

import onnx
import onnxruntime as ort
from onnx import helper

from kvfold.exports.account import Geometry
from kvfold.exports.onnx.attention import Call, PackedAttention, packed_tensors, raw_tensors
from kvfold.exports.onnx.codec import Side, e4m3_values
from kvfold.exports.onnx.encode import e4m3_thresholds
from kvfold.exports.onnx.encode import encode as encode_nodes
from kvfold.exports.onnx.gqa import GqaAttention, UniformCodec, gqa_tensors
from kvfold.exports.onnx.graph import (
    FLOAT,
    FLOAT16,
    INT64,
    IR_VERSION,
    OPSET,
    UINT8,
    Constants,
    Graph,
)
from kvfold.exports.onnx.key_mean import TurningMean
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec, clip_rows
from kvfold.kernels.attention import attend_plain
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.kernels.key_mean import turn_tables
from kvfold.kernels.quantizer import decode, encode
from kvfold.runtime.cache.layer import PackedLayer
from kvfold.runtime.cache.shared import SharedState

HEADS, GROUP, DIM = 2, 2, 32
QUERY_HEADS = HEADS * GROUP
value_info = helper.make_tensor_value_info


@pytest.fixture(autouse=True)
def _denormals():
    """The command line flushes them, and other tests run it in this process; a row of zeros is
    coded by dividing by one."""
    torch.set_flush_denormal(False)


def session(nodes, constants, inputs, outputs, contrib=False):
    graph = helper.make_graph(
        nodes, "g", inputs, outputs, initializer=list(constants.tensors.values())
    )
    opsets = [
        helper.make_opsetid("", OPSET),
        *([helper.make_opsetid("com.microsoft", 1)] if contrib else []),
    ]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=not contrib)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


# -- pages

FORMATS = [
    raw16(DIM), uniform(DIM, 2), uniform(DIM, 3), uniform(DIM, 4, "e4m3", 8), uniform(DIM, 8),
    uniform(DIM, 16, "fp16", 16), uniform(DIM, 32), uniform(DIM, 64), uniform(DIM, 256, "fp16"), Format(((DIM, 3),)),
    Format(((DIM, 256),), "scale", "fp16"),
    Format(((8, 16), (24, 4))), Format(((8, 64), (8, 2), (16, 0))), Format(((8, 0), (8, 8), (8, 0), (8, 32))),
    Format(((DIM, 2),)),
]  # fmt: skip
# trits of 16, 48 and 64 channels leave 3, 4 and 2 codes over
WIDE = [
    Format(((n, 3),), params, "e4m3") for n in (16, 48, 64) for params in ("scale", "scale_min")
]


def awkward(batch: int, tokens: int, dim: int) -> torch.Tensor:
    """float16 [batch, HEADS, tokens, dim]: ordinary rows, large ones, zeros, one far below a
    scale's least number."""
    x = torch.randn(batch, HEADS, tokens, dim, generator=torch.Generator().manual_seed(dim))
    x *= torch.tensor([1.0, 300.0])[:, None, None]
    x[0, 0, 3] = 0
    x[0, 0, 4] *= 1e-6
    x[0, 1, 5, 0] = 60000
    return x.half()


@pytest.mark.parametrize("page", [8, 24, 32])
@pytest.mark.parametrize("fmt", [*FORMATS, *WIDE], ids=str)
def test_pages_byte_for_byte(fmt, page):
    dim = fmt.head_dim
    side, clipped = Side(fmt, HEADS, page), fmt.params == "scale_min"
    x = awkward(2, 3 * page, dim)
    clip = (
        torch.linspace(0.7, 1, HEADS * fmt.num_groups).reshape(HEADS, fmt.num_groups)
        if clipped
        else None
    )
    blocks = x.unflatten(2, (3, page)).transpose(1, 2)
    expected = encode(blocks, fmt, clip_rows(clip))

    g = Graph(Constants())
    factor = None if clip is None else g.array(clip.numpy().reshape(HEADS, 1, 1, -1))
    packed = encode_nodes(side, g, "x", factor)
    run = session(
        g.nodes,
        g.constants,
        [value_info("x", FLOAT16, ["b", HEADS, "t", dim])],
        [value_info(packed, UINT8, ["b", "n", "y"])],
    )
    (got,) = run.run(None, {"x": x.numpy()})
    np.testing.assert_array_equal(got, expected.flatten(2).numpy())

    g = Graph(Constants())
    names = [name for name in side.decode(g, "p") if name]
    outputs = [
        value_info(name, FLOAT, [f"d{i}{k}" for k in range(5 - (i == 0))])
        for i, name in enumerate(names)
    ]
    run = session(g.nodes, g.constants, [value_info("p", UINT8, ["b", "n", side.nbytes])], outputs)
    codes, *params = (torch.from_numpy(x) for x in run.run(None, {"p": got}))
    back = torch.zeros(2, HEADS, dim, 3, page)
    source = 0
    for first, end in side.coded:
        back[:, :, first:end] = codes.unflatten(-1, (3, page))[:, :, source : source + end - first]
        source += end - first
    back = back[..., np.argsort(side.tokens)].unflatten(2, (side.groups, -1))
    by_token = [p[..., np.argsort(side.words)].unsqueeze(3) for p in params]
    if by_token:
        back = back * by_token[0]
    if len(by_token) > 1:
        back = back + by_token[1]
    expected = decode(expected, fmt, page).permute(0, 2, 4, 1, 3)
    torch.testing.assert_close(
        back.flatten(2, 3), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())
    )


def test_e4m3_rounding_is_torchs():
    """Every value, every point halfway between two, and their neighbours."""
    values = e4m3_values()[:127]
    middle = (values[1:] + values[:-1]) / 2
    x = np.concatenate(
        [values, middle, np.nextafter(middle, np.float32(1e9)), np.nextafter(middle, np.float32(0))]
    )
    codes = (x[:, None] >= e4m3_thresholds()).sum(1)
    expected = torch.from_numpy(x).clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(codes, expected)


# -- attention


FREQUENCIES = tuple(
    50.0 ** (-i / 12) for i in range(12)
)  # of 24 channels; RoPE leaves the other 8 alone


def spec_of(key, value, transformed=False, clip=False, frequencies=None):
    generator = torch.Generator().manual_seed(5)
    matrix = (
        torch.randn(HEADS, DIM, DIM, generator=generator) * 0.1 + torch.eye(DIM)
        if transformed
        else None
    )
    offset = torch.randn(HEADS, DIM, generator=generator) if transformed or frequencies else None
    clips = (
        torch.tensor([0.9, 0.8])[:, None].expand(HEADS, key.num_groups).contiguous()
        if clip
        else None
    )
    return LayerSpec(KeySpec(key, (), matrix, offset, clips, frequencies), ValueSpec(value))


MIXED = Format(((8, 16), (8, 4), (8, 2), (8, 0)))
CASES = {  # name → spec, (sinks, window, page), softcap, sliding, sink logits
    "mixed keys, trits": (spec_of(MIXED, uniform(DIM, 3)), (5, 20, 16), None, 0, False),
    "transformed": (spec_of(MIXED, uniform(DIM, 4, "e4m3", 8), True), (3, 24, 8), None, 0, False),
    "groups and clips": (
        spec_of(uniform(DIM, 16, "fp16", 8), raw16(DIM), clip=True),
        (1, 9, 24),
        None,
        0,
        False,
    ),
    "16-bit keys": (spec_of(raw16(DIM), Format(((16, 4), (16, 0)))), (4, 16, 16), None, 0, False),
    "no sinks, no window": (
        spec_of(Format(((DIM, 4),)), uniform(DIM, 256)),
        (0, 0, 8),
        None,
        0,
        False,
    ),
    "sliding": (spec_of(MIXED, Format(((DIM, 64),))), (2, 10, 8), None, 30, False),
    "sliding within the window": (spec_of(MIXED, uniform(DIM, 3)), (2, 40, 8), None, 12, False),
    "soft-cap": (spec_of(MIXED, uniform(DIM, 8), True), (3, 16, 16), 5.0, 40, False),
    "sink logits": (spec_of(MIXED, uniform(DIM, 8), True), (3, 16, 16), None, 25, True),
    "rotating mean": (
        spec_of(raw16(DIM), raw16(DIM), frequencies=FREQUENCIES),
        (3, 24, 8),
        None,
        0,
        False,
    ),
    "rotating mean, trits": (
        spec_of(MIXED, uniform(DIM, 3), True, frequencies=FREQUENCIES),
        (0, 20, 16),
        None,
        0,
        False,
    ),
    "rotating mean, soft-cap": (
        spec_of(raw16(DIM), uniform(DIM, 8), frequencies=FREQUENCIES[::-1]),
        (5, 16, 32),
        5.0,
        40,
        False,
    ),
    "rotating mean, sink logits": (
        spec_of(raw16(DIM), uniform(DIM, 8), frequencies=FREQUENCIES[:3]),
        (3, 0, 8),
        None,
        25,
        True,
    ),
}
SPLITS = {
    "prompt": [117],
    "tokens": [1] * 75,
    "chunks": [30, 2, 41, 1, 1, 1, 13],
    "grows out of the window": [9, *[1] * 60, 7],
}


def layer_session(writer, call, tensors, sink, contrib=False):
    """A session with one layer: query, key, value and the cache."""
    shapes = {"query": QUERY_HEADS, "key": HEADS, "value": HEADS}
    inputs = [value_info(n, FLOAT, ["b", heads, "t", DIM]) for n, heads in shapes.items()]
    inputs += [
        value_info(f"past.{t.name}", t.dtype, [str(d) if isinstance(d, str) else d for d in t.dims])
        for t in tensors
    ]
    inputs += [value_info("sink", FLOAT, [QUERY_HEADS])] if sink else []
    constants = Constants()
    graph, names = writer.write(constants, call, [i.name for i in inputs])
    outputs = [value_info(names[0], FLOAT, ["b", "t", QUERY_HEADS, DIM])]
    outputs += [
        value_info(n, t.dtype, [f"new_{d}" if isinstance(d, str) else d for d in t.dims])
        for n, t in zip(names[1:], tensors, strict=True)
    ]
    return session(graph.nodes, constants, inputs, outputs, contrib)


def random_states(tokens: int):
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, QUERY_HEADS, tokens, DIM, generator=generator)
    key, value = (torch.randn(2, HEADS, tokens, DIM, generator=generator) for _ in range(2))
    return query, key * torch.logspace(1, -1, DIM), value


def run_layer(sessions, cache, states, split, feeds):
    """Outputs [B, T, H, D] of the parts of a split, and the cache after them."""
    outs = []
    for first, end in pairwise(np.cumsum([0, *split])):
        part = {
            n: x[:, :, first:end].contiguous().numpy()
            for n, x in zip(("query", "key", "value"), states, strict=True)
        }
        out, *cache_list = sessions[end - first == 1].run(None, {**part, **cache, **feeds})
        cache = dict(zip(cache, cache_list, strict=True))
        outs.append(out)
    return np.concatenate(outs, 1), cache


def empty(tensors, batch=2):
    types = {FLOAT16: np.float16, UINT8: np.uint8}
    return {
        f"past.{t.name}": np.zeros(
            [batch if d == "batch" else 0 if isinstance(d, str) else d for d in t.dims],
            types.get(t.dtype, np.int8),
        )
        for t in tensors
    }


def assert_close_but_for_turned_codes(got, expected, product):
    """Within 2e-3; with a matrix, whose products another processor rounds otherwise, a code may
    turn: then one number in 5000 may be 4e-3 off."""
    if product:
        off = (got - expected).abs() > 2e-3 + 2e-3 * expected.abs()
        assert int(off.sum()) <= got.numel() // 5000
        got = torch.where(off & ((got - expected).abs() < 4e-3), expected, got)
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("case", CASES)
def test_layer_is_the_runtimes(case):
    """Whatever the split into calls: the runtime's output, its 16-bit rows and its pages, byte for
    byte where keys have neither matrix nor mean (a product's last bit depends on the library that
    computes it)."""
    spec, sizes, softcap, sliding, has_sink = CASES[case]
    geometry = Geometry(HEADS, DIM, *sizes)
    call = Call(0, QUERY_HEADS, 0.3, softcap, sliding)
    sink = torch.linspace(-1, 2, QUERY_HEADS) if has_sink else None
    tensors = packed_tensors(geometry, spec)
    sessions = {
        single: layer_session(PackedAttention(geometry, [spec], single), call, tensors, has_sink)
        for single in (False, True)
    }
    for split in SPLITS.values():
        states = random_states(sum(split))
        got, cache = run_layer(
            sessions, empty(tensors), states, split, {"sink": sink.numpy()} if has_sink else {}
        )
        layer = PackedLayer([spec], SharedState(geometry), 0)
        expected = []
        for first, end in pairwise(np.cumsum([0, *split])):
            query, key, value = (x[:, :, first:end] for x in states)
            view, _ = layer.update(key, value)
            mask = None
            if sliding:
                seen, at = torch.arange(end), torch.arange(first, end)[:, None]
                mask = ((seen <= at) & (seen > at - sliding))[None, None].expand(2, 1, -1, -1)
            expected.append(
                view.attend(query, call.scaling, mask, softcap, sink, sliding).transpose(1, 2)
            )
        assert_close_but_for_turned_codes(
            torch.from_numpy(got), torch.cat(expected, 1), spec.key.matrix is not None
        )
        tokens = sum(split)
        assert cache["past.pages"].shape[1] == geometry.num_pages(tokens) > 0
        held = [
            *range(geometry.sinks),
            *range(geometry.sinks + geometry.num_pages(tokens) * geometry.page_tokens, tokens),
        ]
        for b in range(2):
            pages = layer.table.pool.load(layer.table.pages()[b]).numpy()
            slots = torch.tensor(
                [
                    s
                    if s < geometry.sinks
                    else geometry.sinks + (s - geometry.sinks) % geometry.ring
                    for s in held
                ]
            )
            rows = [raw[b][:, slots].numpy() for raw in (layer.window.keys, layer.window.values)]
            if spec.key.offset is None:
                np.testing.assert_array_equal(cache["past.pages"][b], pages)
                np.testing.assert_array_equal(cache["past.key_rows"][b], rows[0])
            else:
                assert (cache["past.pages"][b] != pages).mean() < 1e-3
                np.testing.assert_allclose(cache["past.key_rows"][b], rows[0], rtol=2e-3, atol=2e-3)
            np.testing.assert_array_equal(cache["past.value_rows"][b], rows[1])


@pytest.mark.parametrize("sinks", [0, 64])
@pytest.mark.parametrize("start", [0, 63, 70000])
@pytest.mark.parametrize(
    "frequencies", [FREQUENCIES, FREQUENCIES[:1], tuple(10000 ** (-i / 16) for i in range(16))]
)
def test_rotating_mean(frequencies, start, sinks):
    """To float32's rounding what the definition in torch makes, far from the first token too."""
    tables = turn_tables(frequencies, DIM, sinks, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    offset = 10 * torch.randn(HEADS, DIM, generator=generator)
    key, query = (torch.randn(2, HEADS, n, DIM, generator=generator) for n in (301, 5))
    g = Graph(Constants())
    writer = TurningMean(tables)
    rest = writer.subtract(g, "key", offset, "positions")
    lacking = writer.logits(g, "query", offset, "places")
    states = [value_info(n, FLOAT, ["b", HEADS, f"t_{n}", DIM]) for n in ("key", "query")]
    numbers = [value_info("positions", INT64, ["n"]), value_info("places", INT64, ["all"])]
    outputs = [
        value_info(rest, FLOAT, ["b", HEADS, "t", DIM]),
        value_info(lacking, FLOAT, ["b", HEADS, "q", "all"]),
    ]
    positions = torch.arange(start, start + key.shape[2])
    places = torch.arange(start + key.shape[2]).flip(0)
    feeds = {"key": key, "query": query, "positions": positions, "places": places}
    run = session(g.nodes, g.constants, [*states, *numbers], outputs)
    rest, lacking = (
        torch.from_numpy(x) for x in run.run(None, {name: x.numpy() for name, x in feeds.items()})
    )
    expected = tables.mean(offset, positions)
    torch.testing.assert_close(
        key - rest, expected.expand_as(key), rtol=0, atol=1e-5 * float(offset.abs().max())
    )
    assert not sinks or not expected[:, : max(0, sinks - start)].any()
    lacking = lacking.flip(-1)
    exact = query.double() @ expected.double().mT
    size = float(exact.abs().max())
    torch.testing.assert_close(lacking[..., start:].double(), exact, rtol=0, atol=1e-5 * size)
    for b in range(2):
        wanted = tables.logits(tables.coefficients(offset, query[b]), places.flip(0))
        torch.testing.assert_close(lacking[b], wanted, rtol=0, atol=1e-5 * size)


def test_rotating_mean_is_written_once_for_all_layers():
    """Turns are looked up once for each set of frequencies, not in every layer."""
    specs = [
        spec_of(raw16(DIM), raw16(DIM), frequencies=f)
        for f in (FREQUENCIES, FREQUENCIES, FREQUENCIES[:2])
    ]
    writer, constants = PackedAttention(Geometry(HEADS, DIM, 3, 24, 8), specs, True), Constants()
    names = ["query", "key", "value", "pages", "key_rows", "value_rows"]
    graphs = [writer.write(constants, Call(i, QUERY_HEADS, 0.3), names)[0] for i in range(3)]
    ranges = [sum(node.op_type == "Range" for node in graph.nodes) for graph in graphs]
    assert ranges[0] > 0 and ranges[1:] == [0, 0] and len(writer.means) == 2
    looked_up = [sum(node.op_type == "Gather" for node in graph.nodes) for graph in graphs]
    assert looked_up[0] == looked_up[2] > looked_up[1]


@pytest.mark.parametrize("sliding", [0, 25])
def test_16bit_layer(sliding):
    geometry = Geometry(HEADS, DIM, 1, 1, 8)
    call = Call(0, QUERY_HEADS, 0.3, None, sliding)
    tensors = raw_tensors(geometry)
    sessions = {
        s: layer_session(PackedAttention(geometry, None, s), call, tensors, False)
        for s in (False, True)
    }
    query, key, value = random_states(70)
    key, value = key.half().float(), value.half().float()
    at = torch.arange(70)
    mask = at <= at[:, None]
    if sliding:
        mask = mask & (at > at[:, None] - sliding)
    expected = attend_plain(query, key, value, 0.3, mask[None, None]).transpose(1, 2).numpy()
    for split in ([70], [1] * 70, [40, 1, 29]):
        got, _ = run_layer(sessions, empty(tensors), (query, key, value), split, {})
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "softcap,sliding,sink", [(None, 0, False), (None, 25, False), (5.0, 0, False), (None, 25, True)]
)
def test_gqa_layer(bits, offset, softcap, sliding, sink):
    """onnxruntime's operator stores and reads what UniformCodec says."""
    call = Call(0, QUERY_HEADS, 0.3, softcap, sliding)
    query, key, value = random_states(70)

    def codec(x, shifted):
        scale = x.abs().amax((0, 2)) / (2 ** (bits - 1) - 1)
        return UniformCodec(bits, scale, x.mean((0, 2)) if shifted else None)

    logits = torch.linspace(-1, 2, QUERY_HEADS) if sink else None
    codecs = (
        codec(key, offset and softcap is None and not sink),
        codec(value, offset and not sink),
    )
    tensors = gqa_tensors(bits, HEADS, DIM)
    run = layer_session(GqaAttention([codecs]), call, tensors, sink, contrib=True)
    at = torch.arange(70)
    mask = at <= at[:, None]
    if sliding:
        mask = mask & (at > at[:, None] - sliding)
    stored = [c.round_trip(x) for c, x in zip(codecs, (key, value), strict=True)]
    expected = (
        attend_plain(query, *stored, 0.3, mask[None, None], softcap, logits).transpose(1, 2).numpy()
    )
    for split in ([70], [40, *[1] * 30]):
        feeds = {"sink": logits.numpy()} if sink else {}
        got, cache = run_layer(
            {False: run, True: run}, empty(tensors), (query, key, value), split, feeds
        )
        np.testing.assert_allclose(got, expected, atol=1e-4)
        codes = (
            cache["past.key"]
            if bits == 8
            else np.stack([cache["past.key"] & 15, cache["past.key"] >> 4], -1).reshape(
                2, HEADS, 70, DIM
            )
        )
        shift = 0 if codecs[0].offset is None else codecs[0].offset[:, None]
        half = 2 ** (bits - 1)
        wanted = ((key - shift) / codecs[0].scale[:, None]).round().clamp(-half, half - 1)
        np.testing.assert_array_equal(codes.astype(int) - (8 if bits == 4 else 0), wanted)
