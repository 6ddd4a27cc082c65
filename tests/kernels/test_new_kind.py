"""A kind of code that no file of the product names (float4.py), from a recipe to the kernels."""

import prepared
import pytest
import torch

from kvfold.compress.recipe import KeyRecipe
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.onnx.codec import Side
from kvfold.exports.schema import FormatModel
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.codes import Codes, field_order
from kvfold.kernels.formats import Format, uniform
from kvfold.kernels.kinds import KINDS
from kvfold.kernels.quantizer import decode, encode
from kvfold.runtime.backends.choose import backend_of
from kvfold.runtime.budget.ladder import Ladders, ladder
from kvfold.runtime.cache.cache import QuantizedKVCache

pytest.importorskip("triton")
from float4 import SIZES, STEP, known
from lowered import lower
from test_triton_attention import DEVICE, Case, error
from test_triton_encode import Pages, rows_of
from test_triton_prompt import pages_of

from kvfold.kernels.gpu.encode import encode_pages
from kvfold.kernels.gpu.prompt import decode_pages
from kvfold.kernels.gpu.records import PageFormat
from kvfold.kernels.pages import page_address


@pytest.fixture(autouse=True)
def kind():
    with known() as found:
        yield found


def float4(head_dim: int, param_dtype: str = "e4m3") -> Format:
    return Format(((head_dim, 16),), "float4", param_dtype)


def test_it_is_known_while_it_is_registered():
    fmt = float4(64)
    assert str(fmt) == "64@4 float4 e4m3" and fmt.payload_bits == 4 + 8 / 64
    assert FormatModel(**fmt.to_dict()).build() == fmt
    with pytest.raises(KvfoldError, match="have 16 levels, not 8"):
        Format(((64, 8),), "float4")
    with pytest.raises(KvfoldError, match="no ONNX nodes for pages of '64@4 float4 e4m3'"):
        Side(fmt, 2, 32)
    assert KeyRecipe(params=("float4", "scale"), levels=(8, 16), bits=()).uniform_formats(64) == [
        Format(((64, 8),), "scale"), Format(((64, 16),), "scale"), float4(64),
        Format(((64, 16),), "scale", "fp16"), float4(64, "fp16"),
    ]  # fmt: skip


def test_it_is_refused_else():
    del KINDS["float4"]
    with pytest.raises(KvfoldError, match=r"params 'float4'.*use none, scale or scale_min"):
        float4(64)
    with pytest.raises(ValueError, match="params must be some of scale, scale_min"):
        KeyRecipe(params=("float4",), levels=(16,), bits=())


def test_numbers_come_back_as_the_nearest_of_the_grid(kind):
    x = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0))
    found = decode(encode(x, float4(64, "fp16")), float4(64, "fp16"), 32)
    tau = x.square().mean(-1, keepdim=True).sqrt().half().float()
    grid = torch.tensor([*SIZES, *(-size for size in SIZES)])
    nearest = grid[(x[..., None] / (tau[..., None] * STEP) - grid).abs().argmin(-1)] * tau * STEP
    torch.testing.assert_close(found, nearest)
    assert (found - x).square().mean() == pytest.approx(kind.error(16), rel=0.1)


def test_products_with_packed_codes():
    x = torch.randn(3, 2, 16, 48, generator=torch.Generator().manual_seed(0))
    packed = encode(x, float4(48))
    decoded = decode(packed, float4(48), 16).transpose(0, 1).flatten(1, 2)
    query, weights = torch.randn(2, 5, 48), torch.rand(2, 5, 48)
    codes = Codes(packed, float4(48), 16)
    torch.testing.assert_close(
        codes.products(query), field_order(query @ decoded.mT, 16), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        codes.weighted(field_order(weights, 16)), weights @ decoded, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "pair",
    [
        (float4, float4),
        (float4, lambda dim: uniform(dim, 3)),
        (lambda dim: uniform(dim, 8), float4),
    ],
)
@pytest.mark.parametrize(("dim", "page"), [(64, 16), (48, 32)])
def test_attention_over_its_pages(pair, dim, page):
    case = Case(tuple(make(dim) for make in pair), [5 + 24 + 3 * page + 7, 37], 4, 2, page)
    assert error(case.got(), case.expected()) < 1e-3


@pytest.mark.parametrize("keys", [True, False])
def test_pages_equal_the_reference(keys):
    heads, tokens = 2, 16
    pair = (float4(64), uniform(64, 4)) if keys else (uniform(64, 3), float4(64, "fp16"))
    rows = [rows_of(1, heads, tokens, 64, seed) for seed in (0, 1)]
    pages = Pages(1, heads * sum(fmt.nbytes(tokens) for fmt in pair))
    zero = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    encode_pages(*rows, PageFormat(*pair), pages.addresses(), zero, zero, page_tokens=tokens)
    want = torch.cat([encode(x[0].cpu(), fmt).flatten() for x, fmt in zip(rows, pair, strict=True)])
    assert (
        pages.pages[0].cpu() != want
    ).float().mean() < 0.01  # a root mean square may be rounded the other way
    assert pages.untouched()


@pytest.mark.parametrize("down", [True, False])
def test_pages_are_lowered_from_it_and_to_it(down):
    heads, tokens, own = 2, 16, (float4(64), float4(64))
    old, new = (
        (own, (uniform(64, 4), uniform(64, 3))) if down else ((uniform(64, 256, "fp16"),) * 2, own)
    )
    (data,), read = pages_of(old, 1, heads, tokens)
    pages = Pages(1, heads * sum(fmt.nbytes(tokens) for fmt in new))
    source = torch.tensor([page_address(data)], device=DEVICE)
    lower(
        source,
        pages.addresses(),
        PageFormat(*old),
        PageFormat(*new),
        num_kv_heads=heads,
        page_tokens=tokens,
    )
    want = torch.cat([encode(x.cpu(), fmt).flatten() for x, fmt in zip(read, new, strict=True)])
    assert (pages.pages[0].cpu() != want).float().mean() < 0.01 and pages.untouched()


def test_pages_are_decoded_for_prompts():
    pair = (float4(64), uniform(64, 4))
    data, read = pages_of(pair, 2, 2, 32)
    pages = torch.tensor([page_address(x) for x in data], device=DEVICE)
    got = [torch.full((2, 64, 64), torch.nan, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    decode_pages(pages, *pair, *got, 32)
    for found, want in zip(got, read, strict=True):
        torch.testing.assert_close(found.float(), want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_cache_on_either_backend(progressive):
    """Prompt, steps that pack pages, and with a budget pages that go down to it from 16 bits."""
    heads, dim = 2, 16
    geometry = Geometry(heads, dim, 3, 6, 8)
    spec = LayerSpec(KeySpec(float4(dim), offset=torch.ones(heads, dim)), ValueSpec(float4(dim)))
    assert [str(rung.key.format) for rung in ladder(spec)] == [
        "16@4 float4 e4m3",
        "16@8 asym fp16",
        "16",
    ]
    found = []
    for triton in (False, True):
        options = {"ladders": Ladders([spec], [(1.0, 1.0)], geometry)} if progressive else {}
        cache = QuantizedKVCache(
            [spec], geometry, 4300 if progressive else None, backend_of(triton), **options
        )
        cache.note_padding(None, 1)
        rng, outputs = torch.Generator().manual_seed(1), []
        for tokens in (30, 1, 9, 1, 1):
            keys, values = (
                torch.randn(1, heads, tokens, dim, generator=rng).to(DEVICE) for _ in "kv"
            )
            query = torch.randn(1, 2 * heads, tokens, dim, generator=rng).to(DEVICE)
            outputs.append(cache.update(keys, values, 0)[0].attend(query, 0.3, None))
        table = cache.layers[0].table
        rungs = [table.pool.rung(i) for i in table.sequences[0].pages]
        assert len(rungs) == 4 and min(rungs) == 0
        found.append((torch.cat(outputs, 2), cache.nbytes, cache.report()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-3, atol=2e-3)
    assert found[0][1:] == found[1][1:]


COMPILE = """
import pickle
import torch
from compile_kernels import compile_pair
from float4 import known
from kvfold.kernels.compile.build import is_built, jobs_of, target_of
from kvfold.kernels.compile.build_server import compile_job
from kvfold.kernels.compile.launch import noting
from kvfold.kernels.formats import Format
from kvfold.kernels.gpu.encode import encode_pages
from kvfold.kernels.gpu.kinds import device_layout
from kvfold.kernels.gpu.records import PageFormat

with known():
    fmt = Format(((64, 16),), "float4")
    assert compile_pair(fmt, fmt).asm["cubin"]
    rows, page = torch.zeros(1, 2, 16, 64).half(), torch.zeros(1, dtype=torch.int64)
    with noting() as launches:
        encode_pages(rows, rows, PageFormat(fmt, fmt), page, page.int(), page.int(), page_tokens=16)
    (job,) = jobs_of(launches, target_of("sm_90"))
    compile_job(pickle.loads(pickle.dumps(tuple(job))))
    assert is_built(job)
    print(device_layout(fmt, 32).device)
"""


def test_its_kernels_compile_for_a_gpu(tmp_path):
    """In a process of its own, without the interpreter; those that are compiled ahead, under the
    key they are looked up by."""
    done = prepared.python("compiler", COMPILE, env={"TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    name, _, digest = done.stdout.strip().partition(":")
    assert (
        name == "float4" and len(digest) == 16
    )  # a part of that key, so that it follows the source


def test_other_formats_kernels_do_not_know_of_it():
    """What is compiled for formats of the product's kinds is the same with it and without."""
    from kvfold.kernels.gpu.kinds import own_code

    assert own_code([uniform(64, 4), Format(((64, 3),))]) == ()
    assert [code.module for code in own_code([float4(64), uniform(64, 4), float4(32)])] == [
        "float4"
    ]
