"""The entropy-coded form of a saved cache: the same to the bit, smaller, and refused where its
streams are of other sizes than what the file states."""

import json
import zlib

import pytest
import torch
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_modes import PACKED, RAW, left_padded, packed_model

from kvfold import KvfoldError, runtime
from kvfold.exports.account import Geometry
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.kernels.quantizer import encode
from kvfold.runtime.cache import entropy, storage

SIDES = {
    16: [uniform(16, 3), Format(((8, 64), (8, 16))), raw16(16)],
    48: [
        Format(((8, 32), (8, 8), (8, 2), (16, 4), (8, 0))),
        Format(((8, 0), (8, 256), (32, 4)), "scale", "fp16"),
        uniform(48, 8, "fp16", 16),
        uniform(48, 3, "e4m3", 16),
        raw16(48),
    ],
}


@st.composite
def layers(draw):
    """Geometry, formats, and tensors of any bytes: a page need not be one that was encoded."""
    dim = draw(st.sampled_from(sorted(SIDES)))
    formats = draw(st.sampled_from(SIDES[dim])), draw(st.sampled_from(SIDES[dim]))
    geometry = Geometry(draw(st.integers(1, 3)), dim, 2, 8, draw(st.sampled_from([8, 16, 32])))
    rows, pages = draw(st.integers(0, 9)), draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    most = draw(st.sampled_from([1, 2, 256]))  # zeros and few values are the shortest streams

    def some(*shape):
        return torch.randint(0, most, shape, dtype=torch.uint8, generator=generator)

    shape = geometry.num_kv_heads, rows, 2 * dim
    found = {name: some(*shape).view(torch.float16) for name in ("keys", "values")}
    return geometry, formats, {**found, "pages": some(pages, geometry.pair_nbytes(*formats))}


@settings(max_examples=examples(200), deadline=None)
@given(layers(), st.sampled_from([16, 32, 4096]))
def test_any_bytes_come_back(layer, run):
    """In one run of pages or in several."""
    geometry, formats, found = layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entropy, "RUN_TOKENS", run)
        stored = entropy.code_layer(found, geometry, formats)
        rows, pages = found["keys"].shape[1], len(found["pages"])
        again = entropy.decode_layer(stored, rows, pages, geometry, formats)
    for name, tensor in found.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        assert torch.equal(again[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_gaussians_take_what_their_codes_are_worth():
    """The best uniform codes of 1, 2, 3, 4, 5 and 6 bits hold 1, 1.90, 2.76, 3.65, 4.57 and 5.51,
    and bits of two planes are worth that only together."""
    fmt = Format(((8, 64), (8, 32), (8, 16), (8, 8), (8, 4), (8, 2)))
    geometry = Geometry(2, 48, 0, 8, 32)
    x = torch.randn(128, 2, 2, 32, 48, generator=torch.Generator().manual_seed(1))
    pages = encode(x, fmt).flatten(1)  # [P, keys and values of two heads]
    empty = torch.zeros(2, 0, 48, dtype=torch.float16)
    found = {"keys": empty, "values": empty, "pages": pages}
    stored = entropy.code_layer(found, geometry, (fmt, fmt))["pages"]
    codes = 8 * 128 * 4 * 32 * (1 + 1.90 + 2.76 + 3.65 + 4.57 + 5.51) / 8
    scales = 128 * 4 * 32
    assert len(stored) < codes * 1.02 + scales
    assert len(pages.flatten()) == 128 * 4 * 32 * (8 * 21 // 8 + 1)


@torch.no_grad()
@pytest.mark.parametrize("spec", [RAW, PACKED], ids=["raw", "packed"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_cache_comes_back_to_the_bit(family, spec, tmp_path):
    """A batch of odd lengths, one without pages, pages that two share, windows that slide."""
    model = packed_model(family, spec)
    ids, mask = left_padded([91, 33, 2])
    cache = model(ids, attention_mask=mask).past_key_values
    cache.batch_select_indices(torch.tensor([0, 1, 2, 0]))
    plain, coded, again = (tmp_path / name for name in ("plain", "coded", "again"))
    cache.save(plain)
    cache.save(coded, entropy_coded=True)
    assert storage.read_file(coded)[0]["version"] == 2
    restored = runtime.load_cache(coded, model)
    assert restored.report() == cache.report()
    restored.save(again)
    assert again.read_bytes() == plain.read_bytes()
    restored.save(again, entropy_coded=True)
    assert again.read_bytes() == coded.read_bytes()
    mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1)[[0, 1, 2, 0]]
    logits = [
        model(ids[[0, 1, 2, 0], :1], attention_mask=mask, past_key_values=x).logits
        for x in (cache, restored)
    ]
    assert torch.equal(*logits)


@torch.no_grad()
def test_a_file_is_plain_unless_it_is_asked_for(tmp_path):
    cache = packed_model(spec=PACKED)(torch.ones(1, 40, dtype=torch.long)).past_key_values
    cache.save(tmp_path / "cache")
    assert storage.read_file(tmp_path / "cache")[0]["version"] == 1
    with pytest.raises(KvfoldError, match=r"entropy_coded='zlib' is not one .*; use True or False"):
        cache.save(tmp_path / "cache", entropy_coded="zlib")


def deflated(data: bytes, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> torch.Tensor:
    """A stream as anybody's coder makes it, by default one that finds repetitions."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 8, strategy)
    return torch.frombuffer(bytearray(coder.compress(data) + coder.flush()), dtype=torch.uint8)


FAULTS = {
    "cut": (lambda x: x[:-9].clone(), "decodes to fewer than|has no end"),
    "no end": (lambda x: x[:-1].clone(), "decodes to fewer than|has no end"),
    "nothing": (lambda x: x[:0].clone(), r"has 0 bytes for \d+, but a coded byte holds 8"),
    "bomb": (lambda x: deflated(bytes(1 << 24))[: len(x)].clone(), "decodes to more|has"),
    "long bomb": (lambda x: deflated(bytes(1 << 26)), "decodes to more than"),
    "short": (lambda x: deflated(bytes(100)), "bytes for"),
    "zeros": (lambda x: torch.zeros(len(x), dtype=torch.uint8), "DEFLATE|decodes to fewer"),
    "behind": (lambda x: torch.cat((x, x[:1])), "has bytes behind its end"),
    "text": (lambda x: torch.full_like(x, 0x6F), "is no stream of DEFLATE"),
    "numbers": (lambda x: x.float(), "is no stream of bytes"),
    "rows": (lambda x: x[None].clone(), "is no stream of bytes"),
}


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """A model, and an entropy-coded file's JSON object and streams."""
    model = packed_model(spec=PACKED)
    path = tmp_path_factory.mktemp("coded") / "cache"
    ids, mask = left_padded([90, 33, 2])
    with torch.no_grad():
        model(ids, attention_mask=mask).past_key_values.save(path, entropy_coded=True)
    return model, *storage.read_file(path)


@pytest.mark.parametrize("name", ["keys", "pages"])
@pytest.mark.parametrize("fault", FAULTS)
def test_streams_of_other_sizes_are_refused(coded, tmp_path, fault, name):
    """Though the file's hash fits."""
    model, body, tensors = coded
    change, words = FAULTS[fault]
    tensors = {**tensors, f"layers.1.{name}": change(tensors[f"layers.1.{name}"])}
    header = json.dumps({**body, "sha256": storage._sha256(body, tensors)})
    save_file(tensors, tmp_path / "x", metadata={storage.FIELD: header})
    with pytest.raises(KvfoldError, match=words) as caught:
        runtime.load_cache(tmp_path / "x", model)
    said = str(caught.value)
    assert f"describes no cache of this model: layers.1.{name} " in said
    assert said.endswith("; save the cache again.") and "\n" not in said


def test_a_statement_of_more_than_streams_can_hold_takes_no_memory(coded, tmp_path):
    """A sequence of 2^17 tokens in streams of a few KiB, each of which would decode to megabytes."""
    model, body, tensors = coded
    pages = list(range(1 << 14))
    length = 3 + 8 * len(pages) + 10
    layers = [
        {"columns": length, "length": [length], "oldest": [length - 10], "pages": [pages]}
        for _ in body["layers"]
    ]
    body = {**body, "padding": [0], "layers": layers}
    rows = deflated(bytes(2 * 13 * 2 * 16), zlib.Z_HUFFMAN_ONLY)
    bomb = deflated(bytes(1 << 22))
    tensors = {name: (bomb if "pages" in name else rows).clone() for name in tensors}
    header = json.dumps({**body, "sha256": storage._sha256(body, tensors)})
    save_file(tensors, tmp_path / "x", metadata={storage.FIELD: header})
    with pytest.raises(KvfoldError, match=r"layers\.0\.pages has \d+ bytes for \d+"):
        runtime.load_cache(tmp_path / "x", model)
