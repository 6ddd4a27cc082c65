"""The allocator against brute force, and budgets."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.compress.allocate import Choice, allocate, least_nbytes
from kvfold.compress.budget import parse_budget
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry

choice = st.builds(Choice, st.integers(1, 5000), st.floats(0, 1, allow_subnormal=False))
groups = st.lists(st.lists(choice, min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(groups, st.floats(0, 1))
def test_allocation_is_the_best_within_the_budget(found, share):
    least, most = least_nbytes(found), sum(max(c.nbytes for c in g) for g in found)
    budget = int(least + share * (most - least))
    chosen = allocate(found, budget)
    assert sum(g[c].nbytes for g, c in zip(found, chosen, strict=True)) <= budget
    loss = sum(g[c].loss for g, c in zip(found, chosen, strict=True))
    fitting = [combo for combo in itertools.product(*found) if sum(c.nbytes for c in combo) <= budget]
    best = min(sum(c.loss for c in combo) for combo in fitting)
    assert loss <= best + 1e-4 * max(max(c.loss for c in g) for g in found) + 1e-12


def test_bytes_go_where_they_help_most():
    sensitive = [Choice(10, 1.0), Choice(20, 0.1)]
    calm = [Choice(10, 0.01), Choice(20, 0.001)]
    assert allocate([sensitive, calm], 30) == [1, 0]


def test_a_real_size_solves_within_the_budget():
    import random

    rng = random.Random(0)
    found = [[Choice(1000 * (i + 1) + rng.randrange(7), rng.random() * 4.0**-i) for i in range(14)] for _ in range(160)]
    budget = 160 * 4000
    chosen = allocate(found, budget)
    total = sum(g[c].nbytes for g, c in zip(found, chosen, strict=True))
    assert 0.995 * budget < total <= budget


GEOMETRY = Geometry(4, 64, 5, 128, 32)


def test_budgets_in_bits_and_in_bytes_agree():
    elements = 2 * 10 * 4 * 64 * 8192
    bits = parse_budget("2.5", GEOMETRY, 10, 8192)
    assert (bits.at, bits.nbytes) == (8192, int(2.5 * elements / 8))
    assert parse_budget(f"{bits.nbytes}B@8192", GEOMETRY, 10, 8192).nbytes == bits.nbytes
    assert parse_budget("1MiB@4096", GEOMETRY, 10, 8192).nbytes == 2**20
    assert parse_budget("3", GEOMETRY, 10, 131072).at == 32768
    assert parse_budget("3", GEOMETRY, 10, 131072, context=1000).at == 1000


@pytest.mark.parametrize(
    "text", ["", "abc", "0", "-2", "nan", "inf", "16.01", "1GiB", "1GiB@", "1GiB@x", "1XB@64", "1GiB@9999", "1GiB@64"]
)
def test_what_is_not_a_budget_is_refused_by_its_text(text):
    with pytest.raises(KvfoldError) as error:
        parse_budget(text, GEOMETRY, 10, 8192)
    assert f"'{text}'" in str(error.value) or "'1XB'" in str(error.value)
