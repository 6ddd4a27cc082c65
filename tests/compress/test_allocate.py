"""The allocator against brute force, and budgets."""

import itertools
import random

import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.compress.budget import parse_budget
from kvfold.compress.search.allocate import Choice, allocate, least_nbytes
from kvfold.compress.search.allocate_shared import allocate_shared
from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry

choice = st.builds(Choice, st.integers(1, 5000), st.floats(0, 1, allow_subnormal=False))
groups = st.lists(st.lists(choice, min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=examples(150), deadline=None)
@given(groups, st.floats(0, 1))
def test_allocation_is_the_best_within_the_budget(found, share):
    least, most = least_nbytes(found), sum(max(c.nbytes for c in g) for g in found)
    budget = int(least + share * (most - least))
    chosen = allocate(found, budget)
    assert sum(g[c].nbytes for g, c in zip(found, chosen, strict=True)) <= budget
    loss = sum(g[c].loss for g, c in zip(found, chosen, strict=True))
    fitting = [
        combo for combo in itertools.product(*found) if sum(c.nbytes for c in combo) <= budget
    ]
    best = min(sum(c.loss for c in combo) for combo in fitting)
    assert loss <= best + 1e-4 * max(max(c.loss for c in g) for g in found) + 1e-12


def test_bytes_go_where_they_help_most():
    sensitive = [Choice(10, 1.0), Choice(20, 0.1)]
    calm = [Choice(10, 0.01), Choice(20, 0.001)]
    assert allocate([sensitive, calm], 30) == [1, 0]


def test_a_real_size_solves_within_the_budget():
    rng = random.Random(0)
    found = [
        [Choice(1000 * (i + 1) + rng.randrange(7), rng.random() * 4.0**-i) for i in range(14)]
        for _ in range(160)
    ]
    budget = 160 * 4000
    chosen = allocate(found, budget)
    total = sum(g[c].nbytes for g, c in zip(found, chosen, strict=True))
    assert 0.995 * budget < total <= budget


kinds = st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True)


@st.composite
def shared_groups(draw):
    """Candidates of some of five kinds, a kind's bytes alike in all groups or not."""
    common = (
        draw(st.lists(st.integers(1, 5000), min_size=5, max_size=5))
        if draw(st.booleans())
        else None
    )
    found, names = [], draw(st.lists(kinds, min_size=1, max_size=5))
    for row in names:
        nbytes = [common[k] if common else draw(st.integers(1, 5000)) for k in row]
        found.append([Choice(n, draw(st.floats(0, 1, allow_subnormal=False))) for n in nbytes])
    return found, names


@settings(max_examples=examples(300), deadline=None)
@given(shared_groups(), st.floats(0, 1), st.integers(1, 5))
def test_few_kinds_are_the_best_few_within_the_budget(given_groups, share, limit):
    found, names = given_groups
    least, most = least_nbytes(found), sum(max(c.nbytes for c in g) for g in found)
    budget = int(least + share * (most - least))
    fitting = [
        combo
        for combo in itertools.product(*[range(len(g)) for g in found])
        if sum(found[g][c].nbytes for g, c in enumerate(combo)) <= budget
        and len({names[g][c] for g, c in enumerate(combo)}) <= limit
    ]
    if not fitting:
        with pytest.raises(KvfoldError, match=f"at most {limit} different pairs"):
            allocate_shared(found, names, budget, limit)
        return
    chosen = allocate_shared(found, names, budget, limit)
    assert chosen in [list(combo) for combo in fitting]
    loss = sum(found[g][c].loss for g, c in enumerate(chosen))
    best = min(sum(found[g][c].loss for g, c in enumerate(combo)) for combo in fitting)
    assert loss <= best + 1e-4 * max(max(c.loss for c in g) for g in found) + 1e-12


def real_size(layers, seed=0):
    """Pairs of 17 key and 14 value formats, as a search finds them: distortion falls fourfold a
    bit, layers differ in weight."""
    rng = random.Random(seed)
    keys, values = [0.9 + i / 4 for i in range(17)], [0.6 + i / 3 for i in range(14)]
    found = []
    for _ in range(layers):
        sides = []
        for bits in (keys, values):
            weight = rng.lognormvariate(0, 1)
            sides.append([weight * 4.0**-b * rng.lognormvariate(0, 0.1) for b in bits])
        found.append(
            [
                Choice(round(4096 * (k + v)), sides[0][i] + sides[1][j])
                for i, k in enumerate(keys)
                for j, v in enumerate(values)
            ]
        )
    return found, [[(i, j) for i in range(17) for j in range(14)]] * layers


def test_a_real_size_of_few_pairs_is_near_the_unlimited_best():
    found, names = real_size(30)
    budget = 30 * 4096 * 5
    free = allocate(found, budget)
    free_loss = sum(g[c].loss for g, c in zip(found, free, strict=True))
    losses = []
    for limit in (1, 3, 6, 30):
        chosen = allocate_shared(found, names, budget, limit)
        assert chosen == allocate_shared(found, names, budget, limit)
        assert len({names[g][c] for g, c in enumerate(chosen)}) <= limit
        assert sum(g[c].nbytes for g, c in zip(found, chosen, strict=True)) <= budget
        losses.append(sum(g[c].loss for g, c in zip(found, chosen, strict=True)))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] <= free_loss * (1 + 1e-4) and losses[2] < 1.15 * free_loss < losses[0]


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
    "text",
    [
        "",
        "abc",
        "0",
        "-2",
        "nan",
        "inf",
        "16.01",
        "1GiB",
        "1GiB@",
        "1GiB@x",
        "1XB@64",
        "1GiB@9999",
        "1GiB@64",
    ],
)
def test_what_is_not_a_budget_is_refused_by_its_text(text):
    with pytest.raises(KvfoldError) as error:
        parse_budget(text, GEOMETRY, 10, 8192)
    assert f"'{text}'" in str(error.value) or "'1XB'" in str(error.value)
