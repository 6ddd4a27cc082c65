"""Every kind of call that reaches attention: transformers on its 16-bit cache, the reference and
the kernels give the same logits, or the packed ones refuse it in a sentence."""

from functools import cache

import pytest
from conftest import examples
from differential import Session, packed_model, sessions, stock_model
from hypothesis import HealthCheck, Phase, given, settings

# without shrinking, which would take minutes: a session that fails is printed as it was drawn
QUIET = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "database": None,
    "phases": [Phase.generate],
}


@cache
def models(family, triton):
    return (
        stock_model(family),
        packed_model(family),
        *([packed_model(family, triton=True)] if triton else []),
    )


@pytest.mark.parametrize(("family", "count"), [("llama", 1200), ("gemma2", 600)])
def test_the_reference_is_transformers_or_refuses(family, count):
    counts = []

    @settings(max_examples=examples(count), **QUIET)
    @given(drawn=sessions)
    def run(drawn):
        stock, *packed = models(family, False)
        counts.append(Session(family, stock, packed, drawn).run())

    run()
    assert sum(counts) > 3 * examples(count)


@pytest.mark.parametrize(("family", "count"), [("llama", 40), ("gemma2", 20)])
def test_kernels_are_the_reference(family, count):
    pytest.importorskip("triton")

    @settings(max_examples=examples(count), **QUIET)
    @given(drawn=sessions)
    def run(drawn):
        stock, *packed = models(family, True)
        Session(family, stock, packed, drawn).run()

    run()
