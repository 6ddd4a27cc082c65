"""Layers that read the keys and values of an earlier one, and heads of several shapes (gemma4): what
the search measures, what is folded where, and what the cache does with them."""

import json

import pytest
import torch
from conftest import CONFIGS, save_tiny, tiny_model
from family_checks import IDS, RECIPE, relative
from family_configs import config_of

from kvfold import KvfoldError, runtime
from kvfold.autoclass import stock_from_pretrained
from kvfold.compress.calibrate import SKIP_TOKENS, calibrate
from kvfold.compress.models.attention_hook import NAME as TAP
from kvfold.compress.models.attention_hook import tapped
from kvfold.compress.pipeline import compress
from kvfold.compress.plan import make_plan
from kvfold.compress.readers import with_readers
from kvfold.compress.recipe import Recipe
from kvfold.compress.search import measure
from kvfold.compress.search.fisher import Sweep
from kvfold.compress.search.sensitivity import Passage, Probe
from kvfold.exports.account import batch_nbytes
from kvfold.exports.architectures import architecture_of, heads_of, readers_of, shared_layers_of
from kvfold.exports.reader import read_artifact
from kvfold.runtime.cache.layer import PackedLayer

FULL, SLIDING = "full_attention", "sliding_attention"
# as the small models have it: layers of both types are read by several others
MANY = {"num_hidden_layers": 7, "layer_types": [SLIDING, FULL, SLIDING, SLIDING, SLIDING, SLIDING, FULL],
        "num_kv_shared_layers": 3}  # fmt: skip
# as the large ones: values of full layers come of the keys' projection, and no layer is shared
JOINT = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0}

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def made(monkeypatch):
    def make(**own):
        monkeypatch.setitem(CONFIGS, "gemma4_text", lambda: config_of("gemma4_text", **own))
        return CONFIGS["gemma4_text"]()

    return make


@pytest.fixture
def packed(made, tmp_path, text_file):
    def make(budget="13.5", recipe=RECIPE, **own):
        made(**own)
        source = save_tiny(tmp_path / "model", "gemma4_text", torch.float32)
        return source, compress(
            str(source), budget, tmp_path / "out", calib=str(text_file), recipe=recipe, context=400
        )

    return make


def test_who_reads_what(made):
    config = made(**MANY)
    assert readers_of(config) == {0: (), 1: (6,), 2: (), 3: (4, 5)}
    assert shared_layers_of(config) == (1, 3)
    assert heads_of(config) == ((2, 16), (2, 32), (2, 16), (2, 16))
    config = made(**JOINT)
    assert shared_layers_of(config) == () and heads_of(config)[2] == (1, 32)


@torch.no_grad()
def test_gradients_go_back_through_what_others_read(made):
    """Of both keys and values: a sweep's, against one backward pass through the whole model."""
    made(**MANY)
    model = tiny_model("gemma4_text", attention=TAP)
    probe = Probe(model, architecture_of(model.config), [Passage(IDS[:1, :60])])
    sweep = Sweep(probe, None, 2, 0)
    while sweep.next >= 0:
        sweep._back(0)
        sweep.next -= 1
    found = sweep.gradients[0]
    from kvfold.compress.search.fisher import directions

    runner = probe.runners[0]
    with torch.enable_grad():
        leaf = runner.embedded.detach().requires_grad_()
        normed = probe.normed(0, runner.run_from(0, leaf))
        for i, direction in enumerate(directions(probe, 0, normed.detach(), 2, 0)):
            (expected,) = torch.autograd.grad(normed, leaf, direction, retain_graph=True)
            assert relative(found[i], expected) < 1e-5


def test_losses_to_second_order_are_those_that_are_measured(made, tmp_path, text_file):
    made(**MANY)
    source, losses = save_tiny(tmp_path / "model", "gemma4_text", torch.float32), {}
    for method in ("fisher", "kl"):
        recipe = RECIPE.model_dump()
        recipe["key"]["mean_factors"] = [1.0]
        recipe["sensitivity"] |= {"method": method, "directions": 48, "stride": 1}
        plan = make_plan(str(source), "14.5", str(text_file), Recipe.model_validate(recipe), 400)
        (tmp_path / method).mkdir()
        x = measure(plan, tmp_path / method, torch.device("cpu"))
        losses[method] = torch.tensor(
            [a[0] for side in (x.key_losses, x.value_losses) for a in side]
        )
    ratio = losses["fisher"] / losses["kl"]
    assert float(ratio.min()) > 0.5 and float(ratio.max()) < 2


@torch.no_grad()
def test_layers_that_are_shared_keep_what_is_read_until_the_call_is_over(packed, monkeypatch):
    """Never more than the account says, and as much as it says between calls."""
    _, artifact = packed(**MANY)
    model = runtime.load_pretrained(artifact.path, device="cpu", attention="reference")
    attend, peaks = PackedLayer.attend, []

    def watched(layer, *args):
        out = attend(layer, *args)
        peaks.append(cache.nbytes)
        return out

    monkeypatch.setattr(PackedLayer, "attend", watched)
    cache, seen = model.new_kv_cache(), 0
    for tokens in (100, 41, 1, 1, 7):
        peaks.clear()
        model(IDS[:1, seen : seen + tokens], past_key_values=cache, logits_to_keep=1)
        seen += tokens
        most = batch_nbytes(cache.geometry, artifact.formats, [seen], tokens)
        assert max(peaks) <= most and cache.nbytes == batch_nbytes(
            cache.geometry, artifact.formats, [seen]
        )
        assert cache.get_seq_length() == seen and len(cache.layers) == 4


@torch.no_grad()
@pytest.mark.parametrize("own", [MANY, JOINT], ids=["shared", "values of keys"])
def test_what_is_folded_and_written(packed, own):
    source, artifact = packed(**own)
    old, new = (
        stock_from_pretrained(path, dtype=torch.float64) for path in (source, artifact.path)
    )
    assert relative(new(IDS, use_cache=False).logits, old(IDS, use_cache=False).logits) < 1e-5
    before, after = old.state_dict(), new.state_dict()
    changed = {
        name.removeprefix("model.layers.").removesuffix("_proj.weight")
        for name in before
        if not torch.equal(before[name], after[name])
    }
    expected = {f"{i}.self_attn.o" for i in range(7)} | {f"{i}.self_attn.v" for i in range(4)}
    if own is JOINT:  # layers 2, 4 and 5 are full
        expected = {f"{i}.self_attn.{side}" for i in (0, 1, 3) for side in "vo"}
    assert changed == expected
    fields = json.loads((artifact.path / "kv_cache.json").read_text())
    assert fields["format_version"] == 7 and ("shared" in fields["cache"]) == (own is MANY)


@pytest.mark.parametrize(
    "change", [{"shared": [1]}, {"heads": [[2, 16], [2, 32], [2, 16], [2, 32]]}]
)
def test_another_models_layers_are_refused(packed, change):
    from kvfold.exports.schema import dump_metadata

    _, artifact = packed(**MANY)
    metadata = artifact.metadata
    cache = metadata.cache.model_copy(update=change)
    path = artifact.path / "kv_cache.json"
    path.write_text(dump_metadata(metadata.model_copy(update={"cache": cache})))
    with pytest.raises(KvfoldError, match=r"config.json has|a format covers"):
        read_artifact(artifact.path)


def test_scales_of_pairs_go_into_every_norm_of_queries(packed):
    recipe = RECIPE.model_dump()
    recipe["key"] |= {"transform": "smooth", "bits": []}
    source, artifact = packed("14.5", Recipe.model_validate(recipe), **MANY)
    with torch.no_grad():
        old, new = (
            stock_from_pretrained(path, dtype=torch.float64) for path in (source, artifact.path)
        )
        assert relative(new(IDS, use_cache=False).logits, old(IDS, use_cache=False).logits) < 1e-5
    moved = [
        not torch.equal(a.self_attn.q_norm.weight, b.self_attn.q_norm.weight)
        for a, b in zip(old.model.layers, new.model.layers, strict=True)
    ]
    assert all(moved)


def test_options_that_cannot_be_are_refused(packed):
    _, artifact = packed(**MANY)
    with pytest.raises(
        KvfoldError, match="read the keys and values of others; leave cuda_graph out"
    ):
        runtime.load_pretrained(artifact.path, device="cpu", cuda_graph=True)
    recipe = RECIPE.model_dump()
    recipe["value"] |= {"levels": []}
    with pytest.raises(KvfoldError, match=r"value.levels is empty, but values .* are normalised"):
        packed(recipe=Recipe.model_validate(recipe))


@torch.no_grad()
def test_queries_of_all_readers_count(made, tmp_path):
    """As those of an ordinary pass do, and again where a run goes on."""
    made(**MANY)
    model = tiny_model("gemma4_text", attention=TAP)
    arch, ids = architecture_of(model.config), IDS[:1, :60]
    plain = calibrate(model, arch, [ids], [1], 32, tmp_path)
    stats = with_readers(plain, model, arch, [ids], [1], SKIP_TOKENS, tmp_path)
    assert all(stats[i] is plain[i] for i in (0, 2))
    for layer, modules in ((1, (1, 6)), (3, (3, 4, 5))):
        moments, seen = [], {}
        for i in modules:
            with tapped(
                model.model.layers[i].self_attn,
                lambda module, query, *rest, seen=seen, **extras: seen.update(query=query),
            ):
                model(ids, use_cache=False)
            q = seen["query"][0, :, SKIP_TOKENS:].double().unflatten(0, (2, -1)).flatten(1, 2)
            moments.append(q.mT @ q / q.shape[1])
        torch.testing.assert_close(stats[layer].query_moment, torch.stack(moments).mean(0))
        assert not torch.allclose(stats[layer].query_moment, plain[layer].query_moment)
    kept = torch.equal(
        with_readers(plain, model, arch, [ids], [7], SKIP_TOKENS, tmp_path)[1].query_moment,
        stats[1].query_moment,
    )
    assert kept  # what the folder has is taken, whatever it was found with
