"""A cache file whose hash fits: what it states is checked before anything is made of it."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_modes import PACKED, left_padded, packed_model

from kvfold import KvfoldError, runtime
from kvfold.runtime.cache import storage


def leaves(value, place=()):
    """Places of everything in nested lists and dicts."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from leaves(inner, (*place, key))
    yield place


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and a cache file of three left-padded sequences: its place, its header's object, its
    tensors."""
    model = packed_model(spec=PACKED)
    path = tmp_path_factory.mktemp("saved") / "prefix.kv"
    ids, mask = left_padded([90, 33, 2])
    with torch.no_grad():
        model(ids, attention_mask=mask).past_key_values.save(path)
    return model, path, *storage.read_file(path)


@torch.no_grad()
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_cache_file_of_any_content_under_a_hash_that_fits(saved, tmp_path_factory, data):
    """It is refused in a sentence, or it is a cache that the model goes on with."""
    model, _, body, tensors = saved
    body, tensors = copy.deepcopy(body), dict(tensors)
    odd = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 120),
        st.sampled_from([2**24 + 1, 2**70, 0.5, "3", [], {}, [0]]),
    )
    *place, last = data.draw(st.sampled_from([x for x in leaves(body) if x and x != ("artifact",)]))
    inner = body
    for key in place:
        inner = inner[key]
    change = data.draw(st.sampled_from(["set", "near", "remove"]))
    if change == "set":
        inner[last] = data.draw(odd)
    elif change == "near" and isinstance(inner[last], int):
        inner[last] += data.draw(st.integers(-9, 9))
    elif change == "remove":
        del inner[last]
    file = tmp_path_factory.mktemp("other") / "other.kv"
    header = json.dumps({**body, "sha256": storage._sha256(body, tensors)})
    save_file(tensors, file, metadata={storage.FIELD: header})
    try:
        cache = runtime.load_cache(file, model)
    except KvfoldError as error:
        assert "\n" not in str(error)
        return
    batch = len(cache.layers[0].lengths())
    mask = torch.ones(batch, cache.get_seq_length() + 1, dtype=torch.long)
    for b, pad in enumerate(cache.shared.padding):
        mask[b, :pad] = 0
    assert (
        model(torch.ones(batch, 1, dtype=torch.long), attention_mask=mask, past_key_values=cache)
        .logits.isfinite()
        .all()
    )


@pytest.mark.parametrize(
    "fault",
    [
        "one column", "one head", "float32", "nan", "pages cut", "page bytes", "no pages", "extra", "missing"
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_a_cache_file(saved, tmp_path, fault):
    model, _, body, tensors = saved
    tensors, name = dict(tensors), "layers.1.keys"
    key, pages = tensors[name], tensors["layers.1.pages"]
    if fault == "pages cut":
        tensors["layers.1.pages"] = pages[1:].clone()
    elif fault == "page bytes":
        tensors["layers.1.pages"] = pages[:, 16:].clone()
    elif fault == "no pages":
        tensors["layers.1.pages"] = torch.tensor(0, dtype=torch.uint8)
    elif fault == "missing":
        del tensors[name]
    elif fault == "extra":
        tensors["more"] = key.clone()
    else:
        bad = key.clone()
        bad[0, 0, 0] = float("nan")
        tensors[name] = {
            "one column": key[:, :1].clone(), "one head": key[:1].clone(), "float32": key.float(), "nan": bad
        }[fault]  # fmt: skip
    header = json.dumps({**body, "sha256": storage._sha256(body, tensors)})
    save_file(tensors, tmp_path / "x.kv", metadata={storage.FIELD: header})
    with pytest.raises(
        KvfoldError, match=r"describes no cache of this model: .*; save the cache again"
    ):
        runtime.load_cache(tmp_path / "x.kv", model)
