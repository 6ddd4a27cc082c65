"""The main job on tiny models: the same twice, the same after a kill, every transform, every
family."""

import hashlib
import json
import signal
from pathlib import Path

import prepared
import pytest
import torch
from conftest import PLAIN, SHAPE, TINY_RECIPE, char_tokenizer, families, save_tiny
from transformers import MistralConfig, MistralForCausalLM

from kvfold import runtime
from kvfold.compress.evaluate import evaluate
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.exports.reader import read_artifact


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def recipe_with(tmp_path, extra):
    path = tmp_path / "recipe.yaml"
    path.write_text(TINY_RECIPE + extra)
    return load_recipe(path)


def test_the_same_twice_byte_for_byte(tmp_path, tiny_folder, tiny_artifact, text_file, recipe_file):
    out = tmp_path / "tiny"
    compress(str(tiny_folder), "4.0", out, calib=str(text_file), recipe=load_recipe(recipe_file))
    assert digest(out) == digest(tiny_artifact)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]
    other = compress(
        str(tiny_folder), "4.0", out, calib=str(text_file), recipe=load_recipe(recipe_file, seed=1)
    )
    assert digest(other.path) != digest(tiny_artifact)


KILLER = """
import os, signal, sys
real, left = os.replace, [int(sys.argv.pop(1))]
def replace(*args, **kwargs):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
os.replace = replace
from kvfold.compress.cli import main
main()
"""


@pytest.mark.parametrize(
    "moment", [3, 7, 9]
)  # a layer's statistics, a passage, the finished folder's rename
def test_killed_at_any_moment_resume_gives_the_same(
    moment, tmp_path, tiny_folder, tiny_artifact, text_file, recipe_file
):
    out = tmp_path / "tiny"
    options = ["--budget", "4.0", "--out", out, "--calib", text_file, "--recipe", recipe_file]
    killed = prepared.python("kvfold", KILLER, moment, "compress", tiny_folder, *options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists() and (tmp_path / "tiny.work").is_dir()
    compress(
        str(tiny_folder),
        "4.0",
        out,
        calib=str(text_file),
        recipe=load_recipe(recipe_file),
        resume=True,
    )
    assert digest(out) == digest(tiny_artifact)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


# what is folded into keys' weights is another thing in each family; else plain ones take turns
TRANSFORMED = {
    ("whiten", "rotate"): families("llama"),
    ("smooth", "balance"): families(*PLAIN),
    ("reorder", "reorder"): families("qwen2"),
    ("none", "none"): families("mistral"),
}


@pytest.mark.parametrize(
    ("key", "value", "family"),
    [
        pytest.param(*transforms, *family.values, marks=family.marks)
        for transforms, some in TRANSFORMED.items()
        for family in some
    ],
)
def test_every_transform_on_every_family(family, key, value, tmp_path, text_file, no_plots):
    source = save_tiny(tmp_path / "model", family)
    recipe = recipe_with(
        tmp_path,
        f"key: {{transform: {key}, group_size: {8 if key == 'reorder' else 0}}}\n"
        f"value: {{transform: {value}, group_size: {8 if value == 'reorder' else 0}}}\n"
        "rollback: 0\n",  # windows are so short that its rows would take bits from the pages
    )
    budget = "9.0" if key == "reorder" else "7.0"  # small groups: two bits go to parameters
    context = None
    if (
        family == "phi3"
    ):  # every layer slides: beside the 16-bit rows there is little to cache, and as many bits in that
        budget, context = {"9.0": "15.0", "7.0": "13.9"}[budget], 400
    artifact = compress(
        str(source), budget, tmp_path / "out", calib=str(text_file), recipe=recipe, context=context
    )
    account = artifact.metadata.account
    assert account.bytes <= artifact.metadata.budget.bytes and account.effective_bits <= float(
        budget
    )
    assert account.bytes == account.page_bytes + account.raw_bytes + account.table_bytes
    figures = evaluate(
        str(artifact.path),
        against=str(source),
        text=str(text_file),
        windows=2,
        seq_len=160,
        device="cpu",
    )
    assert figures.kl < 0.05 and figures.top1_agreement > 0.85
    assert figures.kl > 1e-6  # something was quantised


def test_a_sliding_window_stays_one(tmp_path, text_file):
    shape = {**SHAPE, "sliding_window": 50}
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**shape)).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "model")
    char_tokenizer().save_pretrained(tmp_path / "model")
    artifact = compress(
        str(tmp_path / "model"),
        "16",
        tmp_path / "out",
        calib=str(text_file),
        recipe=recipe_with(tmp_path, "rollback: 0\n"),
        context=400,
    )
    assert artifact.metadata.format_version == 5 and artifact.geometry.sliding == (50, 50, 50)
    figures = evaluate(
        str(artifact.path), text=str(text_file), windows=2, seq_len=160, device="cpu"
    )
    assert 1e-6 < figures.kl < 0.02  # a query that looked past its window would cost a nat
    with torch.no_grad():
        loaded = runtime.load_pretrained(artifact.path, device="cpu")
        ids = torch.randint(0, 128, (1, 190), generator=torch.Generator().manual_seed(0))
        other = ids.clone()
        other[:, :30] = (
            other[:, :30] + 1
        ) % 128  # out of reach of the last query through three layers' windows
        cache = [loaded(x[:, :-1]).past_key_values for x in (ids, other)]
        assert (
            [layer.num_pages() for layer in cache[0].layers]
            == [3] * 3
            == [20 - layer.table.sequences[0].passed for layer in cache[0].layers]
        )
        last = [loaded(ids[:, -1:], past_key_values=c).logits for c in cache]
    assert torch.equal(*last)


def test_fewer_bits_cost_more_and_predictions_follow(tmp_path, tiny_folder, text_file, recipe_file):
    kl = {}
    for budget in ("3.5", "5", "8"):
        artifact = compress(
            str(tiny_folder),
            budget,
            tmp_path / budget,
            calib=str(text_file),
            recipe=load_recipe(recipe_file),
        )
        predicted = sum(
            layer.key.predicted_loss + layer.value.predicted_loss
            for layer in artifact.metadata.layers
        )
        measured = evaluate(
            str(artifact.path), text=str(text_file), windows=4, seq_len=192, device="cpu"
        ).kl
        kl[budget] = measured, predicted
    assert kl["3.5"][0] > 2 * kl["5"][0] > 4 * kl["8"][0]
    assert kl["3.5"][1] > kl["5"][1] > kl["8"][1]
    assert 0.2 < kl["8"][0] / kl["8"][1] < 5  # a prediction, not a decoration


def test_wide_type_where_rounding_costs_too_much(
    tmp_path, tiny_folder, text_file, recipe_file, monkeypatch
):
    monkeypatch.setattr("kvfold.compress.export.ROUNDING_LIMIT", 1e-9)
    artifact = compress(
        str(tiny_folder),
        "4.0",
        tmp_path / "out",
        calib=str(text_file),
        recipe=load_recipe(recipe_file),
    )
    provenance = artifact.metadata.provenance
    assert provenance.fused_dtype == "float32" and provenance.rounding_kl > 1e-9
    from safetensors import safe_open

    with safe_open(artifact.path / "model.safetensors", "pt") as stored:
        types = {name.split(".")[-2]: stored.get_tensor(name).dtype for name in stored.keys()}  # noqa: SIM118
    assert types["v_proj"] == types["o_proj"] == torch.float32 and types["q_proj"] == torch.bfloat16


@torch.no_grad()
def test_the_checkpoint_is_a_plain_one_with_the_originals_logits(tiny_folder, tiny_artifact):
    from kvfold.autoclass import stock_from_pretrained

    ids = char_tokenizer()("a plain checkpoint", return_tensors="pt").input_ids
    original, stock = (
        stock_from_pretrained(p, dtype=torch.float32)(ids).logits
        for p in (tiny_folder, tiny_artifact)
    )
    assert (
        float((original - stock).norm() / original.norm()) < 0.05
    )  # bfloat16 rounding of random weights
    assert type(stock_from_pretrained(tiny_artifact)).__name__ == "LlamaForCausalLM"


@torch.no_grad()
def test_files_can_be_read_by_whom_the_umask_lets(tiny_artifact, tmp_path):
    fresh = tmp_path / "fresh"
    fresh.touch()
    assert {path.stat().st_mode for path in tiny_artifact.iterdir()} == {fresh.stat().st_mode}


def test_prediction_equals_the_cache_to_the_byte(tiny_artifact):
    model = runtime.load_pretrained(tiny_artifact, device="cpu")
    account = read_artifact(tiny_artifact).metadata.account
    ids = torch.randint(0, 128, (1, account.at), generator=torch.Generator().manual_seed(0))
    cache = model(ids).past_key_values
    assert cache.nbytes == account.bytes
    assert (
        json.loads((tiny_artifact / "kv_cache.json").read_text())["account"]["bytes"]
        == cache.nbytes
    )
