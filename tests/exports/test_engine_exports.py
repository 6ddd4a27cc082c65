"""Exports for serving engines: other projects' own code reads them, and what it reads is what was
calibrated."""

import errno
import itertools
import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, char_tokenizer, tiny_model
from safetensors.torch import load_file
from transformers import DynamicCache

from kvfold import KvfoldError
from kvfold.autoclass import stock_from_pretrained
from kvfold.compress.cli import main
from kvfold.compress.models.attention_hook import NAME as TAP
from kvfold.compress.models.attention_hook import tapped
from kvfold.compress.targets.engine_formats import FP4_LEVELS, fp8, nvfp4, rounding_tap
from kvfold.compress.targets.engines import (
    Ranges,
    allocate_formats,
    choose_bits,
    export_compressed_tensors,
    export_modelopt,
    measure_ranges,
)
from kvfold.exports.architectures import ARCHITECTURES, Architecture
from kvfold.exports.engines.compressed_tensors import kv_cache_config
from kvfold.exports.engines.folder import write_engine_folder
from kvfold.exports.engines.modelopt import KV_BITS, embedded_config, quant_config
from kvfold.exports.reader import read_artifact

CPU = torch.device("cpu")
NAMES = [f"model.layers.{i}.self_attn" for i in range(3)]


@pytest.fixture(scope="module")
def ct_folders(tiny_artifact, text_file, tmp_path_factory):
    """A compressed-tensors folder of the tiny artifact for each strategy."""
    pytest.importorskip("compressed_tensors")
    root = tmp_path_factory.mktemp("ct")
    for strategy in ("tensor", "attn_head"):
        export_compressed_tensors(tiny_artifact, root / strategy, strategy, str(text_file), CPU)
    return root


@pytest.fixture(scope="module")
def modelopt_folder(tiny_artifact, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("modelopt") / "out"
    return out, export_modelopt(tiny_artifact, out, 6.0, str(text_file), CPU)


def all_tensors(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by its index."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {name: load_file(folder / name) for name in set(weight_map.values())}
    assert sorted(p.name for p in folder.glob("*.safetensors")) == sorted(shards)
    assert sum(len(tensors) for tensors in shards.values()) == len(weight_map)
    return {key: shards[name][key] for key, name in weight_map.items()}


def some_ids(length: int = 61) -> torch.Tensor:
    return torch.randint(32, 127, (1, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model, ids):
    return model(ids, past_key_values=DynamicCache(config=model.config)).logits


def stock(folder, **kwargs):
    """As transformers alone loads it."""
    return stock_from_pretrained(folder, dtype=torch.float32, **kwargs).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_rounding_keeps_soft_caps_and_sink_logits(family):
    """Nothing is rounded, so nothing changes; with both sides rounded something does."""
    model, ids, one = tiny_model(family), some_ids(), torch.ones(1)
    model.set_attn_implementation(TAP)
    plain = logits(model, ids)
    for algo in (None, "FP8"):
        with ExitStack() as stack:
            for layer in model.model.layers:
                stack.enter_context(tapped(layer.self_attn, rounding_tap(algo, algo, one, one)))
            assert torch.allclose(logits(model, ids), plain, atol=1e-4) == (algo is None)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ranges_are_what_a_stock_cache_holds(family):
    model = tiny_model(family)
    sequences = [some_ids(61), some_ids(33).flip(1)]
    caches = [
        DynamicCache() for _ in sequences
    ]  # without the config: a sliding layer keeps every token too
    for ids, cache in zip(sequences, caches, strict=True):
        model(ids, past_key_values=cache)
    model.set_attn_implementation(TAP)
    ranges = measure_ranges(model, ARCHITECTURES[family], sequences)
    for name in ("keys", "values"):
        expected = torch.stack(
            [
                torch.stack(
                    [getattr(cache.layers[i], name)[0].abs().amax((1, 2)) for cache in caches]
                ).amax(0)
                for i in range(3)
            ]
        )
        torch.testing.assert_close(getattr(ranges, name[:-1]), expected, rtol=1e-5, atol=1e-6)


def test_scales_are_absmax_over_448():
    ranges = Ranges(torch.tensor([[1.0, 4.0], [0.0, 0.0]]), torch.tensor([[8.0, 2.0], [3.0, 0.0]]))
    key, value = ranges.scales(per_head=False)
    assert torch.equal(value, torch.tensor([[8.0], [3.0]]) / 448)
    torch.testing.assert_close(key, torch.tensor([[4 * 2**0.5 / 448], [1 / 448]]))
    key, value = ranges.scales(per_head=True)
    assert torch.equal(value, torch.tensor([[8.0, 2.0], [3.0, 1.0]]) / 448)
    torch.testing.assert_close(key[0], torch.tensor([1.0, 4.0]) * 2**0.5 / 448)


def test_key_headroom_covers_every_position():
    """A pair of channels turned to any angle stays within the range that its own largest channel
    gives."""
    pair = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    angles = torch.linspace(0, 6.3, 721)[:, None]
    turned = pair[0] * angles.cos() - pair[1] * angles.sin()
    assert bool((turned.abs().amax(0) <= 2**0.5 * pair.abs().amax(0) + 1e-6).all())


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_compressed_tensors_parses_its_config(ct_folders, strategy):
    from compressed_tensors.quantization import QuantizationConfig

    stated = json.loads((ct_folders / strategy / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(stated)
    scheme = config.kv_cache_scheme
    assert (scheme.num_bits, scheme.type, scheme.strategy) == (8, "float", strategy)
    assert scheme.symmetric and scheme.dynamic is False and config.config_groups == {}
    assert (
        config.requires_calibration_data()
        and config.quant_method == stated["quant_method"] == "compressed-tensors"
    )
    assert (
        {**config.model_dump(mode="json"), "version": stated["version"]}
        == stated
        == kv_cache_config(strategy)
    )


@pytest.mark.parametrize("strategy, shape", [("tensor", (1,)), ("attn_head", (2, 1, 1))])
def test_the_weights_are_the_artifacts_and_the_scales_beside_them(
    ct_folders, tiny_artifact, strategy, shape
):
    tensors = all_tensors(ct_folders / strategy)
    scales = {name: tensors.pop(name) for name in [f"{n}.{s}_scale" for n in NAMES for s in "kv"]}
    assert all(scale.shape == shape and bool((scale > 0).all()) for scale in scales.values())
    original = load_file(tiny_artifact / "model.safetensors")
    assert tensors.keys() == original.keys() and all(
        torch.equal(tensors[k], original[k]) for k in original
    )
    assert (
        len({p.stat().st_mode for p in (ct_folders / strategy).iterdir()}) == 1
    )  # a server may run as another user
    assert not {"kv_cache.json", "kv_cache.safetensors", "recipe.yaml", "report.html"} & {
        p.name for p in (ct_folders / strategy).iterdir()
    }


def test_per_head_scales_reach_the_tensors_scale(ct_folders):
    one, each = all_tensors(ct_folders / "tensor"), all_tensors(ct_folders / "attn_head")
    for name in (f"{n}.{s}_scale" for n in NAMES for s in "kv"):
        assert each[name].max() == one[name][0] and each[name].min() < each[name].max()


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
@torch.no_grad()
def test_stock_transformers_loads_it(ct_folders, tiny_artifact, strategy):
    """The artifact's logits with the cache's quantisation switched off; with it on, those of our
    emulation, by its own code."""
    folder, ids = ct_folders / strategy, some_ids()
    model, artifact_model = stock(folder), stock(tiny_artifact)
    tensors = all_tensors(folder)
    attentions = [layer.self_attn for layer in model.model.layers]
    for name, attention in zip(NAMES, attentions, strict=True):
        assert torch.equal(attention.k_scale, tensors[f"{name}.k_scale"])
        assert torch.equal(attention.v_scale, tensors[f"{name}.v_scale"])
    quantised = logits(model, ids)
    for attention in attentions:
        attention.quantization_enabled = False
    plain = logits(model, ids)
    assert torch.equal(plain, logits(artifact_model, ids))
    tapped_model = stock(tiny_artifact, attn_implementation=TAP)
    with ExitStack() as stack:
        for name, layer in zip(NAMES, tapped_model.model.layers, strict=True):
            k, v = (tensors[f"{name}.{s}_scale"].flatten() for s in "kv")
            stack.enter_context(tapped(layer.self_attn, rounding_tap("FP8", "FP8", k, v)))
        emulated = tapped_model(ids, use_cache=False).logits
    torch.testing.assert_close(quantised, emulated, rtol=1e-4, atol=1e-4)
    assert float((quantised - plain).abs().max()) > 100 * float((quantised - emulated).abs().max())


def test_fp8_is_compressed_tensors_own():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    x = torch.randn(2, 3, 33, 16, generator=torch.Generator().manual_seed(0)) * 5
    x[0, 0, 0] = 1e4  # saturates
    scale = torch.tensor([0.01, 0.02, 0.03])[:, None, None]
    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy="attn_head")
    theirs = fake_quantize(x, scale, torch.zeros(()), args)
    torch.testing.assert_close(fp8(x, scale), theirs, rtol=0, atol=0)


def nearest_even(x: float) -> float:
    """e2m1 by brute force: nearest level, a tie to the even code."""
    levels = FP4_LEVELS.tolist()
    best = min(range(8), key=lambda i: (abs(abs(x) - levels[i]), i % 2))
    return levels[best] if x >= 0 else -levels[best]


def test_nvfp4_rounds_to_nearest_even():
    grid = torch.linspace(-6, 6, 769)  # steps of 1/64: every midpoint is on it
    block = torch.zeros(769, 16)
    block[:, 0], block[:, 1] = 6.0, grid
    scale = torch.tensor(6.0 / 448)  # block scales are 1 exactly
    out = nvfp4(block, scale)
    assert out[:, 1].tolist() == [nearest_even(x) for x in grid.tolist()]
    assert bool((out[:, 0] == 6).all()) and not bool(out[:, 2:].any())


def test_nvfp4_error_is_relative_to_its_block():
    x = torch.randn(7, 5, 64, generator=torch.Generator().manual_seed(0))
    x[..., 16:32] *= 100
    scale = x.abs().amax() / 448
    error = (nvfp4(x, scale) - x).unflatten(-1, (-1, 16)).abs().amax(-1)
    top = x.unflatten(-1, (-1, 16)).abs().amax(-1)
    assert bool(
        (error <= top * (1 / 6 + 1 / 12)).all()
    )  # half a step of e2m1 at its top, and the block scale's rounding
    assert not bool(nvfp4(torch.zeros(2, 16), torch.tensor(1.0)).any())


def test_nvfp4_is_model_optimizers_own():
    pytest.importorskip("modelopt")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    x = (
        torch.randn(37, 64, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-2, 2, 37)[:, None]
    )
    absmax = x.abs().amax()
    packed, block, outer = NVFP4QTensor.quantize(x, 16, weights_scaling_factor_2=absmax / (6 * 448))
    theirs = packed.dequantize(
        scale=block, double_scale=outer, block_sizes={-1: 16}, dtype=torch.float32
    )
    ours = nvfp4(x, absmax / 448)
    assert float((ours - theirs).abs().max() / absmax) < 1e-6


def test_modelopt_folder(modelopt_folder, tiny_artifact):
    folder, found = modelopt_folder
    stated = json.loads((folder / "hf_quant_config.json").read_text())
    assert stated["quantization"]["kv_cache_quantized_layers"] == {
        n: {"quant_algo": a} for n, a in zip(NAMES, found.algos, strict=True)
    }
    assert stated["producer"]["name"] == "modelopt"
    assert json.loads((folder / "config.json").read_text())[
        "quantization_config"
    ] == embedded_config(stated)
    tensors = all_tensors(folder)
    scales = {tensors.pop(f"{n}.{s}_proj.{s}_scale").shape for n in NAMES for s in "kv"}
    assert scales == {torch.Size([])}
    assert tensors.keys() == load_file(tiny_artifact / "model.safetensors").keys()
    assert found.bits <= 6.0 and found.kl > 0
    assert all(found.losses["NVFP4"][i] > found.losses["FP8"][i] > 0 for i in range(3))


def test_stock_transformers_computes_the_artifacts_logits_from_the_modelopt_folder(
    modelopt_folder, tiny_artifact
):
    ids = some_ids()
    assert torch.equal(logits(stock(modelopt_folder[0]), ids), logits(stock(tiny_artifact), ids))


def test_both_exports_state_the_same_ranges(modelopt_folder, ct_folders):
    ours, theirs = all_tensors(modelopt_folder[0]), all_tensors(ct_folders / "tensor")
    for name in NAMES:
        for s in "kv":
            assert ours[f"{name}.{s}_proj.{s}_scale"] == theirs[f"{name}.{s}_scale"][0]


@pytest.mark.parametrize("algos", [["FP8", "NVFP4", "FP8"], ["FP8"] * 3, ["NVFP4"] * 3])
def test_model_optimizers_converter_reads_it(algos):
    convert = pytest.importorskip(
        "modelopt.torch.export.convert_hf_config"
    ).convert_hf_quant_config_format
    config = quant_config(NAMES, algos)
    theirs, ours = convert(config), embedded_config(config)
    for name in ("quant_method", "producer", "ignore"):
        assert theirs[name] == ours[name]
    if len(set(algos)) == 1:
        assert theirs["kv_cache_scheme"] == ours["kv_cache_scheme"]
    else:  # releases that don't read the map pass the name on
        assert {theirs.get("kv_cache_quant_algo"), theirs.get("kv_cache_scheme")} - {None} == {
            "MIXED_PRECISION"
        }
    if "kv_cache_quantized_layers" in theirs:
        assert theirs["kv_cache_quantized_layers"] == ours["kv_cache_quantized_layers"]


def test_model_optimizer_names_its_scales_so():
    quant_utils = pytest.importorskip("modelopt.torch.export.quant_utils")
    name, amax = NAMES[0], torch.tensor(7.0)
    for s in "kv":
        found = quant_utils._postprocess_single_tensor(
            f"{name}.{s}_bmm_quantizer._amax", amax, 448, "FP8"
        )
        assert found == (f"{name}.{s}_proj.{s}_scale", amax / 448)


def test_quant_config_of_uniform_and_mixed_maps():
    for algos, stated in (("FFF", "FP8"), ("NNN", "NVFP4"), ("FNF", "MIXED_PRECISION")):
        config = quant_config(NAMES, [{"F": "FP8", "N": "NVFP4"}[a] for a in algos])
        assert config["quantization"]["kv_cache_quant_algo"] == stated
        embedded = embedded_config(config)
        assert (
            embedded["kv_cache_quant_algo"] == stated and embedded["kv_cache_schema_version"] == 1
        )
        assert ("kv_cache_scheme" in embedded) == (stated != "MIXED_PRECISION")


@pytest.mark.parametrize("bits", [4.5, 5.0, 5.7, 6.25, 8.0])
def test_the_allocation_is_the_best_of_all(bits):
    generator = torch.Generator().manual_seed(int(bits * 100))
    nvfp4_loss = torch.rand(7, generator=generator)
    losses = {
        "FP8": (nvfp4_loss * torch.rand(7, generator=generator) * 0.1).tolist(),
        "NVFP4": nvfp4_loss.tolist(),
    }
    chosen = allocate_formats(losses, 2 * 2 * 16 * 2048, bits)
    assert sum(KV_BITS[a] for a in chosen) <= 7 * bits + 1e-9
    best = min(
        sum(losses[a][i] for i, a in enumerate(algos))
        for algos in itertools.product(KV_BITS, repeat=7)
        if sum(KV_BITS[a] for a in algos) <= 7 * bits + 1e-9
    )
    assert sum(losses[a][i] for i, a in enumerate(chosen)) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize(
    "request_, payload, chosen", [(None, 2.3, 4.5), (None, 5.5, 5.5), (None, 12, 8), (7, 2.3, 7)]
)
def test_bits(request_, payload, chosen):
    assert choose_bits(request_, payload) == chosen


@pytest.mark.parametrize("request_", [4.4, 8.1, float("nan")])
def test_bits_out_of_reach(request_):
    with pytest.raises(KvfoldError, match=r"--bits .* 4\.5 to 8"):
        choose_bits(request_, 2.3)


def test_shards_are_numbered_again(tmp_path, tiny_artifact):
    artifact = read_artifact(tiny_artifact)
    source = shutil.copytree(tiny_artifact, tmp_path / "sharded")
    (source / "model.safetensors").unlink()
    stock(tiny_artifact).save_pretrained(source, max_shard_size="60KB")
    assert len(list(source.glob("model-*.safetensors"))) > 1
    scales = {f"{NAMES[0]}.k_scale": torch.tensor([0.5])}
    write_engine_folder(
        replace(artifact, path=source),
        tmp_path / "out",
        scales,
        {"quant_method": "modelopt"},
        {},
        "",
    )
    assert all_tensors(tmp_path / "out").keys() == stock(tiny_artifact).state_dict().keys() - {
        "lm_head.weight"
    } | {
        *scales,
        "lm_head.weight",
    }
    assert torch.equal(
        logits(stock(tmp_path / "out"), some_ids()), logits(stock(tiny_artifact), some_ids())
    )


def test_a_full_disk_leaves_nothing(tmp_path, tiny_artifact, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kvfold.exports.engines.folder.save_file", full)
    with pytest.raises(KvfoldError, match="disk filled up"):
        write_engine_folder(read_artifact(tiny_artifact), tmp_path / "out", {}, {}, {}, "")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a command that must be refused: its one line on stderr."""

    def run(*args) -> str:
        monkeypatch.setattr(sys, "argv", ["kvfold", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert (stop.value.code, out) == (2, "")
        lines = [line for line in err.splitlines() if line.startswith("kvfold: ")]
        assert "Traceback" not in err
        return lines[-1]

    return run


@pytest.mark.parametrize("form", ["compressed-tensors", "modelopt"])
def test_bad_places(refused, tmp_path, tiny_artifact, form):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    assert "is not empty" in refused("export", form, tiny_artifact, tmp_path / "full")
    assert "is a file" in refused("export", form, tiny_artifact, tmp_path / "full" / "note")
    assert "is not a folder" in refused("export", form, tmp_path / "absent", tmp_path / "out")
    assert "holds no kv_cache.json" in refused("export", form, tmp_path / "full", tmp_path / "out")
    damaged = shutil.copytree(tiny_artifact, tmp_path / "damaged")
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    assert "does not match its sha256" in refused("export", form, damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "note").read_text() == "mine"


def test_bad_options(refused, tmp_path, tiny_artifact):
    assert "--strategy channel is not one of" in refused(
        "export", "compressed-tensors", tiny_artifact, tmp_path / "out", "--strategy", "channel"
    )
    assert "--bits 3.0 is outside" in refused(
        "export", "modelopt", tiny_artifact, tmp_path / "out", "--bits", 3
    )
    assert not list(tmp_path.iterdir())


def test_compressed_tensors_missing(refused, tmp_path, tiny_artifact, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "compressed_tensors" else real(name, *a),
    )
    line = refused("export", "compressed-tensors", tiny_artifact, tmp_path / "out")
    assert "compressed-tensors is not installed" in line and "kvfold[engines]" in line
    assert not list(tmp_path.iterdir())


def test_a_family_that_cannot_be_expressed_is_named(refused, tmp_path, tiny_artifact, monkeypatch):
    odd = Architecture("oddly", attention="attention")
    monkeypatch.setattr("kvfold.exports.engines.folder.architecture_of", lambda config: odd)
    for form in ("compressed-tensors", "modelopt"):
        line = refused("export", form, tiny_artifact, tmp_path / "out")
        assert "'oddly'" in line and "model.layers.N.attention" in line


def test_a_head_that_nvfp4_cannot_cut(refused, tmp_path, tiny_artifact, monkeypatch):
    monkeypatch.setattr("kvfold.compress.targets.engines.FP4_BLOCK", 32)  # heads of 16 channels
    line = refused("export", "modelopt", tiny_artifact, tmp_path / "out")
    assert "head_dim 16" in line and "'llama'" in line and "multiple of 32" in line
    assert not list(tmp_path.iterdir())


def test_commands(tmp_path, tiny_artifact, text_file, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "kvfold",
            "export",
            "modelopt",
            str(tiny_artifact),
            str(tmp_path / "out"),
            "--calib",
            str(text_file),
        ],
    )
    with pytest.raises(SystemExit) as stop:
        main()
    out = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and out[-1] == str(tmp_path / "out")
    assert out[-2].startswith("4.500 payload bits")  # the artifact has fewer
    config = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert config["quantization"]["kv_cache_quant_algo"] == "NVFP4"
    assert char_tokenizer().vocab_size == len(
        json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    )
