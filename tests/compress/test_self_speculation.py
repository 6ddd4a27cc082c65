"""benchmarks/self_speculation.py on a tiny artifact: rounds counted exactly, an identical drafter
never wrong, every figure in its place."""

import json
import sys
from pathlib import Path

import pytest
import torch

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry, cache_nbytes
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.load import load_pretrained

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture
def model(tiny_artifact):
    return load_pretrained(tiny_artifact, device="cpu")


def test_rounds_are_those_of_each_gamma(benchmarks):
    from self_speculation import rounds

    counts = {0: 3, 1: 0, 2: 4, 3: 1, 4: 0, 5: 2, 6: 0, 7: 4}
    asked = []

    def accepted(position):
        asked.append(position)
        return counts[position]

    # γ = 1: 0 → 2 → 4 → 5 → 7 → 9; γ = 2: 0 → 3 → 5 → 8; γ = 4: 0 → 4 → 5 → 8
    assert rounds(accepted, [1, 2, 4], 0, 8) == {1: [1, 1, 0, 1, 1], 2: [2, 1, 2], 4: [3, 0, 2]}
    assert asked == [0, 2, 3, 4, 5, 7]


def test_combined_figures(benchmarks):
    from self_speculation import combine

    found = {3: {"tokens_a_round": (2.5, 0.1)}}
    (row,) = combine(found, 4.0, {1: 10.0, 4: 13.0}).values()
    assert row["ms_a_round"] == 25 and row["tokens_a_second"] == 100
    assert row["over_verifier"] == 1 and row["over_draft"] == pytest.approx(0.4)
    assert row["over_verifier_error"] == pytest.approx(0.04) and row[
        "over_verifier_bound"
    ] == pytest.approx(25 / 22)


@pytest.mark.parametrize("name", ["floor", "8"])
def test_an_identical_drafter_is_never_wrong(benchmarks, model, name):
    from self_speculation import acceptance

    prompts = [
        torch.randint(128, (1, n), generator=torch.Generator().manual_seed(n)) for n in (61, 90)
    ]
    found = acceptance(model, prompts, 37, name, name, [1, 3, 5])
    for gamma, row in found.items():
        assert row["accepted"] == (1.0, 0.0) and row["tokens_a_round"] == (gamma + 1, 0.0)
        assert row["rounds"] == 2 * [[gamma] * -(-37 // (gamma + 1))]


def test_drafts_are_those_of_a_cache_made_anew(benchmarks, model):
    """The drafter goes back and on in one cache; at each place a new cache of the verifier's keys
    and values drafts the same."""
    from self_speculation import Drafter, greedy

    ids = torch.randint(128, (1, 70), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        text, states = greedy(model, ids, 30, "16")
        plain = model.base_model
        plain.kv_packed = False
        for n in (70, 85, 99):  # the verifier's text is that of the unquantised model
            assert int(model(input_ids=torch.tensor([text[:n]])).logits[0, -1].argmax()) == text[n]
        plain.kv_packed = True
        specs, most = model.kv_artifact.specs, 4
        drafter = Drafter(model, specs, text, states, most)
        counts = []
        for position in range(70, 95):
            cache = QuantizedKVCache(specs, model.kv_artifact.geometry)
            for layer, pair in enumerate(states):
                cache.update(*(x[:, :, :position] for x in pair), layer)
            drafts, token = [], text[position]
            for _ in range(most):
                logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits
                drafts.append(token := int(logits[0, -1].argmax()))
            right = [a == b for a, b in zip(drafts, text[position + 1 :], strict=False)]
            counts.append(right.index(False) if False in right else most)
            assert drafter.accepted(position) == counts[-1]
    assert len(set(counts)) > 1  # else nothing was drafted wrong, or nothing right


def test_bytes_of_both_views(benchmarks):
    from speculation_steps import bytes_of

    geometry = Geometry(num_kv_heads=2, head_dim=16, sinks=3, window=24, page_tokens=8)
    key, value = Format(((16, 4),)), uniform(16, 4)
    caches = {
        "floor": [LayerSpec(KeySpec(key), ValueSpec(value))] * 3,
        "16": [LayerSpec(KeySpec(raw16(16)), ValueSpec(raw16(16)))] * 3,
    }
    found = bytes_of(caches, geometry, 1000, "floor")
    floor = cache_nbytes(geometry, [(key, value)] * 3, 1000)
    pages = (1000 - 3 - 24) // 8
    assert found["floor"] == floor and found["16"] == 2 * 2 * 3 * 2 * 16 * 1000
    assert found["floor and 16"] == floor + 3 * pages * 8 * 2 * 2 * 16 * 2


def test_the_command(benchmarks, monkeypatch, tmp_path, tiny_artifact, capsys):
    import self_speculation

    out = tmp_path / "out.json"
    options = {
        "tokens": 9,
        "gamma": "1,3",
        "prompt": 80,
        "prompts": 2,
        "context": 200,
        "repeats": 1,
        "device": "cpu",
    }
    options |= {"text": ROOT / "compress/data/heldout.txt", "json": out}
    arguments = [
        tiny_artifact,
        *(part for name, value in options.items() for part in (f"--{name}", value)),
    ]
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    self_speculation.main()
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert shown.count("| 16 | ") == 3 and shown.count("| 8 | ") == 3
    assert set(found["times"]["200"]["8"]) == {"1", "2", "4"} and set(
        found["times"]["200"]["floor"]
    ) == {"1"}
    for verifier in ("16", "8"):
        times, row = found["times"]["200"], found["speed"]["200"][verifier]["3"]
        assert row["ms_a_round"] == pytest.approx(3 * times["floor"]["1"] + times[verifier]["4"])
    monkeypatch.setattr(sys, "argv", ["benchmark", str(tiny_artifact), "--draft", "7"])
    with pytest.raises(KvfoldError, match="--draft has '7'"):
        self_speculation.main()
