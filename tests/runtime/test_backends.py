"""A backend reads and writes tensors alone, so a cache takes any that keeps the contract."""

import pytest
import torch

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, uniform
from kvfold.runtime.backends.base import LayerTensors, StepBackend
from kvfold.runtime.backends.choose import backend_of
from kvfold.runtime.backends.reference import REFERENCE, Reference
from kvfold.runtime.budget.choose import choose
from kvfold.runtime.budget.ladder import Ladders
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.cache.pager import Pager

HEADS, DIM = 2, 16
GEOMETRY = Geometry(HEADS, DIM, 3, 6, 8)
SPEC = LayerSpec(
    KeySpec(Format(((8, 16), (8, 4))), offset=torch.ones(HEADS, DIM)),
    ValueSpec(uniform(DIM, 4, "e4m3", 8)),
)


class Noting(Reference):
    """The reference, which notes what it is given."""

    def __init__(self):
        self.given = []

    def append(self, layer, b, slots, keys, values):
        self.given.append(("append", layer, b))
        super().append(layer, b, slots, keys, values)

    def write_pages(self, layer, ids, keys, values):
        self.given.append(("write_pages", layer, len(ids)))
        super().write_pages(layer, ids, keys, values)

    def attend(self, layer, rows, query, scaling, options, mask):
        self.given.append(("attend", layer, len(rows)))
        return super().attend(layer, rows, query, scaling, options, mask)


def outputs(cache, calls=(30, 1, 9, 1, 1), batch=2, pads=(0, 4), seed=1):
    """Attention of each call on random states."""
    generator, found, end = torch.Generator().manual_seed(seed), [], 0
    for tokens in calls:
        end += tokens
        cache.note_padding((torch.arange(end) >= torch.tensor(pads)[:, None]).long(), batch)
        for i in range(len(cache.layers)):
            keys, values = (
                torch.randn(batch, HEADS, tokens, DIM, generator=generator) for _ in "kv"
            )
            query = torch.randn(batch, 2 * HEADS, tokens, DIM, generator=generator)
            visible = torch.arange(end) <= torch.arange(end - tokens, end)[:, None]
            mask = visible & (torch.arange(end) >= torch.tensor(pads)[:, None, None, None])
            found.append(cache.update(keys, values, i)[0].attend(query, 0.3, mask))
    return found


def test_a_backend_gets_a_record_of_tensors_and_no_layer():
    noting = Noting()
    plain, cache = (QuantizedKVCache([SPEC] * 2, GEOMETRY, backend=x) for x in (REFERENCE, noting))
    for ours, theirs in zip(outputs(cache), outputs(plain), strict=True):
        assert torch.equal(ours, theirs)
    assert {name for name, *_ in noting.given} == {"append", "write_pages", "attend"}
    assert all(type(layer) is LayerTensors for _, layer, _ in noting.given)
    held = noting.given[-1][1]
    assert held.layer_idx == 1 and held.raw_keys.shape == (2, HEADS, GEOMETRY.raw_rows, DIM)
    assert (
        held.state.tolist() == [[42, 4], [38, 3]] and held.marks is None and held.next_rungs is None
    )


def test_a_backend_in_one_file_takes_steps_in_one_go():
    """plain_steps.py: tokens are deferred, and stored when the handle attends."""
    pytest.importorskip("triton")
    from plain_steps import PlainSteps

    backend = PlainSteps()
    assert isinstance(backend, StepBackend) and not isinstance(REFERENCE, StepBackend)
    one, other = (QuantizedKVCache([SPEC] * 2, GEOMETRY, backend=x) for x in (REFERENCE, backend))
    for ours, theirs in zip(outputs(other), outputs(one), strict=True):
        torch.testing.assert_close(
            ours[:1], theirs[:1], rtol=1e-4, atol=1e-4
        )  # the second row's padding is free
        torch.testing.assert_close(ours[1:, :, -1:], theirs[1:, :, -1:], rtol=1e-4, atol=1e-4)
    assert [x.table.state.tolist() for x in other.layers] == [
        x.table.state.tolist() for x in one.layers
    ]
    before = other.layers[0].table.state.clone()
    view = other.update(*torch.randn(2, 2, HEADS, 1, DIM), 0)[0]
    assert other.layers[0].lengths() == [43, 39]  # the host counts at once
    assert torch.equal(other.layers[0].table.state, before)  # and the device when it attends
    view.attend(torch.randn(2, 2 * HEADS, 1, DIM), 0.3, None)
    assert other.layers[0].table.state[:, 0].tolist() == [43, 39]


def test_the_kernels_are_a_backend_that_takes_steps():
    assert backend_of(False) is REFERENCE
    pytest.importorskip("triton")
    assert isinstance(backend_of(True), StepBackend)


def test_policies_are_chosen_once_and_exclude_each_other():
    ladders = Ladders([SPEC], [(1.0, 1.0)], GEOMETRY)
    names = [
        type(choose(*args)).__name__
        for args in ((None,), (9,), (9, ladders), (9, None, Pager([64])))
    ]
    assert names == ["Floor", "Floor", "Progressive", "Offload"]
    for args, message in (
        (
            (None, ladders),
            "policy='progressive' lowers pages as kv_budget fills, but there is none",
        ),
        (
            (None, None, Pager([64])),
            "offload=True moves pages to host memory as kv_budget fills, but there is none",
        ),
        ((9, ladders, Pager([64])), "policy='progressive' lowers them; leave one of them out"),
    ):
        with pytest.raises(KvfoldError, match=message):
            choose(*args)


def test_every_policy_says_what_it_needs_and_admits_that():
    """One contract: what `need` says is what `admit` asks the budget for."""
    ladders = Ladders([SPEC], [(1.0, 1.0)], GEOMETRY)
    page = GEOMETRY.pair_nbytes(SPEC.key.format, SPEC.value.format)
    for options in ({}, {"ladders": ladders}, {"offload": Pager([page], chunk_pages=1)}):
        cache = QuantizedKVCache([SPEC], GEOMETRY, 1 << 20, **options)
        cache.note_padding(None, 1)
        need = cache.policy.need(cache.layers, 1, 50)
        cache.set_budget(need - 1)
        with pytest.raises(
            KvfoldError, match=f"need a cache of {need} bytes.*but kv_budget is {need - 1}"
        ):
            cache.policy.admit(cache.layers, 1, 50)
        cache.set_budget(need)
        cache.update(*torch.randn(2, 1, HEADS, 50, DIM), 0)
        assert cache.nbytes <= need and cache.layers[0].lengths() == [50]
