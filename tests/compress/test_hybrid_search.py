"""Hybrid models before they are written: statistics, losses and folding of the layers that attend,
through those that don't; and gates behind attention."""

import hashlib
import json

import pytest
import torch
from conftest import CONFIGS, char_tokenizer, save_tiny, tiny_model
from family_checks import IDS, RECIPE, kl
from family_configs import VISION, config_of
from safetensors.torch import load_file
from several import several
from test_calibrate import SEQUENCES, captured
from test_fisher import GEOMETRY, make_probe, sides
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForImageTextToText

from kvfold import KvfoldError, runtime
from kvfold.compress.calibrate import SKIP_TOKENS, LayerStats, calibrate
from kvfold.compress.cli.table import describe, print_table
from kvfold.compress.fuse import fuse_values
from kvfold.compress.models import load_model
from kvfold.compress.models.attention_hook import NAME
from kvfold.compress.models.states import states_of
from kvfold.compress.pipeline import compress
from kvfold.compress.plan import make_plan
from kvfold.compress.recipe import Recipe
from kvfold.compress.search import fisher
from kvfold.compress.search.candidates import value_candidates
from kvfold.compress.search.first_order import first_order_losses
from kvfold.compress.search.sensitivity import packing_tap, specs_of
from kvfold.compress.targets.engines import export_compressed_tensors
from kvfold.compress.targets.onnx import export_onnx
from kvfold.exports.architectures import TEXT_ALONE, architecture_of, attention_layers_of
from kvfold.exports.page.report import account_parts
from kvfold.exports.reader import read_artifact

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("no_plots")


@torch.no_grad()
@pytest.mark.parametrize("family", ["granitemoehybrid", "nemotron_h", "falcon_h1"])
def test_statistics_are_those_of_an_ordinary_pass_also_where_a_run_stopped(
    family, tmp_path, monkeypatch
):
    model = load_model(save_tiny(tmp_path / "model", family), torch.float32, CPU, NAME)
    arch = architecture_of(CONFIGS[family]())
    places = attention_layers_of(model.config)
    save, saved = LayerStats.save, []

    def save_one(self, path):
        if saved:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(self, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LayerStats, "save", save_one)
        calibrate(model, arch, SEQUENCES, [1, 1], 64, tmp_path)
    hidden = json.loads((tmp_path / "hidden.json").read_text())["layer"]
    assert places[0] < hidden <= places[1]
    stats = calibrate(model, arch, SEQUENCES, [1, 1], 64, tmp_path)
    runs = [captured(model, arch, ids) for ids in SEQUENCES]
    assert len(stats) == len(places) == 2
    for place, found in zip(places, stats, strict=True):
        key = torch.cat([run[place][1][:, SKIP_TOKENS:] for run in runs], 1)
        torch.testing.assert_close(found.key_mean, key.mean(1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_next", "nemotron_h", "falcon_h1", "lfm2"])
def test_small_losses_are_the_measured_ones(family, tmp_path):
    """To second order, back through layers that don't attend, and by forward passes."""
    probe, (keys, values) = make_probe(family), sides(64)
    losses = fisher.Losses(fisher.Sweep(probe, GEOMETRY, 64, 0), tmp_path / "fisher.json")
    for layer in (1, 0):
        jobs = [("key", layer, 0), ("value", layer, 0)]
        found = losses.of_jobs(layer, jobs, keys, values)
        for job in jobs:
            tap = packing_tap(GEOMETRY, CPU, **specs_of(job[0], keys, values, layer, 0))
            measured = probe.measure(layer, tap)
            assert measured > 0
            assert found[job] == pytest.approx(measured, rel=0.35)
    alone = fisher.Losses(fisher.Sweep(probe, GEOMETRY, 64, 0), tmp_path / "alone.json")
    assert alone.of_jobs(0, jobs, keys, values) == found  # the layer behind it is passed through
    rough = first_order_losses(
        probe, [x.ids for x in probe.passages], keys[:2], values[:2], GEOMETRY
    )
    assert all(loss > 0 for side in rough for layer in side for loss in layer)


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def made(family, tmp_path, text_file, dtype=torch.bfloat16, budget="12", **options):
    folder = save_tiny(tmp_path / family, family, dtype)
    out = tmp_path / options.pop("name", "out") / "tiny"
    compress(
        str(folder), budget, out, calib=str(text_file), recipe=RECIPE, context=400,
        accept_loss=True, **options,
    )  # fmt: skip
    return folder, out


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text", "falcon_h1"])
def test_a_model_read_layer_by_layer_gives_the_same_artifact_which_saves_itself(
    family, tmp_path, text_file
):
    _, whole = made(family, tmp_path, text_file)
    _, streamed = made(family, tmp_path, text_file, name="streamed", max_memory=1)
    assert hashes(whole) == hashes(streamed)
    model = runtime.load_pretrained(whole, device="cpu", attention="reference")
    model.save_pretrained(tmp_path / "saved")
    assert hashes(tmp_path / "saved") == hashes(whole)


def test_several_processes_give_the_artifact_of_one(tmp_path, text_file):
    """Two sequences and two passages, also through layers that don't attend."""
    folder = save_tiny(tmp_path / "model", "granitemoehybrid")
    text = """
    {window: 24, page_tokens: 8, sinks: 3, calibration: {num_sequences: 2, seq_len: 192, sample_tokens: 96},
     sensitivity: {num_sequences: 2, seq_len: 128, directions: 2, conversations: 0}}
    """
    (tmp_path / "recipe.yaml").write_text(text)
    words = [f"--calib={text_file}", f"--recipe={tmp_path / 'recipe.yaml'}", "--budget=9"]
    words += ["--context=600", "--device=cpu", "--accept-loss"]
    outs = [tmp_path / name / "tiny" for name in ("one", "two")]
    for count, out in zip((1, 2), outs, strict=True):
        done = several(count, tmp_path / f"said{count}", "compress", folder, f"--out={out}", *words)
        assert [x.returncode for x in done] == [0] * count, [x.stderr for x in done]
    assert hashes(outs[0]) == hashes(outs[1])


def test_states_are_in_the_bytes_and_not_in_the_bits(tmp_path, text_file, capsys):
    _, out = made("qwen3_next", tmp_path, text_file)
    metadata = read_artifact(out).metadata
    states, account = metadata.cache.states, metadata.account
    assert (states.dtype, metadata.format_version) == ("bfloat16", 6)
    kept = states.elements * 2 + states.float32 * 4
    elements = metadata.geometry.elements(400, 2)
    assert account.bytes <= metadata.budget.bytes == 12 * elements // 8 + kept
    assert account.effective_bits == pytest.approx(8 * (account.bytes - kept) / elements)
    assert account.bytes_16bit == 2 * elements + kept
    parts = account.page_bytes + account.raw_bytes + account.table_bytes
    assert account.bytes == parts + kept
    shown = {name: nbytes for name, _, nbytes in account_parts(metadata)}
    assert sum(shown.values()) == account.bytes and shown["states"] == kept
    assert describe(metadata, 900)["state_bytes"] == describe(metadata)["state_bytes"] == kept
    print_table(metadata)
    assert f"({kept} bytes), which are in the bytes above" in capsys.readouterr().out
    request = f"{account.bytes}B@400"
    _, again = made("qwen3_next", tmp_path, text_file, name="bytes", budget=request)
    assert read_artifact(again).metadata.account.bytes <= account.bytes
    with pytest.raises(KvfoldError, match="out of reach"):
        made("qwen3_next", tmp_path, text_file, name="little", budget=f"{kept + 10}B@400")
    fields = json.loads((out / "config.json").read_text())
    fields["layer_types"][0] = "full_attention"
    (out / "config.json").write_text(json.dumps(fields))
    with pytest.raises(KvfoldError):
        read_artifact(out)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "types"),
    [
        ("granitemoehybrid", ["full_attention"] * 4),
        ("lfm2", ["full_attention"] * 4),
        ("nemotron_h", ["full_attention", "mlp", "full_attention", "mlp"]),
    ],
)
def test_a_model_of_a_hybrid_family_that_keeps_no_state_is_as_any_other(
    family, types, tmp_path, text_file, monkeypatch
):
    monkeypatch.setitem(CONFIGS, family, lambda: config_of(family, layer_types=types))
    _, out = made(family, tmp_path, text_file, torch.float32)
    metadata = read_artifact(out).metadata
    assert metadata.format_version == 5 and metadata.cache.states is None
    assert metadata.cache.num_layers == types.count("full_attention")
    model = runtime.load_pretrained(out, device="cpu", attention="reference", rollback=8)
    expected = tiny_model(family, attention="eager")(IDS, use_cache=False).logits
    whole = model(IDS)
    assert 0 < kl(expected, whole.logits) < 0.05
    cache = model(IDS[:, :100]).past_key_values
    model(IDS[:, 100:105], past_key_values=cache)
    cache.crop(-5)
    steps = [model(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(100, 104)]
    torch.testing.assert_close(torch.cat(steps, 1), whole.logits[:, 100:104], rtol=1e-2, atol=0.05)
    assert cache.is_croppable and not cache.states


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_next", "afmoe", "laguna"])
def test_values_behind_a_gate_are_ordered_and_scaled(family, tmp_path):
    """The channel that matters most comes first, each has unit variance, and attention gives what it gave."""
    model = load_model(save_tiny(tmp_path / "model", family), torch.float32, CPU, NAME)
    arch = architecture_of(model.config)
    assert arch.gate
    stats = calibrate(model, arch, SEQUENCES, [1, 1], 64, tmp_path)
    for found in value_candidates(stats[0], RECIPE, 0, bases="channels"):
        one = found.matrix != 0
        assert bool((one.sum(-1) == 1).all()) and bool((one.sum(-2) == 1).all())
        moment = found.matrix @ stats[0].attended_values @ found.matrix.mT
        felt = torch.linalg.inv(found.matrix).mT @ stats[0].output_metric
        felt = (felt @ torch.linalg.inv(found.matrix)).diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(moment.diagonal(dim1=1, dim2=2), torch.ones_like(felt))
        assert bool((felt.diff(dim=-1) <= 1e-12).all())
    attention = arch.attention_modules(model)[0]
    mixed = torch.linalg.qr(torch.randn(2, 16, 16, dtype=torch.float64))[0]
    with pytest.raises(AssertionError, match="lets no mixed channels through"):
        fuse_values(attention, mixed, arch.gate)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(TEXT_ALONE))
def test_a_checkpoint_of_towers_is_read_as_its_language_model_alone(
    family, tmp_path, text_file, capsys
):
    kind = CONFIG_MAPPING[family]
    tower = kind().vision_config
    vision = {name: value for name, value in VISION.items() if hasattr(tower, name)}
    text = CONFIGS[f"{family}_text"]()
    config = kind(
        text_config=text.to_dict(), vision_config={**vision, "model_type": tower.model_type}
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "model")
    char_tokenizer().save_pretrained(tmp_path / "model")
    outs = [tmp_path / name / "tiny" for name in ("whole", "streamed")]
    for out, most in zip(outs, (None, 1), strict=True):
        compress(
            str(tmp_path / "model"), "12", out, calib=str(text_file), recipe=RECIPE, context=400,
            accept_loss=True, max_memory=most,
        )  # fmt: skip
    assert "the artifact reads no images" in capsys.readouterr().err
    assert hashes(outs[0]) == hashes(outs[1])
    packed = runtime.load_pretrained(outs[0], device="cpu", attention="reference")
    assert packed.config.model_type == f"{family}_text"
    assert 0 < kl(model(input_ids=IDS).logits, packed(IDS).logits) < 1e-3


def test_what_a_gate_or_a_state_does_not_allow_is_refused(tmp_path, text_file):
    folder = save_tiny(tmp_path / "model", "qwen3_next")
    for recipe, words in (
        ({"value": {"transform": "rotate"}}, "value.transform 'rotate' mixes channels"),
        ({"value": {"transform": "balance"}}, "choose whiten, none, reorder"),
        ({"rollback": 16}, "rollback 16 keeps rows for tokens that are taken back"),
        ({"key": {"transform": "smooth"}}, "rotates 4 of 16 channels"),
    ):
        with pytest.raises(KvfoldError) as caught:
            make_plan(str(folder), "12", str(text_file), Recipe.model_validate(recipe), 400)
        assert words in str(caught.value)
    plan = make_plan(str(folder), "12", str(text_file), Recipe(), 400)
    assert plan.geometry.rollback == plan.recipe.rollback == 0 and plan.num_layers == 2
    config = CONFIGS["granitemoehybrid"]()
    config.layer_types = ["linear_attention"] * 4
    tiny_model("granitemoehybrid").save_pretrained(tmp_path / "none")
    config.save_pretrained(tmp_path / "none")
    with pytest.raises(KvfoldError, match=r"None of the 4 layers .* attends"):
        make_plan(str(tmp_path / "none"), "12", str(text_file), Recipe(), 400)
    odd = CONFIGS["qwen3_next"]()
    odd.linear_num_value_heads = 3  # of 2 key heads
    with pytest.raises(
        KvfoldError, match="Layer 0 of this 'qwen3_next' model, which keeps a state"
    ):
        states_of(odd, architecture_of(odd))
    heads = CONFIGS["laguna"]()
    heads.num_attention_heads_per_layer = [4, 8]
    with pytest.raises(KvfoldError, match="query heads of several numbers"):
        architecture_of(heads)


def test_exports_name_the_layers_that_attend_or_refuse(tmp_path, text_file):
    pytest.importorskip("compressed_tensors")
    _, out = made("granitemoehybrid", tmp_path, text_file)
    export_compressed_tensors(out, tmp_path / "engine", "tensor", None, CPU)
    found = {}
    for file in (tmp_path / "engine").glob("*.safetensors"):
        found |= load_file(file)
    scales = sorted(name for name in found if name.endswith("k_scale"))
    assert scales == [f"model.layers.{i}.self_attn.k_scale" for i in (1, 3)]
    with pytest.raises(KvfoldError, match="cannot be expressed in ONNX"):
        export_onnx(out, tmp_path / "onnx", "packed", None, None, CPU)
