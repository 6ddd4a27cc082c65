"""A model read layer by layer gives the artifact of one read whole, byte for byte, and is never in
memory whole."""

import hashlib
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, FAMILIES, MORE_FAMILIES, save_tiny
from safetensors.torch import load_file, save_file

from kvfold.compress import search
from kvfold.compress.memory import room_for_weights
from kvfold.compress.models import load_model
from kvfold.compress.models.attention_hook import NAME
from kvfold.compress.models.streamed import (
    WeightFile,
    load_streamed,
    move_to_file,
    present,
    save_model,
)
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.compress.search import fold
from kvfold.errors import KvfoldError
from kvfold.exports.architectures import architecture_of
from kvfold.exports.files import weight_files
from kvfold.pretrained import config_from_pretrained

CPU = torch.device("cpu")
LITTLE = 1  # byte of memory, so that every model is read layer by layer


def streamed(folder, family="llama", dtype: torch.dtype | None = torch.float32):
    return load_streamed(folder, architecture_of(CONFIGS[family]()), dtype, CPU, NAME)


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_logits_and_saved_files_are_those_of_the_whole_model(family, tmp_path):
    folder = save_tiny(tmp_path / "model", family)
    ids = torch.randint(0, 128, (2, 50), generator=torch.Generator().manual_seed(0))
    lazy, whole = streamed(folder, family), load_model(folder, torch.float32, CPU)
    # also what is no weight: Gemma's factor on embeddings was once rounded to the files' type
    found, stored = dict(lazy.named_buffers()), whole.state_dict()
    for name, b in whole.named_buffers():
        if name not in stored:
            assert found[name].dtype == b.dtype and torch.equal(found[name], b)
    with torch.no_grad():
        assert torch.equal(lazy(ids).logits, whole(ids).logits)
    save_model(streamed(folder, family, None), tmp_path / "streamed")
    load_model(folder, "auto", CPU).save_pretrained(tmp_path / "whole")
    assert hashes(tmp_path / "streamed") == hashes(tmp_path / "whole")


def test_the_artifact_is_the_same(
    tmp_path, tiny_folder, tiny_artifact, text_file, recipe_file, monkeypatch
):
    read = []
    for module in ("kvfold.compress.search", "kvfold.compress.export"):
        monkeypatch.setattr(f"{module}.load_model", lambda *args: pytest.fail("read whole"))
    monkeypatch.setattr(
        "kvfold.compress.search.load_streamed",
        lambda *args: read.append(args) or load_streamed(*args),
    )
    out = tmp_path / "tiny"
    recipe = load_recipe(recipe_file)
    compress(str(tiny_folder), "4.0", out, calib=str(text_file), recipe=recipe, max_memory=LITTLE)
    assert len(read) == 1 and hashes(out) == hashes(tiny_artifact)


@pytest.fixture
def compress_streamed(tmp_path, text_file, recipe_file):
    """Compresses a tiny Llama that is read layer by layer, and returns its folder."""

    def run() -> Path:
        source = save_tiny(tmp_path / "model", "llama")
        recipe = load_recipe(recipe_file)
        compress(
            str(source), "6.0", tmp_path / "out", calib=str(text_file), recipe=recipe, max_memory=LITTLE
        )  # fmt: skip
        return source

    return run


def test_what_was_only_tried_leaves_no_tensors(compress_streamed, monkeypatch):
    """Candidates of all layers would take as much memory as the weights."""
    seen = []

    def choose(plan, keys, values, *losses):
        seen.extend(x.spec.matrix for row in keys for x in row)
        seen.extend(x.matrix for row in values for x in row if x.matrix.numel())
        return real(plan, keys, values, *losses)

    real = search.choose
    monkeypatch.setattr(search, "choose", choose)
    compress_streamed()
    assert len(seen) > 3 and all(x is None for x in seen)


def test_so_is_that_of_a_model_of_experts(tmp_path, text_file, recipe_file):
    folder = save_tiny(tmp_path / "model", "qwen3_moe")
    for name, most in (("streamed", LITTLE), ("whole", None)):
        out = tmp_path / name / "tiny"
        recipe = load_recipe(recipe_file)
        compress(
            str(folder),
            "9.0",
            out,
            calib=str(text_file),
            recipe=recipe,
            max_memory=most,
            accept_loss=True,
        )
    assert hashes(tmp_path / "streamed" / "tiny") == hashes(tmp_path / "whole" / "tiny")


def test_shards_and_ties_are_read_too(tmp_path):
    folder = save_tiny(tmp_path / "model", "gemma3_text")  # its head is its embedding
    whole = load_model(folder, torch.float32, CPU)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(weight_files(tmp_path / "shards")) > 2
    found = streamed(tmp_path / "shards", "gemma3_text")
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, whole(ids).logits)


def test_a_layer_is_in_memory_only_while_it_runs(tmp_path):
    model = streamed(save_tiny(tmp_path / "model"))
    seen: list[list[torch.dtype]] = []

    def note(module, args, kwargs=None):
        seen.append([layer.self_attn.o_proj.weight.dtype for layer in model.model.layers])

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(note)
    with torch.no_grad():
        model(torch.arange(9)[None])
    wide, stored = torch.float32, torch.bfloat16
    assert seen == [[wide, stored, stored], [stored, wide, stored], [stored, stored, wide]]
    assert model.model.layers[0].self_attn.o_proj.weight.dtype == stored


def test_changed_weights_go_into_a_file_without_a_name(tmp_path):
    model = streamed(save_tiny(tmp_path / "model"))
    weights = [layer.self_attn.q_proj.weight for layer in model.model.layers]
    with torch.no_grad():
        for x in weights:
            x.data = x.data.float().mul(2).to(x.dtype)
        kept, ids = [x.clone() for x in weights], torch.arange(30)[None]
        logits = model(ids).logits
        (tmp_path / "there").mkdir()
        move_to_file(model, weights, tmp_path / "there")
        assert list((tmp_path / "there").iterdir()) == []
        assert torch.equal(model(ids).logits, logits)
    assert all(torch.equal(*pair) for pair in zip(weights, kept, strict=True))
    moved = model.kvfold_stored.files[-1].tensors
    assert [x.data_ptr() for x in weights] == [
        moved[str(i)].data_ptr() for i in range(len(weights))
    ]
    whole = load_model(tmp_path / "model", torch.float32, CPU)
    move_to_file(whole, [whole.model.norm.weight], tmp_path / "nowhere")  # nothing to do


def test_folded_projections_are_in_files(compress_streamed, monkeypatch):
    """Those of all layers would be a third of the weights."""
    moved = []

    def move(model, weights, folder):
        moved.append(len(weights))
        move_to_file(model, weights, folder)

    monkeypatch.setattr(fold, "move_to_file", move)
    source = compress_streamed()
    count = config_from_pretrained(source).num_hidden_layers
    assert len(moved) == 2 * count and all(moved)  # to measure with, and in the artifact's type


def test_parts_of_a_layer_can_be_asked_while_it_is_present(tmp_path):
    folder = save_tiny(tmp_path / "model")
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for model in (streamed(folder), load_model(folder, torch.float32, CPU)):
        layer = model.model.layers[1]
        with present(layer), torch.no_grad():
            found.append(layer.mlp(x))
            with present(layer):
                found.append(layer.mlp(x))
    assert all(torch.equal(x, found[0]) for x in found)


def test_gradients_pass_through_layers_that_have_left_again(tmp_path):
    folder = save_tiny(tmp_path / "model")
    found = []
    for model in (streamed(folder), load_model(folder, torch.float32, CPU, NAME)):
        x = model.get_input_embeddings()(torch.arange(30)[None]).requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


def test_files_are_read_as_safetensors_reads_them(tmp_path):
    rng = torch.Generator().manual_seed(0)
    given = {
        "empty": torch.empty(0, 3),
        "odd": torch.randn(3, 5, generator=rng),
        "half": torch.randn(7, generator=rng).half(),
        "wide": torch.randn(2, 2, generator=rng).double(),
        "scalar": torch.tensor(2.5).bfloat16(),
    }
    save_file(given, tmp_path / "x.safetensors")
    file = WeightFile(tmp_path / "x.safetensors")
    for _ in range(2):
        expected = load_file(tmp_path / "x.safetensors")
        assert file.tensors.keys() == expected.keys()
        assert all(
            torch.equal(x, expected[name]) and x.dtype == expected[name].dtype
            for name, x in file.tensors.items()
        )
        file.release()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x: x.pop("model.norm.weight"), r"model\.norm\.weight in '.*' is missing"),
        (
            lambda x: x.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight in '.*' is of the wrong shape",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, words):
    folder = save_tiny(tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(KvfoldError, match=words):
        streamed(folder)


def test_weights_get_a_share_of_the_memory():
    assert room_for_weights(CPU, 1000) == 500
    assert 1 << 20 < room_for_weights(CPU) < 1 << 50
