"""Calibration against direct computation, positional interpolation, and going on where a run
stopped."""

from contextlib import ExitStack

import pytest
import torch
from conftest import CONFIGS, FAMILIES, char_tokenizer, save_tiny

from kvfold.compress.calibrate import SKIP_TOKENS, LayerStats, calibrate
from kvfold.compress.models import load_model
from kvfold.compress.models.attention_hook import NAME, tapped
from kvfold.compress.models.rope import rotate_on, turns
from kvfold.compress.plan import graded_steps
from kvfold.compress.text import read_documents, sample_sequences
from kvfold.errors import KvfoldError
from kvfold.exports.architectures import architecture_of


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp(request.param), request.param)
    return load_model(folder, torch.float32, torch.device("cpu"), NAME), architecture_of(
        CONFIGS[request.param]()
    )


SEQUENCES = [
    torch.randint(0, 128, (1, n), generator=torch.Generator().manual_seed(n)) for n in (71, 50)
]


def captured(model, arch, ids, position_ids=None):
    """Queries, keys and values that every layer's attention is called with in one ordinary forward
    pass."""
    seen = {}

    def tap(module, query, key, value, mask, scaling, **extras):
        seen[module.layer_idx] = query[0].double(), key[0].double(), value[0].double()

    with ExitStack() as stack, torch.no_grad():
        for attention in arch.attention_modules(model):
            stack.enter_context(tapped(attention, tap))
        model(ids, position_ids=position_ids, use_cache=False)
    return seen


@torch.no_grad()
def test_statistics_equal_those_of_an_ordinary_forward_pass(loaded, tmp_path):
    model, arch = loaded
    stats = calibrate(model, arch, SEQUENCES, [1] * len(SEQUENCES), 64, tmp_path)
    runs = [captured(model, arch, ids) for ids in SEQUENCES]
    for layer, found in enumerate(stats):
        query, key, value = (
            torch.cat([run[layer][i][:, SKIP_TOKENS:] for run in runs], 1) for i in range(3)
        )
        torch.testing.assert_close(found.key_mean, key.mean(1), rtol=1e-4, atol=1e-4)
        centred = value - value.mean(1, keepdim=True)
        torch.testing.assert_close(
            found.value_cov, centred.mT @ centred / value.shape[1], rtol=1e-3, atol=1e-4
        )
        grouped = query.unflatten(0, (2, 2)).flatten(1, 2)
        torch.testing.assert_close(
            found.query_moment, grouped.mT @ grouped / grouped.shape[1], rtol=1e-3, atol=1e-4
        )
        assert found.key_sample.shape == (2, 64, 16)
        wo = arch.attention_modules(model)[layer].o_proj.weight.double()
        heads = [wo[:, h * 16 : (h + 1) * 16] for h in range(2)]
        torch.testing.assert_close(found.output_metric[0], sum(w.mT @ w for w in heads) / 2)


@torch.no_grad()
def test_interpolated_positions_are_those_of_the_rotary_embedding(loaded):
    model, arch = loaded
    ids, spread = SEQUENCES[0], 5
    positions = torch.arange(ids.shape[1])[None]
    plain, far = captured(model, arch, ids), captured(model, arch, ids, positions * spread)
    near, far_turns = (turns(model, arch, 0, positions * step) for step in (1, spread))
    for i in range(2):  # the first layer's hidden states don't depend on positions
        moved = rotate_on(plain[0][i][None].float(), near, far_turns)[0]
        torch.testing.assert_close(moved.double(), far[0][i], rtol=1e-3, atol=1e-3)
        assert float((plain[0][i] - far[0][i]).abs().max()) > 0.1


@torch.no_grad()
def test_every_sequence_has_a_step_of_its_own(loaded, tmp_path):
    model, arch = loaded
    alone = []
    for i, (ids, step) in enumerate(zip(SEQUENCES, (1, 4), strict=True)):
        (tmp_path / str(i)).mkdir()
        alone.append(calibrate(model, arch, [ids], [step], 32, tmp_path / str(i)))
    (tmp_path / "both").mkdir()
    both = calibrate(model, arch, SEQUENCES, [1, 4], 32, tmp_path / "both")
    counts = [ids.shape[1] - SKIP_TOKENS for ids in SEQUENCES]
    for near, far, found in zip(*alone, both, strict=True):
        expected = (counts[0] * near.query_moment + counts[1] * far.query_moment) / sum(counts)
        torch.testing.assert_close(found.query_moment, expected)
        assert not torch.allclose(found.query_moment, near.query_moment)


def test_steps_rise_from_the_texts_own_positions_to_the_whole_context():
    assert (
        graded_steps(16, 4) == [1, 3, 6, 16]
        and graded_steps(1, 4) == [1, 1, 1, 1]
        and graded_steps(7, 1) == [7]
    )


@torch.no_grad()
def test_calibration_goes_on_where_it_stopped(loaded, tmp_path, monkeypatch):
    model, arch = loaded
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir()
    part.mkdir()
    expected = calibrate(model, arch, SEQUENCES, [3] * len(SEQUENCES), 32, whole)
    save, saved = LayerStats.save, []

    def save_two(self, path):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(self, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LayerStats, "save", save_two)
        calibrate(model, arch, SEQUENCES, [3] * len(SEQUENCES), 32, part)
    assert sorted(p.name for p in part.glob("stats_*s")) == [
        "stats_000.safetensors",
        "stats_001.safetensors",
    ]
    again = calibrate(model, arch, SEQUENCES, [3] * len(SEQUENCES), 32, part)
    for a, b in zip(expected, again, strict=True):
        assert torch.equal(a.key_cov, b.key_cov) and torch.equal(a.value_sample, b.value_sample)


@torch.no_grad()
def test_the_sample_holds_the_same_tokens_of_all_three_and_the_range_every_token(loaded, tmp_path):
    model, arch = loaded
    stats = calibrate(model, arch, SEQUENCES, [1] * len(SEQUENCES), 64, tmp_path)
    runs = [captured(model, arch, ids) for ids in SEQUENCES]
    for layer, found in enumerate(stats):
        assert found.sample_lengths.tolist() == [32, 32]
        assert float(found.scaling) == pytest.approx(
            getattr(model.config, "query_pre_attn_scalar", 16) ** -0.5
        )
        assert found.query_sample.shape == (4, 64, 16)
        start = 0
        for run, length in zip(runs, found.sample_lengths.tolist(), strict=True):
            whole = [x[:, SKIP_TOKENS:].float() for x in run[layer]]
            drawn = torch.linspace(0, whole[1].shape[1] - 1, length).round().long()
            for sample, x in zip(
                (found.query_sample, found.key_sample, found.value_sample), whole, strict=True
            ):
                torch.testing.assert_close(
                    sample[:, start : start + length], x[:, drawn], rtol=1e-4, atol=1e-5
                )
            start += length
        keys = torch.cat([run[layer][1][:, SKIP_TOKENS:] for run in runs], 1)
        torch.testing.assert_close(
            found.key_range, torch.stack((keys.amin(1), keys.amax(1)), 1), rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused_by_layer(bad, tmp_path):
    folder = save_tiny(tmp_path / "model")
    model = load_model(folder, torch.float32, torch.device("cpu"), NAME)
    arch = architecture_of(CONFIGS["llama"]())
    arch.attention_modules(model)[1].k_proj.weight[3, 5] = bad
    with pytest.raises(KvfoldError, match="Layer 1 gives NaN or infinity") as error:
        calibrate(model, arch, SEQUENCES, [1] * len(SEQUENCES), 64, tmp_path)
    assert str(error.value).count(". ") == 0  # one sentence


def test_sequences_are_seeded_and_do_not_overlap(text_file):
    name, documents = read_documents(str(text_file))
    pick = [sample_sequences(char_tokenizer(), documents, 5, 300, seed, name) for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(pick[0], pick[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(pick[0], pick[2], strict=True))
    assert (
        all(s.shape == (1, 300) for s in pick[0])
        and len({tuple(s[0].tolist()) for s in pick[0]}) == 5
    )


def test_the_built_in_text_gives_full_sequences_of_every_kind():
    name, documents = read_documents(None)
    found = sample_sequences(char_tokenizer(), documents, 5, 2048, 0, name)
    assert name == "built-in" and len(documents) == 5 and [s.shape[1] for s in found] == [2048] * 5


def test_too_little_text_is_refused():
    with pytest.raises(KvfoldError, match="has 5 tokens"):
        sample_sequences(char_tokenizer(), ["short"], 1, 256, 0, "short")
