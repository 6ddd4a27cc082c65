"""Losses to second order: the quadratic form is the Fisher information's, and small losses are
those that a forward pass measures."""

import pytest
import torch
from conftest import tiny_model

from kvfold.compress.models.attention_hook import NAME, tapped
from kvfold.compress.search import fisher
from kvfold.compress.search.candidates import KeyCandidate, ValueCandidate
from kvfold.compress.search.sensitivity import Passage, Probe, packing_tap, specs_of
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import architecture_of, logits_of
from kvfold.exports.spec import KeySpec, ValueSpec
from kvfold.kernels.formats import uniform

GEOMETRY = Geometry(2, 16, 3, 24, 8)
EARLY = 3 + 24 + 8 - 1


def make_probe(family: str = "llama", *passages: Passage) -> Probe:
    model = tiny_model(family, attention=NAME)
    ids = torch.randint(0, 128, (2, 90), generator=torch.Generator().manual_seed(3))
    return Probe(
        model, architecture_of(model.config), passages or [Passage(x[None]) for x in ids], EARLY
    )


def sides(levels: int) -> tuple[list[list[KeyCandidate]], list[list[ValueCandidate]]]:
    """One candidate of each side of three layers: no transform for keys, a turned basis for
    values."""
    keys = [[KeyCandidate(KeySpec(uniform(16, levels)), None, 1.0)] for _ in range(3)]
    rng = torch.Generator().manual_seed(1)
    matrix = torch.eye(16, dtype=torch.float64) + 0.2 * torch.randn(
        2, 16, 16, generator=rng, dtype=torch.float64
    )
    values = [[ValueCandidate(ValueSpec(uniform(16, levels)), matrix, 1.0)] for _ in range(3)]
    return keys, values


def fisher_losses(probe, keys, values, count, seed, folder):
    """The loss of every job, and the sum over heads that it is of."""
    losses = fisher.Losses(fisher.Sweep(probe, GEOMETRY, count, seed), folder / "fisher.json")
    found = {}
    for layer in (2, 1, 0):
        jobs = [job for job in JOBS if job[1] == layer]
        found |= losses.of_jobs(layer, jobs, keys, values)
    return found


JOBS = [(side, layer, 0) for layer in range(3) for side in ("key", "value")]


@torch.no_grad()
def test_the_first_passages_can_be_asked_alone():
    both, (keys, values) = make_probe(), sides(3)
    first = make_probe("llama", both.passages[0])
    taps = [
        packing_tap(GEOMETRY, both.device, key[0].spec, value[0].spec, value[0].matrix)
        for key, value in zip(keys, values, strict=True)
    ]
    assert both.whole_model(taps, count=1) == first.whole_model(taps) > 0
    assert both.whole_model(taps, count=2) == both.whole_model(taps) != first.whole_model(taps)


def test_signs_are_fair_and_independent():
    rng = torch.Generator().manual_seed(0)
    x = fisher.random_signs(torch.Size((999, 67)), rng, torch.device("cpu"))
    assert x.shape == (999, 67) and x.dtype == torch.float32 and bool((x.abs() == 1).all())
    scale = len(x) ** -0.5  # of what the mean of so many signs is off
    together = x.T @ x / len(x) - torch.eye(67)  # of neighbours in a word, and across words
    assert float(x.mean(0).abs().max()) < 5 * scale and float(together.abs().max()) < 6 * scale
    assert not torch.equal(x, fisher.random_signs(x.shape, rng, x.device))
    again = torch.Generator().manual_seed(0)
    assert torch.equal(x, fisher.random_signs(x.shape, again, x.device))


@torch.no_grad()
def test_directions_have_the_covariance_of_the_output():
    """Over many draws the mean of G·Gᵀ by one position's state is Wᵀ(diag(p) − p·pᵀ)W."""
    probe = make_probe()
    normed = probe.final[0][-1:]
    found = fisher.directions(probe, 0, normed, 20000, seed=0)[:, 0].double()
    weight = probe.model.lm_head.weight.double()
    p = logits_of(probe.model, normed)[0].double().softmax(-1)
    wanted = weight.mT @ (p.diag() - p[:, None] * p) @ weight
    assert (found.mT @ found / len(found) - wanted).norm() < 0.05 * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "smollm3"])
def test_small_losses_are_the_measured_ones(family, tmp_path):
    probe, (keys, values) = make_probe(family), sides(64)
    found = fisher_losses(probe, keys, values, 64, 0, tmp_path)
    for side, layer, c in JOBS:
        tap = packing_tap(GEOMETRY, probe.device, **specs_of(side, keys, values, layer, c))
        measured = probe.measure(layer, tap)
        assert measured > 1e-6
        assert found[side, layer, c] == pytest.approx(measured, rel=0.35)


@torch.no_grad()
def test_only_positions_that_count_are_summed(tmp_path):
    """A passage of which the last positions count has no loss at those before."""
    ids = torch.randint(0, 128, (1, 90), generator=torch.Generator().manual_seed(3))
    last = make_probe("llama", Passage(ids, start=89))
    keys, values = sides(16)
    found = fisher_losses(last, keys, values, 200, 0, tmp_path)
    for side, layer, c in JOBS:
        tap = packing_tap(GEOMETRY, last.device, **specs_of(side, keys, values, layer, c))
        assert found[side, layer, c] == pytest.approx(last.measure(layer, tap), rel=0.6)


@torch.no_grad()
def test_gradients_are_those_of_the_whole_model(monkeypatch, tmp_path):
    """By a layer's attention output, run again from its stored states, as by one pass through all
    layers."""
    probe, (keys, values) = make_probe(), sides(16)
    seen: list[torch.Tensor] = []

    def note(query, key, value, geometry, scaling, **options):
        seen.append(query)
        return real(query, key, value, geometry, scaling, **options)

    real = fisher.packed_attention
    monkeypatch.setattr(fisher, "packed_attention", note)
    sweep, rows = fisher.Sweep(probe, GEOMETRY, 2, 0), {}
    for layer in (2, 1, 0):
        first = sweep.at(layer)[0]  # of two passages
        for side in ("key", "value"):
            specs = specs_of(side, keys, values, layer, 0)
            rows[side, layer, 0] = first.loss(GEOMETRY, specs).tolist()
    assert [x.shape for x in seen] == [(4, 90 - EARLY, 16)] * (2 * 3 + len(JOBS))

    outputs: list[torch.Tensor] = []

    def keep(module, query, key, value, mask, scaling, **extras):
        outputs.append(fisher.attend_as_usual(module, query, key, value, mask, scaling))
        return outputs[-1]

    with torch.enable_grad():
        taps = [tapped(attention, keep) for attention in probe.attentions]
        for tap in taps:
            tap.__enter__()
        runner = probe.runners[0]
        normed = probe.normed(0, runner.run_from(0, runner.embedded.detach().requires_grad_()))
        draws = fisher.directions(probe, 0, normed[EARLY:], 2, 0)
        by_out = [torch.autograd.grad(normed[EARLY:], outputs, g, retain_graph=True) for g in draws]
        for tap in taps:
            tap.__exit__(None, None, None)
    for side, layer, c in JOBS:
        tap = packing_tap(GEOMETRY, probe.device, **specs_of(side, keys, values, layer, c))
        with tapped(probe.attentions[layer], tap):
            state = probe.hidden[0][layer]
            changed: list[torch.Tensor] = []
            hook = probe.attentions[layer].o_proj.register_forward_pre_hook(
                lambda m, args, seen=changed: seen.append(args[0])
            )
            runner.run(layer, state)
            hook.remove()
        error = changed[0].unflatten(-1, (4, 16)) - outputs[layer]
        total = torch.zeros(2, dtype=torch.float64)  # of each KV head
        for gradients in by_out:
            products = (gradients[layer] * error)[0, EARLY:].unflatten(1, (2, 2)).sum((2, 3))
            for span in products.split(fisher.SPAN):  # the last one is shorter
                total += span.sum(0).double().square() / 4
        assert rows[side, layer, c] == pytest.approx(total.tolist(), rel=2e-3)


@torch.no_grad()
def test_an_interrupted_run_goes_on_to_the_same_losses(monkeypatch, tmp_path):
    """Layers that are in the file are passed through without their candidates, and none where all
    are."""
    probe, (keys, values) = make_probe(), sides(16)
    whole = fisher_losses(probe, keys, values, 2, 0, tmp_path)
    real, calls = fisher.Seen.loss, []

    def stopped(seen, geometry, specs):
        calls.append(seen.query.shape[1])
        if len(calls) == 6:  # two passages, two sides: in the second layer
            raise KvfoldError("stopped")
        return real(seen, geometry, specs)

    again = tmp_path / "again"
    again.mkdir()
    monkeypatch.setattr(fisher.Seen, "loss", stopped)
    with pytest.raises(KvfoldError):
        fisher_losses(probe, keys, values, 2, 0, again)
    assert fisher_losses(probe, keys, values, 2, 0, again) == whole
    assert len(calls) == 6 + 8
    monkeypatch.setattr(fisher.Sweep, "at", None)
    assert fisher_losses(probe, keys, values, 2, 0, again) == whole
    monkeypatch.undo()
    other = tmp_path / "other"
    other.mkdir()
    assert fisher_losses(probe, keys, values, 2, 1, other) != whole


@torch.no_grad()
def test_layers_may_be_left_out(tmp_path):
    """The gradients at a layer are the same whether or not those behind it were asked for."""
    probe, (keys, values) = make_probe(), sides(16)
    whole = fisher_losses(probe, keys, values, 2, 0, tmp_path)
    losses = fisher.Losses(fisher.Sweep(probe, GEOMETRY, 2, 0), tmp_path / "own.json")
    assert losses.of_jobs(0, [("key", 0, 0)], keys, values) == {("key", 0, 0): whole["key", 0, 0]}
    # two questions about one layer are answered by one pass
    assert losses.of_jobs(0, [("value", 0, 0)], keys, values) == {
        ("value", 0, 0): whole["value", 0, 0]
    }
