"""kv_cache.json and kv_cache.safetensors: exact bytes, round trip, and what is refused on read."""

import copy
import hashlib
import json

import pytest
import torch
from safetensors import safe_open

from kvfold.errors import KvfoldError
from kvfold.exports.account import cache_nbytes
from kvfold.exports.reader import read_metadata, tensor_shapes
from kvfold.exports.schema import Metadata, dump_metadata, parse_metadata
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.exports.writer import write_tensors
from kvfold.kernels.formats import Format, raw16, uniform

KEY = {
    "format": {"classes": [[8, 16], [8, 4]], "params": "scale", "param_dtype": "e4m3", "group_size": 0},
    "transforms": ["offset", "whiten"], "tensors": ["matrix", "offset"], "payload_bits": 3.5, "predicted_loss": 0.125,
}  # fmt: skip
VALUE = {
    "format": {"classes": [[16, 3]], "params": "scale_min", "param_dtype": "e4m3", "group_size": 0},
    "transforms": ["rotate", "scale"], "tensors": ["clip"], "payload_bits": 3.0, "predicted_loss": 1e-05,
}  # fmt: skip
RAW_KEY = {
    "format": {"classes": [[16, 65536]], "params": "none", "param_dtype": "e4m3", "group_size": 0},
    "transforms": [], "tensors": [], "payload_bits": 16.0, "predicted_loss": 0.0,
}  # fmt: skip
FIELDS = {
    "format_version": 1,
    "cache": {
        "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "sinks": 3, "window": 10, "page_tokens": 16,
    },
    "layers": [{"key": KEY, "value": VALUE}, {"key": RAW_KEY, "value": VALUE}],
    "budget": {"request": "13", "at": 81, "bytes": 16848},
    "account": {
        "at": 81, "bytes": 15760, "bytes_16bit": 20736, "page_bytes": 6528, "raw_bytes": 8960, "table_bytes": 272,
        "bytes_at": {"1": 8976, "81": 15760},
        "effective_bits": 12.160493827160494, "payload_bits": 6.375,
    },
    "calibration": {
        "source": "Prosa für Tests", "num_sequences": 2, "seq_len": 256, "seed": 0, "spread": 8,
        "covered_positions": 2048, "kl": 0.0625,
    },
    "provenance": {
        "model": "tiny", "revision": None, "libraries": {"kvfold": "0.1.0", "torch": "2.11.0"}, "rounding_kl": 2.5e-07,
        "fused_dtype": "bfloat16",
    },
    "files": {"kv_cache.safetensors": "00" * 32},
}  # fmt: skip
SPECS = [
    LayerSpec(
        KeySpec(
            Format(((8, 16), (8, 4))),
            ("offset", "whiten"),
            (torch.arange(512) / 64).view(2, 16, 16),
            -(torch.arange(32) / 8).view(2, 16),
        ),
        ValueSpec(uniform(16, 3), ("rotate", "scale"), torch.tensor([0.75, 1.0])),
    ),
    LayerSpec(
        KeySpec(raw16(16)),
        ValueSpec(uniform(16, 3), ("rotate", "scale"), torch.tensor([0.5, 0.875])),
    ),
]


def dump_fields(fields: dict) -> str:
    """kv_cache.json of any fields, right or wrong, with the digest that FORMAT.md describes."""
    body = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return json.dumps({**fields, "digest": hashlib.sha256(body.encode()).hexdigest()})


def test_round_trip():
    metadata = Metadata.model_validate(FIELDS)
    text = dump_metadata(metadata)
    assert parse_metadata(text) == metadata
    assert dump_metadata(parse_metadata(text)) == text
    assert (
        parse_metadata(dump_fields(FIELDS)) == metadata
    )  # another writer may lay the text out as it likes
    assert metadata.formats == [(spec.key.format, spec.value.format) for spec in SPECS]
    assert (
        cache_nbytes(metadata.geometry, metadata.formats, 81)
        == metadata.account.bytes
        == 6528 + 8960 + 272
    )


def test_golden_text():
    text = dump_metadata(Metadata.model_validate(FIELDS))
    lines = text.splitlines()
    assert lines[:5] == [
        "{",
        ' "format_version": 1,',
        ' "cache": {',
        '  "num_layers": 2,',
        '  "num_heads": 4,',
    ]
    assert '  "source": "Prosa für Tests",' in lines
    assert '    "predicted_loss": 1e-05' in lines
    assert '  "revision": null,' in lines
    assert lines[-2:] == [
        ' "digest": "98ea578716c44f97e3b0212323654a99efbc64a0f6537fda70834ee878044f51"',
        "}",
    ]
    assert text.endswith("}\n")
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "ea757f9bc7f5b7502dee0643929bf8e475fd3f17d0faa17c16910479f4611aaf"
    )


def test_golden_tensors(tmp_path):
    write_tensors(tmp_path / "kv_cache.safetensors", SPECS)
    data = (tmp_path / "kv_cache.safetensors").read_bytes()
    assert (
        hashlib.sha256(data).hexdigest()
        == "1fe2d213940df234aeaab39085825170d86bdbf7552f3f7b5ade1ce0a7d08b3e"
    )
    with safe_open(tmp_path / "kv_cache.safetensors", framework="pt") as stored:
        shapes = {name: tuple(stored.get_tensor(name).shape) for name in stored.keys()}  # noqa: SIM118
        assert stored.metadata() == {"format": "pt"}
        assert torch.equal(stored.get_tensor("layers.0.key.matrix"), SPECS[0].key.matrix)
        assert stored.get_tensor("layers.1.value.clip").tolist() == [0.5, 0.875]
    assert shapes == tensor_shapes(Metadata.model_validate(FIELDS)) == {
        "layers.0.key.matrix": (2, 16, 16),
        "layers.0.key.offset": (2, 16),
        "layers.0.value.clip": (2,),
        "layers.1.value.clip": (2,),
    }  # fmt: skip


def test_no_tensor_at_all_is_a_readable_file(tmp_path):
    write_tensors(
        tmp_path / "kv_cache.safetensors", [LayerSpec(KeySpec(raw16(16)), ValueSpec(raw16(16)))]
    )
    with safe_open(tmp_path / "kv_cache.safetensors", framework="pt") as stored:
        assert list(stored.keys()) == []


def changed(path: str, value) -> dict:
    """FIELDS with one field replaced, or removed where value is Ellipsis; a path is like
    layers.0.key.format."""
    fields = copy.deepcopy(FIELDS)
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    place = fields
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return fields


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("colour", "red", "not valid at colour"),
        ("cache.rope", 1, "not valid at cache.rope"),
        ("layers.1.key.format.zero", 0, r"not valid at layers.1.key.format.zero"),
        ("budget", ..., "not valid at budget"),
        ("provenance.revision", ..., "not valid at provenance.revision"),
        ("format_version", 7, "format_version 7"),
        ("format_version", 6, "cache.states and format_version 6 go together"),
        (
            "cache.states",
            {"elements": 8, "float32": 8, "dtype": "float16"},
            "format_version 6 go together",
        ),
        ("format_version", 5, "format_version 5 needs cache.rollback"),
        ("cache.rollback", 16, "cache.rollback goes with format_version 5"),
        ("cache.rollback", None, "cache.rollback goes with format_version 5"),
        ("format_version", 2, "format_version 2 needs cache.sliding"),
        ("cache.sliding", [16, 0], "cache.sliding is no field of format_version 1"),
        ("format_version", "1", "format_version '1'"),
        ("format_version", True, "not valid at format_version"),
        ("format_version", ..., "format_version None"),
        ("cache.sinks", 3.0, "not valid at cache.sinks"),
        ("cache.sinks", "3", "not valid at cache.sinks"),
        ("cache.sinks", -1, "not valid at cache.sinks"),
        ("cache.window", True, "not valid at cache.window"),
        ("cache.page_tokens", 0, "not valid at cache.page_tokens"),
        ("cache.page_tokens", 12, "page_tokens is 12, but a page is a multiple of 8 tokens"),
        ("cache.num_kv_heads", 3, "num_heads is not a multiple"),
        ("cache.num_layers", 3, "2 layers are listed, but num_layers is 3"),
        ("layers", [], "0 layers are listed"),
        ("cache.head_dim", 32, "covers 16 channels, but head_dim is 32"),
        ("layers.0.key.payload_bits", 3.25, "payload_bits 3.25 does not fit"),
        ("layers.0.key.payload_bits", float("nan"), "not valid at layers.0.key.payload_bits"),
        ("layers.0.key.predicted_loss", float("inf"), "not valid at layers.0.key.predicted_loss"),
        ("layers.0.key.predicted_loss", -0.5, "not valid at layers.0.key.predicted_loss"),
        ("account.effective_bits", float("nan"), "not valid at account.effective_bits"),
        ("account.bytes", None, "not valid at account.bytes"),
        ("layers.0.key.tensors", ["zero"], "not valid at layers.0.key.tensors.0"),
        ("layers.0.key.format.params", "offset", "not valid at layers.0.key.format.params"),
        ("layers.0.key.format.param_dtype", "bf16", "not valid at layers.0.key.format.param_dtype"),
        ("layers.0.key.format.classes", [[8, 16], [8, 5]], "5 levels"),
        ("layers.0.key.format.classes", [[8, 16, 0], [8, 4, 0]], "not valid"),
        ("layers.0.key.format.classes", [[8, 3], [8, 4]], "A ternary format is one class"),
        ("layers.0.key.format.classes", [[8, 65536], [8, 4]], "A 16-bit format is one class"),
        ("layers.0.key.format.group_size", 8, "group_size=8"),
        ("files", {"a": 1}, "not valid at files.a"),
    ],
)
def test_wrong_fields_are_refused_in_one_line(path, value, message):
    with pytest.raises(KvfoldError, match=message) as caught:
        parse_metadata(dump_fields(changed(path, value)))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("kv_cache.json ")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"bytes": 15760', '"bytes": 15761'),
        ('"model": "tiny"', '"model": "tinz"'),
        ('"seed": 0', '"seed": 1'),
        ("0000", "0001"),
    ],
)
def test_a_flipped_character_shows(old, new):
    text = dump_metadata(Metadata.model_validate(FIELDS))
    assert old in text
    with pytest.raises(KvfoldError, match="does not match its own digest") as caught:
        parse_metadata(text.replace(old, new, 1))
    assert "\n" not in str(caught.value)


def test_the_digest_itself_counts():
    for text in (
        json.dumps(FIELDS),
        json.dumps({**FIELDS, "digest": "0" * 64}),
        json.dumps({**FIELDS, "digest": None}),
    ):
        with pytest.raises(KvfoldError, match="its own digest"):
            parse_metadata(text)


def test_sliding_windows_are_version_2():
    """The rest is as in version 1, and so is an artifact without them."""
    geometry = {**FIELDS["cache"], "sliding": [30, 0]}
    formats = Metadata.model_validate(FIELDS).formats
    fields = {**FIELDS, "format_version": 2, "cache": geometry}
    metadata = parse_metadata(dump_fields(fields))
    assert metadata.model_dump() == fields and metadata.geometry.sliding == (30, 0)
    assert parse_metadata(dump_metadata(metadata)) == metadata
    # 4 pages of 16 of 81 tokens, of which the first three end before token 81 − 30 + 1
    page = 2 * 16 * (7 + 6)
    assert cache_nbytes(metadata.geometry, formats, 81) == FIELDS["account"]["bytes"] - 3 * page
    for wrong in ([0, 0], [30], [30, 0, 0], [], [30, -1], [30.0, 0]):
        with pytest.raises(KvfoldError, match=r"sliding"):
            parse_metadata(dump_fields({**fields, "cache": {**geometry, "sliding": wrong}}))
    with pytest.raises(KvfoldError, match=r"needs cache.sliding"):
        parse_metadata(dump_fields({**FIELDS, "format_version": 2}))


def test_pairs_that_are_not_halves_are_version_4():
    geometry = {**FIELDS["cache"], "rope_pairs": "adjacent"}
    text = dump_fields({**FIELDS, "format_version": 4, "cache": geometry})
    metadata = parse_metadata(text)
    assert metadata.cache.rope_pairs == "adjacent" and json.loads(
        dump_metadata(metadata)
    ) == json.loads(text)
    later = {**geometry, "rollback": 16}
    metadata = parse_metadata(dump_fields({**FIELDS, "format_version": 5, "cache": later}))
    assert metadata.cache.rope_pairs == "adjacent" and metadata.model_dump()["cache"] == later
    for version, pairs in (
        (5, "halves"),
        (3, "adjacent"),
        (1, "swapped"),
        (4, "halves"),
        (4, None),
        (3, "halves"),
    ):
        cache = {**FIELDS["cache"], **({} if pairs is None else {"rope_pairs": pairs})}
        if version == 5:
            cache["rollback"] = 16
        with pytest.raises(KvfoldError, match="goes with format_version 4, which needs it, and 5"):
            parse_metadata(dump_fields({**FIELDS, "format_version": version, "cache": cache}))


def test_heads_of_several_shapes_and_shared_layers_are_version_7():
    wide = {**VALUE, "format": {**VALUE["format"], "classes": [[32, 3]]}, "payload_bits": 2.25}
    raw = {**RAW_KEY, "format": {**RAW_KEY["format"], "classes": [[32, 65536]]}}
    layers = [FIELDS["layers"][0], {"key": raw, "value": {**wide, "tensors": []}}]
    cache = {**FIELDS["cache"], "rollback": 0, "heads": [[2, 16], [1, 32]], "shared": [1]}
    fields = {**FIELDS, "format_version": 7, "cache": cache, "layers": layers}
    metadata = parse_metadata(dump_fields(fields))
    assert metadata.model_dump() == fields and parse_metadata(dump_metadata(metadata)) == metadata
    g = metadata.geometry
    assert (g.heads, g.shared) == (((2, 16), (1, 32)), (1,))
    assert g.of_layer(1).num_kv_heads == 1 and g.of_layer(1).head_dim == 32
    assert g.elements(10, 2) == 2 * 10 * (2 * 16 + 32)
    assert tensor_shapes(metadata)["layers.0.key.matrix"] == (2, 16, 16)
    together = "go together"
    for version, change, said in (
        (5, {}, together), (6, {}, together), (8, {}, "format_version 8"), (7, {"heads": []}, together),
        (7, {"heads": [[2, 16], [2, 16]]}, "which differ"), (7, {"heads": [[2, 16]]}, "each of 2 layers"),
        (7, {"heads": [[1, 32], [2, 16]]}, "stated besides"), (7, {"heads": [[2, 16], [3, 32]]}, "not a multiple"),
        (7, {"heads": [[2, 16], [1, 64]]}, "head_dim is 64"), (7, {"heads": [[2, 16], [0, 32]]}, "cache.heads"),
        (7, {"heads": [[2, 16], [1]]}, "cache.heads"), (7, {"shared": [2]}, "some of 2 layers"),
        (7, {"shared": [1, 0]}, "rising"), (7, {"shared": [1, 1]}, "rising"), (7, {"rollback": None}, "rollback"),
        (7, {"states": {"elements": 1, "float32": 0, "dtype": "float32"}}, "cache.states and format_version 6"),
    ):  # fmt: skip
        broken = {**fields, "format_version": version, "cache": {**cache, **change}}
        with pytest.raises(KvfoldError, match=said):
            parse_metadata(dump_fields(broken))
    plain = {**FIELDS["cache"], "rollback": 0}
    for more, said in (
        ({}, together), ({"chunked": False}, together), ({"chunked": True}, "but there are none"),
    ):  # fmt: skip
        with pytest.raises(KvfoldError, match=said):
            parse_metadata(dump_fields({**FIELDS, "format_version": 7, "cache": {**plain, **more}}))
    chunks = {**plain, "sliding": [30, 0], "chunked": True}
    metadata = parse_metadata(dump_fields({**FIELDS, "format_version": 7, "cache": chunks}))
    assert metadata.geometry.chunked and metadata.model_dump()["cache"] == chunks


def test_states_are_version_6():
    """Their bytes are in the account, at any length the same; they are the last of the cache's fields."""
    states = {"elements": 100, "float32": 7, "dtype": "bfloat16"}
    cache = {**FIELDS["cache"], "rollback": 0, "states": states}
    fields = {**FIELDS, "format_version": 6, "cache": cache}
    metadata = parse_metadata(dump_fields(fields))
    assert metadata.model_dump() == fields and metadata.geometry.state_nbytes == 228
    assert (
        metadata.cache.states.nbytes("float32")
        == 428
        == metadata.cache.states.nbytes("float64") - 400
    )
    plain = parse_metadata(
        dump_fields({**FIELDS, "format_version": 5, "cache": {**FIELDS["cache"], "rollback": 0}})
    )
    for tokens in (1, 81, 5000):
        pair = [cache_nbytes(x.geometry, x.formats, tokens) for x in (metadata, plain)]
        assert pair[0] == pair[1] + 228
    assert '"rollback": 0,\n  "states": {' in dump_metadata(metadata)
    assert "states" not in dump_metadata(plain)
    for wrong, words in (
        ({"format_version": 5}, "cache.states and format_version 6 go together"),
        (
            {"format_version": 5, "cache": {**cache, "states": None}},
            "cache.states and format_version 6 go together",
        ),
        ({"cache": {**cache, "states": None}}, "cache.states and format_version 6 go together"),
        ({"cache": {**cache, "rollback": 16}}, "cache.rollback must be 0"),
        ({"cache": {**cache, "rollback": None}}, "format_version 6 needs cache.rollback"),
        ({"cache": {**cache, "states": {**states, "elements": -1}}}, "cache.states.elements"),
        ({"cache": {**cache, "states": {**states, "dtype": "int8"}}}, "cache.states.dtype"),
        ({"cache": {**cache, "states": {"elements": 1}}}, "cache.states.float32"),
    ):
        with pytest.raises(KvfoldError) as caught:
            parse_metadata(dump_fields({**fields, **wrong}))
        assert words in str(caught.value)


def test_a_rollback_is_version_5():
    """Its rows are in the account; it is the last of the cache's fields, and stated also if it is
    none."""
    for rollback, pages in ((0, 1), (6, 1), (7, 2), (16, 2), (23, 3), (1 << 24, (1 << 20) + 1)):
        fields = {
            **FIELDS,
            "format_version": 5,
            "cache": {**FIELDS["cache"], "rollback": rollback},
        }
        metadata = parse_metadata(dump_fields(fields))
        assert metadata.geometry.rollback == rollback and metadata.model_dump() == fields
        assert dump_metadata(metadata) == dump_metadata(parse_metadata(dump_metadata(metadata)))
        # a window of 10 tokens and a page of 16 leave 6 rows of two pages
        rows = 2 * 16 * 2 * 2 * 2 * 16 * (pages - 1)
        formats = metadata.formats
        assert cache_nbytes(metadata.geometry, formats, 81) == FIELDS["account"]["bytes"] + rows
    lines = dump_metadata(metadata).splitlines()
    assert lines[lines.index('  "page_tokens": 16,') + 1] == '  "rollback": 16777216'
    for wrong in (-1, 1.0, 16.5, True, "16", None, [16], (1 << 24) + 1, 1 << 63, 10**400):
        cache = {**FIELDS["cache"], "rollback": wrong}
        with pytest.raises(KvfoldError, match=r"rollback") as caught:
            parse_metadata(dump_fields({**FIELDS, "format_version": 5, "cache": cache}))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", '{"format_version": 1', "\ufeff{}"])
def test_what_is_not_a_json_object(text):
    with pytest.raises(KvfoldError, match=r"is not JSON|format_version None") as caught:
        parse_metadata(text)
    assert "\n" not in str(caught.value)


def test_reading_from_a_folder(tmp_path):
    with pytest.raises(KvfoldError, match="is not a folder"):
        read_metadata(tmp_path / "nowhere")
    with pytest.raises(KvfoldError, match=r"holds no kv_cache.json"):
        read_metadata(tmp_path)
    metadata = Metadata.model_validate(FIELDS)
    (tmp_path / "kv_cache.json").write_text(dump_metadata(metadata), encoding="utf-8")
    assert read_metadata(tmp_path) == metadata


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_shows(tmp_path, bit):
    data = dump_metadata(Metadata.model_validate(FIELDS)).encode()
    for at in [i for i, byte in enumerate(data) if byte > ord(" ")][
        ::41
    ]:  # layout alone is not covered
        flipped = bytearray(data)
        flipped[at] ^= 1 << bit
        (tmp_path / "kv_cache.json").write_bytes(flipped)
        with pytest.raises(KvfoldError) as caught:
            read_metadata(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("layers.0.value.tensors", ["clip", "matrix"]),  # values have no run-time basis
        ("layers.1.value.tensors", ["offset"]),
        ("layers.0.key.tensors", ["matrix", "matrix"]),
    ],
)
def test_tensors_that_a_side_cannot_have(path, value):
    with pytest.raises(KvfoldError):
        parse_metadata(dump_fields(changed(path, value)))
