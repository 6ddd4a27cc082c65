"""What `runtime.warm_up` compiles ahead: every kernel of a layer, with the progressive policy those of every rung and step down."""

import pytest
import torch

from kvfold import runtime
from kvfold.exports.account import Geometry
from kvfold.kernels.formats import Format, uniform

pytest.importorskip("triton")
from kvfold.kernels import triton_attention, triton_encode
from kvfold.runtime import pages, triton, warm
from kvfold.runtime.policy import ladder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEOMETRY = Geometry(num_kv_heads=1, head_dim=16, sinks=3, window=9, page_tokens=8)
KEY, VALUE = Format(((8, 8), (8, 2))), uniform(16, 3)
JOB = (KEY.to_dict(), VALUE.to_dict(), True, True, False, False)


@pytest.fixture
def calls(monkeypatch):
    """(rungs that attention reads, query tokens) and (formats before, after) of pages that go down."""
    read, lowered = [], []
    attend, lower = triton_attention.attention, triton_encode.lower_pages

    def counted_attention(queries, key_format, value_format, *args, **options):
        read.append((options.get("formats") or [(key_format, value_format)], queries.tokens))
        return attend(queries, key_format, value_format, *args, **options)

    def counted_lower(sources, targets, old, new, **options):
        lowered.append((tuple(old), tuple(new)))
        return lower(sources, targets, old, new, **options)

    for module in (triton, pages, triton_attention, triton_encode):
        for name, function in (("attention", counted_attention), ("lower_pages", counted_lower)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, function)
    return read, lowered


def test_the_floor_needs_a_prompt_and_a_step(calls):
    warm._compile([JOB], GEOMETRY, 2, torch.float32, DEVICE, [(None, False, 8)], False)
    read, lowered = calls
    assert {tokens > 1 for _, tokens in read} == {True, False} and not lowered
    assert all(list(formats) == [(KEY, VALUE)] for formats, _ in read)


def test_the_progressive_policy_needs_every_rung_and_step_down(calls):
    warm._compile([JOB], GEOMETRY, 2, torch.float32, DEVICE, [(None, False, 8)], True)
    read, lowered = calls
    spec = warm.LayerSpec(warm.KeySpec(KEY), warm.ValueSpec(VALUE))
    rungs = [(rung.key.format, rung.value.format) for rung in ladder(spec)]
    assert len(rungs) == 4
    assert {tokens > 1 for _, tokens in read} == {True, False} and all(list(formats) == rungs for formats, _ in read)
    assert set(lowered) >= {(rungs[i + 1], rungs[i]) for i in range(3)}


def test_a_model_on_a_cpu_has_nothing_to_compile(tiny_artifact):
    assert runtime.warm_up(runtime.load_pretrained(tiny_artifact)) == 0
