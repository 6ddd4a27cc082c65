"""`kvfold export onnx`: an artifact as graphs, run by onnxruntime."""

import json
import shutil
import subprocess
import sys
from contextlib import ExitStack
from importlib.util import find_spec

import numpy as np
import pytest
import torch

if absent := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
    pytest.skip(f"{absent[0]} is missing: pip install 'kvfold[onnx]'", allow_module_level=True)

import onnx
from conftest import tiny_model

from kvfold import runtime
from kvfold.compress.cli import main
from kvfold.compress.models import load_model
from kvfold.compress.models.attention_hook import NAME as TAP
from kvfold.compress.models.attention_hook import tapped
from kvfold.compress.targets import onnx as export_module
from kvfold.compress.targets.engines import NUM_SEQUENCES, SEQ_LEN
from kvfold.compress.targets.onnx import check_onnx
from kvfold.compress.targets.onnx_scales import calibrate_codecs, codec_tap, fit_codec
from kvfold.compress.text import read_documents, sample_sequences
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import ARCHITECTURES
from kvfold.exports.onnx.attention import PackedAttention, raw_tensors
from kvfold.exports.onnx.graph import IR_VERSION, OPSET
from kvfold.exports.onnx.runner import OnnxRunner, nbytes
from kvfold.exports.onnx.trace import NAME, trace
from kvfold.exports.onnx.writer import WEIGHTS_NAME, WeightFile, write_graphs
from kvfold.exports.reader import read_artifact
from kvfold.kernels.attention import attend_plain

PROMPT = "a cache that is read where there is no torch, a page at a time: the sinks, the pages and the window"
IDS = torch.tensor([[ord(letter) for letter in PROMPT]])


def kvfold(*args: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in args])
    return int(done.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_artifact):
    """The tiny artifact's graphs."""
    out = tmp_path_factory.mktemp("onnx") / "tiny"
    assert kvfold("export", "onnx", tiny_artifact, out) == 0
    return out


# -- the packed form


def logits_in_parts(runner, ids, split):
    """(float32 [B, T, vocab_size], the cache at the end) of ids int64 [B, T], fed in parts of
    `split` tokens."""
    cache, found, start = runner.empty(len(ids)), [], 0
    for count in split:
        logits, cache = runner(ids[:, start : start + count].numpy(), cache)
        found.append(logits)
        start += count
    return np.concatenate(found, 1), cache


def test_round_trip(folder, tiny_artifact):
    """compress → export onnx → onnxruntime: the runtime's text, over several pages (of this model
    a sum in another order makes another text in the end); every file is where it is looked for."""
    model = runtime.load_pretrained(tiny_artifact, device="cpu")
    expected = model.generate(IDS, max_new_tokens=32, do_sample=False)[0, IDS.shape[1] :].tolist()
    runner = OnnxRunner(folder, threads=1)
    assert [int(token[0]) for token in runner.generate(IDS.numpy(), 32)] == expected
    names = {p.name for p in folder.iterdir()}
    assert {
        "prefill.onnx",
        "decode.onnx",
        WEIGHTS_NAME,
        "config.json",
        "tokenizer.json",
        "README.md",
    } <= names
    assert not any(name.endswith((".safetensors", ".partial")) for name in names)


def test_logits_and_cache_are_the_runtimes(folder, tiny_artifact):
    """A batch, as one prompt, and as a prompt, tokens and a chunk; the cache takes the bytes that
    the account states."""
    artifact = read_artifact(tiny_artifact)
    assert all(spec.key.turns for spec in artifact.specs)
    geometry, formats = artifact.metadata.geometry, artifact.metadata.formats
    ids = torch.cat((IDS, IDS.flip(1)))
    model = runtime.load_pretrained(tiny_artifact, device="cpu")
    with torch.no_grad():
        out = model(ids)
    runner = OnnxRunner(folder, threads=1)
    total = ids.shape[1]
    for split in ([total], [50, 1, 1, 1, 20, *[1] * (total - 73)]):
        logits, cache = logits_in_parts(runner, ids, split)
        error = np.square(logits - out.logits.numpy()).mean(-1) ** 0.5  # [sequences, tokens]
        error /= float(out.logits.square().mean().sqrt())
        differ, size = [0, 0], 0
        for i, layer in enumerate(out.past_key_values.layers):
            pages = cache[f"past.{i}.pages"].numpy()
            for b in range(2):
                held = layer.table.pool.load(layer.table.pages()[b]).numpy()
                assert pages[b].shape == held.shape
                differ[b], size = differ[b] + int((pages[b] != held).sum()), size + held.size
        assert sum(differ) < 0.01 * size
        for own, bytes_off in zip(error, differ, strict=True):
            if bytes_off:  # a last bit of a key tipped a code: what reads that page differs
                assert np.median(own) < 1e-3 and own.max() < 0.2
            else:
                assert np.square(own).mean() ** 0.5 < 1e-3
        raw = total - geometry.num_pages(total) * geometry.page_tokens
        stated = sum(geometry.side_nbytes(fmt, total) for pair in formats for fmt in pair)
        assert nbytes(cache) == 2 * (
            stated + len(formats) * raw * geometry.num_kv_heads * geometry.head_dim * 4
        )


@pytest.mark.parametrize("tokens", [2, 26, 90])  # not all sinks, no page yet, several pages
def test_goes_on_with_the_runtimes_own_cache(folder, tiny_artifact, tokens):
    """Pages are the same bytes: those of the runtime are continued here, and give its next logits
    to a rounding error."""
    ids = torch.cat((IDS, IDS.flip(1)))[:, : tokens + 1]
    model = runtime.load_pretrained(tiny_artifact, device="cpu")
    runner = OnnxRunner(folder, threads=1)
    with torch.no_grad():
        held = model(ids[:, :-1]).past_key_values
        feeds = runtime.onnx_inputs(held)
        expected = model(ids[:, -1:], past_key_values=held).logits
    assert sum(x.nbytes for x in feeds.values()) == nbytes(
        logits_in_parts(runner, ids[:, :-1], [tokens])[1]
    )
    logits, _ = runner(ids[:, -1:].numpy(), runner.cache_of(feeds))
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-3)


@torch.no_grad()
def test_caches_that_graphs_do_not_take(tiny_artifact):
    model = runtime.load_pretrained(tiny_artifact, device="cpu")
    with pytest.raises(KvfoldError, match=r"have \[\] tokens"):
        runtime.onnx_inputs(model.new_kv_cache())
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    cache = model(IDS[:, :40].repeat(2, 1), attention_mask=mask).past_key_values
    with pytest.raises(KvfoldError, match=r"have \[33, 40\] tokens"):
        runtime.onnx_inputs(cache)
    lowers = runtime.load_pretrained(
        tiny_artifact, device="cpu", policy="progressive", kv_budget="1MiB"
    )
    with pytest.raises(KvfoldError, match="progressive"):
        runtime.onnx_inputs(lowers(IDS).past_key_values)


def test_graphs_are_valid_and_say_nothing_of_this_machine(folder):
    for name in ("prefill.onnx", "decode.onnx"):
        onnx.checker.check_model(str(folder / name), full_check=True)
        text = (folder / name).read_bytes()
        for word in (
            b"site-packages",
            b".py",
            str(folder.parent).encode(),
            b"/home/",
            b"/root/",
            b"/tmp/",
        ):
            assert word not in text
        model = onnx.load(str(folder / name), load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}
        stated = {prop.key: json.loads(prop.value) for prop in model.metadata_props}
        assert stated["kvfold.form"] == "packed" and len(stated["kvfold.formats"]) == 3
        external = [
            t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL
        ]
        dims = {
            i.name: [d.dim_value or d.dim_param for d in i.type.tensor_type.shape.dim]
            for i in model.graph.input
        }
        assert dims["input_ids"] == ["batch", 1 if name == "decode.onnx" else "tokens"] and dims[
            "past.0.pages"
        ][:2] == ["batch", "past_pages"]
        # matrices are in the file once, in the 16 bits that the artifact has them in
        kinds = {
            t.data_type
            for t in external
            if np.prod(t.dims) >= 64 * 32 and not t.name.startswith("kv.")
        }
        assert kinds == {onnx.TensorProto.BFLOAT16}
        ends = {int(e.value) for t in external for e in t.external_data if e.key == "offset"}
        assert (folder / WEIGHTS_NAME).stat().st_size > max(ends)


RUN = """
import sys
for name in ("torch", "transformers", "onnx", "onnxscript"):
    sys.modules[name] = None
from kvfold.exports.onnx.runner import OnnxRunner
print([int(t[0]) for t in OnnxRunner(sys.argv[1], 1).generate([[97, 98, 99] * 20], 20)])
"""


def test_runner_needs_numpy_and_onnxruntime_alone(folder):
    done = subprocess.run([sys.executable, "-c", RUN, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runner = OnnxRunner(folder, threads=1)
    assert json.loads(done.stdout) == [int(t[0]) for t in runner.generate([[97, 98, 99] * 20], 20)]


def test_generation_ends(folder):
    runner = OnnxRunner(folder, threads=1)
    tokens = [int(t[0]) for t in runner.generate(IDS.numpy(), 20)]
    assert [int(t[0]) for t in runner.generate(IDS.numpy(), 20, end=tokens[3])] == tokens[
        : tokens.index(tokens[3]) + 1
    ]


def test_weights_beyond_4_gib(tmp_path):
    """A tensor far into a file (of holes), as in a large model, is read from there; the same bytes
    are stored once."""
    from onnx import TensorProto, helper
    from onnxruntime import InferenceSession

    file = WeightFile(tmp_path / WEIGHTS_NAME)
    numbers = np.arange(2048, dtype=np.float32)
    with open(file.path, "wb") as stream:
        file.end = 5 << 30
        stream.seek(file.end)
        first, second = (
            file.add(stream, n, TensorProto.FLOAT, [2048], numbers.data.cast("B"))
            for n in ("a", "b")
        )
    assert file.path.stat().st_size == (5 << 30) + numbers.nbytes
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2048])
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["y"])], "g", [], [value], initializer=[first, second]
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(tmp_path / "g.onnx"))
    session = InferenceSession(str(tmp_path / "g.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], 2 * numbers)


@pytest.mark.parametrize(
    "family,sliding,softcap", [("gemma2", [0, 40, 0], 4.0), ("gpt_oss", [40, 0, 40], None)]
)
def test_what_a_family_hands_to_its_attention(tmp_path, family, sliding, softcap):
    """Soft-caps, sliding windows and sink logits: transformers' logits with keys and values in 16
    bits, over more tokens than a window."""
    model = tiny_model(family, attention=TAP)
    ids = torch.cat((IDS, IDS.flip(1)))

    def rounded(module, query, key, value, mask, scaling, **extras):
        return attend_plain(
            query, key.half().float(), value.half().float(), scaling, mask, **extras
        ).transpose(1, 2)

    with torch.no_grad(), ExitStack() as stack:
        for attention in ARCHITECTURES[family].attention_modules(model):
            stack.enter_context(tapped(attention, rounded))
        expected = model(ids, use_cache=False).logits.numpy()
    model.set_attn_implementation(NAME)
    geometry = Geometry(2, 16, 3, 24, 8)
    tensors = [raw_tensors(geometry)] * 3
    traced = trace(model, tensors, geometry.page_tokens)
    assert [call.sliding for call in traced.calls] == sliding and {
        call.softcap for call in traced.calls
    } == {softcap}
    write_graphs(
        tmp_path, traced, tensors, lambda single: PackedAttention(geometry, None, single), 128, {}
    )
    runner = OnnxRunner(tmp_path, threads=1)
    for split in ([ids.shape[1]], [60, *[1] * (ids.shape[1] - 60)]):
        found, _ = logits_in_parts(runner, ids, split)
        error = found - expected
        assert np.sqrt((error**2).mean()) < 1e-3 * np.sqrt((expected**2).mean())


# -- the uniform form


def test_gqa_is_its_emulation(tmp_path, tiny_artifact, text_file, capsys):
    out = tmp_path / "gqa"
    assert kvfold("export", "onnx", tiny_artifact, out, "--form", "gqa", "--calib", text_file) == 0
    shown = capsys.readouterr().out
    assert "8.000 payload bits" in shown and 0 < float(shown.split("text ")[1].split()[0]) < 0.05
    artifact = read_artifact(tiny_artifact)
    model = load_model(tiny_artifact, torch.float32, torch.device("cpu"))
    arch = ARCHITECTURES["llama"]
    name, documents = read_documents(str(text_file))
    from transformers import AutoTokenizer

    stated = artifact.metadata.calibration
    tokenizer = AutoTokenizer.from_pretrained(tiny_artifact)
    sequences = sample_sequences(tokenizer, documents, NUM_SEQUENCES, SEQ_LEN, stated.seed, name)
    ids = torch.cat((IDS, IDS.flip(1)))
    with torch.no_grad():
        codecs = calibrate_codecs(model, arch, sequences, stated.spread, 8)
        attentions = arch.attention_modules(model)
        with (
            tapped(attentions[0], codec_tap(codecs[0])),
            tapped(attentions[1], codec_tap(codecs[1])),
            tapped(attentions[2], codec_tap(codecs[2])),
        ):
            expected = model(ids, use_cache=False).logits.numpy()
    runner = OnnxRunner(out, threads=1)
    for split in ([ids.shape[1]], [60, *[1] * (ids.shape[1] - 60)]):
        found, cache = logits_in_parts(runner, ids, split)
        error = found - expected
        assert np.sqrt((error**2).mean()) < 2e-3 * np.sqrt((expected**2).mean())
    assert cache["past.0.key"].numpy().dtype == np.int8 and cache["past.0.key"].numpy().shape == (
        2,
        2,
        ids.shape[1],
        16,
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_fitted_scales(bits):
    """Better than the whole range where a few numbers lie far out, exact for what has few values,
    and never zero."""
    x = torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(1))
    x[0, 7, 0] = 9
    x[1, :, 2] = 4.25
    x[1, :, 1] = torch.arange(500) % 2 * 3.0 - 1.5
    for centred in (True, False):
        codec = fit_codec(x, bits, centred)
        assert (codec.offset is not None) == centred and bool((codec.scale > 0).all())
        error = (codec.round_trip(x) - x).square().mean(1)
        half = 2 ** (bits - 1)
        plain = type(codec)(bits, x.abs().amax(1) / (half - 1))
        whole = (plain.round_trip(x) - x).square().mean(1)
        assert bool((error <= 1.1 * whole + 1e-9).all())
        assert bits == 8 or float(error[0, 0]) < 0.8 * float(whole[0, 0])  # a clipped outlier
        if centred:
            assert float(error[1, 1:].max()) < 1e-6


# -- bad input


def refused(*args: object, capsys) -> str:
    assert kvfold("export", "onnx", *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvfold: ") and error.count("\n") == 1
    return error


def test_bad_input(tmp_path, tiny_artifact, capsys, monkeypatch):
    out = tmp_path / "out"
    assert "'int3'" in refused(tiny_artifact, out, "--form", "int3", capsys=capsys)
    assert "--form gqa" in refused(tiny_artifact, out, "--bits", "4", capsys=capsys)
    assert "--bits 3" in refused(tiny_artifact, out, "--form", "gqa", "--bits", "3", capsys=capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "not empty" in refused(tiny_artifact, tmp_path / "full", capsys=capsys)
    assert "kv_cache.json" in refused(tmp_path / "full", out, capsys=capsys)
    real = export_module.find_spec
    monkeypatch.setattr(
        export_module, "find_spec", lambda name: None if name == "onnxscript" else real(name)
    )
    assert (
        "onnxscript" in (text := refused(tiny_artifact, out, capsys=capsys))
        and "kvfold[onnx]" in text
    )
    assert not out.exists()


def test_a_rope_table_that_changes(tmp_path, tiny_artifact):
    """Is refused, with the family."""
    artifact = read_artifact(tiny_artifact)
    copy = shutil.copytree(tiny_artifact, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    changed = type(artifact)(copy, artifact.metadata, artifact.specs)
    (copy / "config.json").write_text(
        json.dumps(
            config | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
        )
    )
    with pytest.raises(KvfoldError, match=r"'llama'.*'dynamic'"):
        check_onnx(changed, "packed", None)


def test_a_forward_pass_that_cannot_be_traced(monkeypatch):
    model = tiny_model("llama")
    model.set_attn_implementation(NAME)
    monkeypatch.setattr(
        model.model.layers[0].mlp,
        "forward",
        lambda x: x * (1 if float(x.sum()) > 0 else 2),
        raising=True,
    )
    with pytest.raises(KvfoldError, match="'llama' cannot be expressed"):
        trace(model, [raw_tensors(Geometry(2, 16, 3, 24, 8))] * 3, 8)
