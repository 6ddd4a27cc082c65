"""How much a token is attended to, against loops over queries and tokens, and what calibration makes
of it."""

import math

import pytest
import torch
from conftest import save_tiny

from kvfold.compress import attended as module
from kvfold.compress.attended import attended
from kvfold.compress.calibrate import SKIP_TOKENS, calibrate
from kvfold.compress.models import load_model
from kvfold.compress.models.attention_hook import NAME, tapped
from kvfold.compress.moments import LEAST_WEIGHT
from kvfold.exports.architectures import architecture_of

HEADS, GROUP, DIM, SCALING = 2, 3, 8, 0.4


def draw(tokens, seed=0):
    rng = torch.Generator().manual_seed(seed)
    query = torch.randn(HEADS * GROUP, tokens, DIM, generator=rng) * 2
    key, value = (torch.randn(HEADS, tokens, DIM, generator=rng) for _ in range(2))
    root = torch.randn(HEADS, DIM, DIM, generator=rng, dtype=torch.float64)
    return query, key, value, root.mT @ root


def by_loops(query, key, value, metric, far, asked, sees, softcap=None, sinks_logit=None):
    """Both weights, token by token."""
    tokens = key.shape[1]
    found = torch.zeros(2, HEADS, tokens, dtype=torch.float64)
    for head in range(HEADS * GROUP):
        h = head // GROUP
        for i in asked:
            seen = [t for t in range(i + 1) if sees(i, t)]
            logits = [float(query[head, i].double() @ key[h, t].double()) * SCALING for t in seen]
            if softcap:
                logits = [softcap * math.tanh(x / softcap) for x in logits]
            sink = [float(sinks_logit[head])] if sinks_logit is not None else []
            p = torch.tensor([*logits, *sink], dtype=torch.float64).softmax(-1)[: len(seen)]
            out = sum(w * value[h, t].double() for w, t in zip(p, seen, strict=True))
            for w, t in zip(p, seen, strict=True):
                if i - t >= far:
                    apart = value[h, t].double() - out
                    found[0, h, t] += w**2 * (apart @ metric[h] @ apart)
                    found[1, h, t] += w**2
    return found.sqrt()


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 1.5}, {"sinks_logit": torch.linspace(-1, 2, 6)}]
)
@pytest.mark.parametrize("window", [0, 17])
def test_weights_are_those_of_loops(options, window, monkeypatch):
    tokens, far = 43, 10
    monkeypatch.setattr(module, "FAR", far)
    query, key, value, metric = draw(tokens)
    places = torch.arange(tokens)
    mask = (places[:, None] - places < window) & (places[:, None] >= places) if window else None
    found = attended(query, key, value, metric, SCALING, mask, **options)

    def sees(i, t):
        return not window or i - t < window

    expected = by_loops(query, key, value, metric, far, range(far, tokens), sees, **options)
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-5)
    assert all(float(x[:, tokens - far :].max()) == 0 for x in found)


def test_queries_are_drawn_evenly(monkeypatch):
    monkeypatch.setattr(module, "QUERIES", 5)
    query, key, value, metric = draw(41)
    found = attended(query, key, value, metric, SCALING)
    expected = by_loops(query, key, value, metric, 10, (10, 18, 25, 32, 40), lambda i, t: True)
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_calibrated_moments_count_tokens_by_their_weights(family, tmp_path):
    """Over sequences of different lengths, the first of which is too short to weigh any token."""
    folder = save_tiny(tmp_path / "model", family)
    model = load_model(folder, torch.float32, torch.device("cpu"), NAME)
    arch = architecture_of(model.config)
    rng = torch.Generator().manual_seed(4)
    sequences = [torch.randint(0, 128, (1, n), generator=rng) for n in (3, 90, 61)]
    stats = calibrate(model, arch, sequences, [1, 1, 1], 64, tmp_path)
    for layer, attention in enumerate(arch.attention_modules(model)):
        moment, weight, mean = 0.0, 0.0, 0.0
        for ids in sequences:
            seen = []

            def tap(mod, query, key, value, mask, scaling, seen=seen, layer=layer, **extras):
                narrow = None if mask is None else mask[0, 0]
                sides = query[0], key[0], value[0]
                metric = stats[layer].output_metric
                seen.append((*sides, attended(*sides, metric, scaling, narrow, **extras)))

            with tapped(attention, tap):
                model(ids, use_cache=False)
            ((_, key, value, (of_keys, of_values)),) = seen
            kept = slice(min(SKIP_TOKENS, ids.shape[1] // 2), None)
            k, v = key[:, kept].double(), value[:, kept].double()
            of_keys, of_values = of_keys[:, kept], of_values[:, kept]
            if float(of_values.max()) == 0:
                of_keys, of_values = torch.ones_like(of_keys), torch.ones_like(of_values)
            else:
                of_keys = of_keys + LEAST_WEIGHT * of_keys.mean(1, keepdim=True)
                of_values = of_values + LEAST_WEIGHT * of_values.mean(1, keepdim=True)
            moment = moment + (of_values[..., None] * v).mT @ v
            weight = weight + of_values.sum(1)[:, None, None]
            mean = mean + torch.stack((of_keys.sum(1), (of_keys[..., None] * k).sum(1)[:, 0]))
        torch.testing.assert_close(
            stats[layer].attended_values, moment / weight, rtol=1e-3, atol=1e-5
        )
        torch.testing.assert_close(
            stats[layer].attended_mean[:, 0], mean[1] / mean[0], rtol=1e-3, atol=1e-4
        )
