"""The recipes that ship, and SKVQ's and PM-KVQ's formulas computed anew on small cases."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CONFIGS, save_tiny, tiny_model
from test_transforms import make_stats, output_weight

from kvfold.compress.evaluate import evaluate
from kvfold.compress.models.attention_hook import NAME, tapped
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import Recipe, load_recipe, shipped_recipes
from kvfold.compress.search import choose, sensitivity
from kvfold.compress.search.candidates import CLIPS, best_clip, key_candidates, value_candidates
from kvfold.compress.search.extrapolation import extrapolate, probed
from kvfold.compress.search.first_order import first_order_losses, gradients
from kvfold.compress.search.sensitivity import Passage, Probe, packing_tap
from kvfold.compress.transforms import Request
from kvfold.compress.transforms.smooth import pair_scale, smooth
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import architecture_of, head_dim_of
from kvfold.exports.reader import read_artifact
from kvfold.exports.spec import KeySpec, ValueSpec
from kvfold.kernels.catalogue import key_formats, value_formats
from kvfold.kernels.catalogue import pairs as listed_pairs
from kvfold.kernels.formats import Format, uniform

SMALL = {
    "window": 24,
    "page_tokens": 16,
    "calibration": {"num_sequences": 2, "seq_len": 256, "sample_tokens": 128},
}


def small(name: str) -> Recipe:
    """A recipe that ships, on less text and with a shorter window."""
    recipe = load_recipe(name).model_dump()
    recipe |= {"window": 24, "page_tokens": 16}
    recipe["calibration"] |= SMALL["calibration"]
    recipe["sensitivity"] |= {"num_sequences": 1, "seq_len": 192}
    return Recipe.model_validate(recipe)


def test_the_default_is_best_and_best_says_everything():
    assert load_recipe() == load_recipe("best") == Recipe()
    assert set(shipped_recipes()) == {"best", "skvq", "skvq-v1.5", "pm-kvq"}


@pytest.mark.parametrize("name", ["best", "skvq", "skvq-v1.5", "pm-kvq"])
def test_a_dumped_recipe_reads_back(name, tmp_path):
    recipe = load_recipe(name, seed=3)
    (tmp_path / "again.yaml").write_text(recipe.dump())
    assert load_recipe(tmp_path / "again.yaml") == recipe and recipe.seed == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("key: {transform: reorder, bits: [2]}", ["key", "mixed formats"]),
        ("key: {transform: smooth, without: [metric]}", ["without"]),
        ("key: {without: [everything]}", ["key.without.0"]),
        ("key: {bits: [], levels: []}", ["nothing to choose"]),
        ("value: {levels: [5]}", ["value.levels", "256"]),
        ("value: {transform: rotate, levels: []}", ["value", "nothing to choose"]),
        ("tied: true", ["tied"]),
        ("sensitivity: {method: magic}", ["sensitivity.method"]),
    ],
)
def test_what_contradicts_itself_is_refused(text, words, tmp_path):
    (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(KvfoldError) as error:
        load_recipe(tmp_path / "some.yaml")
    assert all(word in str(error.value) for word in words), error.value


def test_an_unknown_name_lists_those_that_ship():
    with pytest.raises(KvfoldError, match=r"best, pm-kvq, skvq, skvq-v1\.5"):
        load_recipe("skvk")


# -- SKVQ


def numpy_round_trip(x, levels, clip):
    """Clipped dynamic quantisation of one group, float [S, n], with e4m3 parameters, written
    anew."""

    def e4m3(a):
        return torch.tensor(np.clip(a, -448, 448)).to(torch.float8_e4m3fn).float().numpy()

    low, high = (
        x.min(-1, keepdims=True) * np.float32(clip),
        x.max(-1, keepdims=True) * np.float32(clip),
    )
    scale, low = e4m3((high - low) / np.float32(levels - 1)), e4m3(low)
    return np.clip(np.round((x - low) / np.maximum(scale, 1e-38)), 0, levels - 1) * scale + low


def test_the_clip_of_each_group_is_the_best_of_the_grid():
    x = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [0.3] * 8 + [4.0] * 8
    )
    root = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    metric = root @ root.mT
    clip = best_clip(x, uniform(16, 4, "e4m3", 8), metric)
    assert clip.shape == (2, 2)
    for head, group in itertools.product(range(2), range(2)):
        part = slice(8 * group, 8 * group + 8)
        own, weight = x[head, :, part].numpy(), metric[head, part, part].numpy()
        errors = []
        for tried in CLIPS:
            delta = (numpy_round_trip(own, 4, tried) - own).astype(np.float64)
            errors.append(np.einsum("ti,ij,tj->", delta, weight, delta))
        assert float(clip[head, group]) == pytest.approx(CLIPS[int(np.argmin(errors))])
    assert float(clip.max()) < 1
    assert best_clip(x, uniform(16, 4), metric).shape == (2,)


@pytest.mark.parametrize("name, levels", [("skvq", (4, 4)), ("skvq-v1.5", (4, 3))])
def test_skvq_has_one_format_a_side_with_fp8_parameters(name, levels):
    stats, recipe = make_stats(head_dim=256), load_recipe(name)
    [key], [value] = key_candidates(stats, recipe, 0, False), value_candidates(stats, recipe, 0)
    assert (key.spec.format, value.spec.format) == tuple(
        uniform(256, n, "e4m3", 128) for n in levels
    )
    assert key.spec.clip.shape == value.spec.clip.shape == (2, 2)
    assert (
        key.pair_scale is None and key.spec.offset is None
    )  # a permutation, where keys are written
    assert torch.equal(key.spec.matrix.sum(1), torch.ones(2, 256)) and bool(
        (key.spec.matrix.max(1).values == 1).all()
    )
    scale = value.matrix.max(1).values  # a permutation times a power of two, in the weights
    assert torch.equal(scale, scale[:, :1].expand_as(scale)) and torch.equal(
        scale.log2(), scale.log2().round()
    )
    assert (recipe.sinks, recipe.window, recipe.calibration.spread) == (5, 128, 1)
    small_head = key_candidates(make_stats(head_dim=64), recipe, 0, False)[0].spec.format
    assert small_head == uniform(64, levels[0], "e4m3") and small_head.payload_bits == 2.25


def test_fixed_formats_only_need_a_budget_that_reaches(tmp_path, tiny_folder, text_file):
    recipe = small("skvq-v1.5")
    artifacts = [
        compress(
            str(tiny_folder),
            budget,
            tmp_path / budget,
            calib=str(text_file),
            recipe=recipe,
            accept_loss=True,
        )
        for budget in ("7", "9")
    ]
    formats = [a.metadata.formats for a in artifacts]
    assert formats[0] == formats[1] == [(uniform(16, 4), uniform(16, 3))] * 3
    assert [a.metadata.layers[0].key.transforms for a in artifacts] == [["reorder"]] * 2
    with pytest.raises(KvfoldError, match="ask for at least"):
        compress(str(tiny_folder), "2", tmp_path / "no", calib=str(text_file), recipe=recipe)


def test_a_clip_for_each_group_goes_through_the_artifact(tmp_path, tiny_folder, text_file):
    recipe = small("skvq").model_dump()
    for side in ("key", "value"):
        recipe[side] |= {"group_size": 8, "levels": (16,)}
    out = tmp_path / "out"
    made = compress(
        str(tiny_folder), "9", out, calib=str(text_file), recipe=Recipe.model_validate(recipe)
    )
    for layer in read_artifact(out).specs:
        assert layer.key.clip.shape == layer.value.clip.shape == (2, 2)
    predicted = sum(
        layer.key.predicted_loss + layer.value.predicted_loss for layer in made.metadata.layers
    )
    measured = evaluate(str(out), text=str(text_file), windows=2, seq_len=192, device="cpu").kl
    assert 0.2 < measured / predicted < 5


# -- PM-KVQ


def test_pair_scales_are_powers_of_the_pairs_largest_magnitude():
    stats = make_stats(kind="bias")
    largest = stats.key_sample.abs().amax(1).double()  # the sample is all there is here
    for alpha in (0.0, 0.35, 1.0):
        scale = pair_scale(stats, alpha)
        for head, i in itertools.product(range(2), range(8)):
            expected = max(float(largest[head, i]), float(largest[head, i + 8])) ** alpha
            assert float(scale[head, i]) == float(scale[head, i + 8]) == pytest.approx(expected)
    assert torch.equal(*pair_scale(stats, 0.5, shared=True))


def numpy_fp16_round_trip(x, levels):
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scale = ((high - low) / np.float32(levels - 1)).astype(np.float16).astype(np.float32)
    low = low.astype(np.float16).astype(np.float32)
    return np.clip(np.round((x - low) / scale), 0, levels - 1) * scale + low


def test_smoothing_takes_the_least_error_of_the_attentions_output():
    stats, weight = make_stats(kind="bias", tokens=90), output_weight()
    q, k, v = (
        x.numpy().astype(np.float64)
        for x in (stats.query_sample, stats.key_sample, stats.value_sample)
    )

    def output(keys, values):
        rows = []
        for start, end in ((0, 45), (45, 90)):  # two sequences that do not see each other
            for t in range(start, end):
                heads = []
                for h in range(2):
                    logits = keys[h, start : t + 1] @ q[h, t] / 4
                    p = np.exp(logits - logits.max())
                    heads.append(p / p.sum() @ values[h, start : t + 1])
                rows.append(np.concatenate(heads) @ weight.numpy().T.astype(np.float64))
        return np.array(rows)

    target, errors = output(k, v), []
    for step in range(21):
        s = pair_scale(stats, step / 20).numpy().astype(np.float32)[:, None]
        keys = numpy_fp16_round_trip(stats.key_sample.numpy() / s, 16) * s
        values = numpy_fp16_round_trip(stats.value_sample.numpy(), 16)
        errors.append(np.square(output(keys, values) - target).mean())
    found = smooth(stats, Request(uniform(16, 16, "fp16"), output_weight=weight)).fused
    assert found is not None and min(errors) < errors[0]
    expected = pair_scale(stats, int(np.argmin(errors)) / 20)
    torch.testing.assert_close(1 / found.diagonal(dim1=-2, dim2=-1), expected)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2", "gpt_oss"])
def probe(request):
    model = tiny_model(request.param)
    model.set_attn_implementation(NAME)
    model.requires_grad_(False)
    ids = [
        torch.randint(0, 128, (1, n), generator=torch.Generator().manual_seed(n)) for n in (41, 33)
    ]
    with torch.no_grad():
        return Probe(
            model, architecture_of(CONFIGS[request.param]()), [Passage(x, 4) for x in ids]
        ), ids


@torch.no_grad()
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "phi3", "smollm3"])
def test_a_probe_that_leaves_the_first_positions_out_measures_the_same(family, kept, monkeypatch):
    """Positions that read no page, in families with windows, soft-caps, sink logits and layers
    without RoPE."""
    if not kept:
        monkeypatch.setattr(sensitivity, "BASE_NBYTES", 0)
    model = tiny_model(family)
    model.set_attn_implementation(NAME)
    geometry = Geometry(model.config.num_key_value_heads, head_dim_of(model.config), 3, 16, 8)
    ids = [
        torch.randint(0, 128, (1, n), generator=torch.Generator().manual_seed(n))
        for n in (75, 61, 20)
    ]
    arch = architecture_of(CONFIGS[family]())
    passages = [Passage(ids[0], 4), Passage(ids[1], start=41), Passage(ids[2], 3, start=7)]
    whole, late = (Probe(model, arch, passages, early) for early in (0, 3 + 16 + 8 - 1))
    assert whole.early == [0, 0, 0] and late.early == [26, 26, 19]
    assert [len(x) for x in late.final.values()] == [x.positions for x in passages] == [19, 20, 5]
    assert (late.base is not None) == kept
    keys = KeySpec(uniform(geometry.head_dim, 3))
    for layer in range(3):
        tap = packing_tap(geometry, late.device, keys, ValueSpec(uniform(geometry.head_dim, 4)))
        one, other = (probe.measure(layer, tap) for probe in (whole, late))
        assert one > 1e-6 and other == pytest.approx(one, rel=1e-3)


@torch.no_grad()
def test_gradients_of_keys_and_values_are_those_of_the_loss(probe):
    probe, ids = probe
    found = gradients(probe, 0, ids[0])
    labels = ids[0][0, 1:]

    def loss(layer, which, place, step):
        def tap(module, query, key, value, mask, scaling, **extras):
            if module.layer_idx == layer:  # in place: the attention goes on with these
                (key, value)[which][(0, *np.unravel_index(place, key.shape[1:]))] += step

        with tapped(probe.attentions[layer], tap):
            logits = probe.model(ids[0], use_cache=False).logits[0, :-1].double()
        return float(torch.nn.functional.cross_entropy(logits, labels))

    for layer, which in itertools.product(range(3), range(2)):
        gradient = found[layer][2 + which].flatten()
        for place in gradient.abs().topk(3).indices.tolist():
            numeric = (loss(layer, which, place, 0.02) - loss(layer, which, place, -0.02)) / 0.04
            assert float(gradient[place]) == pytest.approx(numeric, rel=0.03, abs=2e-5)


@torch.no_grad()
def test_first_order_losses_are_the_sum_of_gradient_times_error(probe):
    probe, ids = probe
    stats, recipe = make_stats(), small("pm-kvq")
    keys = [key_candidates(stats, recipe, i, False, output_weight()) for i in range(3)]
    values = [value_candidates(stats, recipe, i) for i in range(3)]
    losses = first_order_losses(probe, ids, keys, values, Geometry(2, 16, 1, 24, 16))
    assert [len(group) for group in losses[0]] == [4, 4, 4]
    expected = np.zeros((2, 3))
    for index, sequence in enumerate(ids):
        for layer, (k, v, gk, gv) in enumerate(gradients(probe, index, sequence)):
            scale = keys[layer][1].pair_scale.float()[:, None].numpy()
            smoothed = numpy_fp16_round_trip(k.numpy() / scale, 16) * scale
            power = float(values[layer][1].matrix[0, 0, 0]), float(values[layer][1].matrix[1, 0, 0])
            by = np.array(power, dtype=np.float32)[:, None, None]
            stored = (
                numpy_fp16_round_trip((v.numpy() * by).astype(np.float16).astype(np.float32), 16)
                / by
            )
            for side, (x, y, g) in enumerate(((k.numpy(), smoothed, gk), (v.numpy(), stored, gv))):
                expected[side, layer] += np.abs((y - x)[:, 1:] * g.numpy()[:, 1:]).sum() / 2
    for side, layer in itertools.product(range(2), range(3)):
        assert losses[side][layer][1] == pytest.approx(expected[side, layer], rel=0.02)
        assert (
            losses[side][layer][0]
            > losses[side][layer][1]
            > losses[side][layer][2]
            > losses[side][layer][3]
        )


@pytest.mark.parametrize("share", [0.05, 0.3, 0.62, 1.0])
def test_tied_allocation_is_the_integer_programs_optimum(share):
    recipe, geometry = small("pm-kvq"), Geometry(2, 64, 1, 24, 16)
    formats = recipe.key.uniform_formats(64)
    group = [SimpleNamespace(spec=SimpleNamespace(format=f)) for f in formats]
    rng = np.random.default_rng(0)
    losses = [[sorted(rng.random(4), reverse=True) for _ in range(3)] for _ in range(2)]
    nbytes = [geometry.side_nbytes(f, 600) for f in formats]
    fixed = 3 * geometry.fixed_nbytes(600)
    budget = int(fixed + 6 * nbytes[0] + share * 6 * (nbytes[-1] - nbytes[0]))
    plan = SimpleNamespace(
        geometry=geometry,
        budget=SimpleNamespace(at=600, nbytes=budget, request="x"),
        num_layers=3,
        recipe=recipe,
    )
    found = choose(plan, [group] * 3, [group] * 3, *losses)

    def cost(choice):
        return sum(losses[0][i][c] + losses[1][i][c] for i, c in enumerate(choice))

    fitting = [
        c
        for c in itertools.product(range(4), repeat=3)
        if fixed + 2 * sum(nbytes[i] for i in c) <= budget
    ]
    assert all(k == v for k, v in found)
    assert cost([k for k, _ in found]) == pytest.approx(min(map(cost, fitting)), abs=1e-4)


def chosen_pairs(pairs, own=False):
    """(pairs of the layers, loss) of a choice for 8 layers of 4 formats a side; `own`: every layer
    has one more of its own."""
    geometry, rng = Geometry(2, 64, 1, 24, 16), np.random.default_rng(1)
    formats = [uniform(64, n) for n in (4, 8, 16, 32)]
    layers = []
    for layer in range(8):
        more = (
            [Format(((8 * (layer % 7) + 8, 4), (56 - 8 * (layer % 7), 2)))]
            if own and layer % 7 < 6
            else []
        )
        layers.append([SimpleNamespace(spec=SimpleNamespace(format=f)) for f in [*more, *formats]])
    weights = rng.lognormal(0, 1, (2, 8))
    losses = [
        [
            [w * 4.0**-c.spec.format.payload_bits for c in group]
            for w, group in zip(row, layers, strict=True)
        ]
        for row in weights
    ]
    fixed, half = (
        8 * geometry.fixed_nbytes(600),
        sum(geometry.side_nbytes(f, 600) for f in formats[1:3]),
    )
    recipe = Recipe.model_validate({"pairs": pairs})
    budget = SimpleNamespace(at=600, nbytes=fixed + 8 * half, request="x")
    plan = SimpleNamespace(geometry=geometry, budget=budget, num_layers=8, recipe=recipe)
    found = choose(plan, layers, layers, *losses)
    formats_of = [
        (layers[i][k].spec.format, layers[i][v].spec.format) for i, (k, v) in enumerate(found)
    ]
    spent = fixed + sum(geometry.side_nbytes(f, 600) for pair in formats_of for f in pair)
    assert spent <= budget.nbytes
    return formats_of, sum(losses[0][i][k] + losses[1][i][v] for i, (k, v) in enumerate(found))


def test_a_limit_on_pairs_holds_costs_something_and_is_left_alone_where_it_does_not_bind():
    free, least = chosen_pairs(0)
    assert len(set(free)) > 3
    assert chosen_pairs(len(set(free))) == (free, least)
    losses = [least]
    for pairs in (3, 2, 1):
        found, loss = chosen_pairs(pairs)
        assert len(set(found)) <= pairs and loss >= losses[-1]
        losses.append(loss)
    assert losses[-1] > losses[0]


def test_layers_that_make_their_own_cuts_are_not_limited():
    assert chosen_pairs(1, own=True) == chosen_pairs(0, own=True)


def test_pm_kvq_ties_keys_and_values_and_covers_the_context(tmp_path, text_file):
    source = save_tiny(tmp_path / "model", "qwen2")
    artifact = compress(
        str(source), "8", tmp_path / "out", calib=str(text_file), recipe=small("pm-kvq")
    )
    metadata = artifact.metadata
    assert (
        metadata.cache.sinks == 1 and metadata.calibration.covered_positions >= metadata.budget.at
    )
    assert all(k == v and (k.param_dtype, k.group_size) == ("fp16", 0) for k, v in metadata.formats)
    assert {n for k, _ in metadata.formats for _, n in k.classes} <= {4, 16, 256, 65536}
    assert all(
        not layer.key.tensors for layer in metadata.layers
    )  # the pair scale is in the weights, no clip
    assert (
        evaluate(
            str(artifact.path),
            against=str(source),
            text=str(text_file),
            windows=2,
            seq_len=160,
            device="cpu",
        ).kl
        < 0.2
    )


# -- losses from a few probes


def candidate(fmt, distortion=0.0):
    return SimpleNamespace(spec=SimpleNamespace(format=fmt), distortion=distortion)


def test_probes_spread_around_the_budget_and_extrapolate_by_distortion():
    formats = [*(uniform(64, n) for n in (3, 4, 8, 16)), Format(((64, 65536),), "none")]
    group = [candidate(f, d) for f, d in zip(formats, [8.0, 4.0, 1.0, 0.25, 0.0], strict=True)]
    assert (
        probed(group, 2.3, 1) == [1]
        and probed(group, 2.3, 3) == [0, 1, 2]
        and probed(group, 16.0, 2) == [3]
    )
    assert extrapolate(group, {1: 0.4}) == pytest.approx([0.8, 0.4, 0.1, 0.025, 0.0])
    between = extrapolate(
        group, {0: 0.8, 2: 0.2}
    )  # loss / distortion is .1 and .2, so .1·2^(1/3) a third of the way
    assert between == pytest.approx([0.8, 0.4 * 2 ** (1 / 3), 0.2, 0.05, 0.0])
    assert extrapolate(group, {}) == [0.0] * 5


def test_each_kind_of_format_is_measured_for_itself_unless_it_is_far():
    group = [candidate(Format(((64, n),)), 2.0**-n) for n in (2, 4, 8)] + [
        candidate(uniform(64, 4), 0.1)
    ]
    assert probed(group, 2.25, 1) == [1, 3]
    far = [*group[:3], candidate(uniform(64, 256, "fp16"), 1e-6)]
    assert probed(far, 2.25, 1) == [1] and probed(far, 7.0, 1) == [3]
    losses = extrapolate(group, {1: 0.5, 3: 0.3})
    assert losses == pytest.approx([2.0, 0.5, 0.5 / 16, 0.3])
    assert extrapolate(far, {1: 0.5})[3] == pytest.approx(
        0.5 * 16 * 1e-6
    )  # nothing of its own kind: the other's ratio


@pytest.mark.parametrize(
    ("recipe", "listed"), [({}, True), ({"pairs": 0}, False), ({"catalogue": False}, False)]
)
def test_pairs_come_from_the_catalogues_list_unless_a_recipe_lifts_it(recipe, listed):
    """Where all of the list is offered; a recipe that offers other formats is not narrowed by
    it."""
    geometry, rng = Geometry(2, 64, 1, 24, 16), np.random.default_rng(2)
    sides = [list(find(64)) for find in (key_formats, value_formats)]
    layers = [
        [[SimpleNamespace(spec=SimpleNamespace(format=f)) for f in side]] * 12 for side in sides
    ]
    losses = [
        [
            [w * 3.0**-f.payload_bits * rng.uniform(0.9, 1.1) for f in side]
            for w in rng.lognormal(0, 1, 12)
        ]
        for side in sides
    ]
    budget = SimpleNamespace(
        at=600,
        nbytes=12 * (geometry.fixed_nbytes(600) + 2 * geometry.packed_elements(600, 1) // 8),
        request="x",
    )
    plan = SimpleNamespace(
        geometry=geometry, budget=budget, num_layers=12, recipe=Recipe.model_validate(recipe)
    )
    found = choose(plan, *layers, *losses)
    used = {(sides[0][k], sides[1][v]) for k, v in found}
    assert (used <= set(listed_pairs(64))) == listed and (
        len(used) <= plan.recipe.pairs or not plan.recipe.pairs
    )
    few = [[group[:9] for group in side] for side in layers]
    narrow = choose(plan, *few, *[[row[:9] for row in side] for side in losses])
    assert all(k < 9 and v < 9 for k, v in narrow)
