"""Crops up to a page, which are by default as if the tokens had never come, and the rows that this
takes."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from test_modes import DIM, HEADS, LAYERS, PACKED, left_padded

from kvfold import KVBudgetExceeded, KvfoldError, runtime
from kvfold.compress.cli.table import describe
from kvfold.compress.plan import make_plan
from kvfold.compress.recipe import load_recipe
from kvfold.exports.account import Geometry, cache_nbytes
from kvfold.exports.architectures import sliding_windows_of
from kvfold.exports.reader import Artifact, read_artifact
from kvfold.exports.schema import METADATA_NAME, dump_metadata
from kvfold.runtime.budget.ladder import Ladders
from kvfold.runtime.load import attach

PAGE, WINDOW, SINKS = 8, 24, 3  # of tiny_artifact
ROWS = PAGE * 2 * 2 * HEADS * DIM  # bytes of a page of 16-bit rows in one layer


def ids_of(tokens, seed=1, batch=1):
    return torch.randint(1, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def told(caplog):
    """Warnings of crops so far."""
    caplog.set_level(logging.WARNING, logger="kvfold")
    return lambda: [r.getMessage() for r in caplog.records if "a crop by" in r.getMessage()]


@pytest.fixture(scope="module")
def old_artifact(tiny_artifact, tmp_path_factory):
    """The same artifact as format version 3 has it."""
    folder = tmp_path_factory.mktemp("artifacts") / "old"
    folder.mkdir()
    for file in tiny_artifact.iterdir():
        (folder / file.name).symlink_to(file)
    metadata = read_artifact(tiny_artifact).metadata
    cache = metadata.cache.model_copy(update={"rollback": None})
    cache.model_fields_set.discard("rollback")
    old = metadata.model_copy(update={"format_version": 3, "cache": cache})
    sizes = {
        n: cache_nbytes(old.geometry, old.formats, int(n)) for n in [*metadata.account.bytes_at]
    }
    account = metadata.account.model_copy(
        update={"bytes": sizes[str(metadata.account.at)], "bytes_at": sizes}
    )
    (folder / METADATA_NAME).unlink()
    (folder / METADATA_NAME).write_text(
        dump_metadata(old.model_copy(update={"account": account})), encoding="utf-8"
    )
    return folder


def logits_of(model, cache, ids, parts=(1, 9, 1, 20)):
    """Of tokens that go on, in calls of so many."""
    return [model(part, past_key_values=cache).logits for part in ids.split(parts, 1)]


# -- what a load gives


@torch.no_grad()
@pytest.mark.parametrize("attention", ["reference", "triton"])
def test_a_crop_of_up_to_a_page_is_exact_by_default(tiny_artifact, attention, told):
    """Over every place of a page's boundary; without those rows the last one is off."""
    on_gpu = attention == "triton" and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    load = lambda **options: runtime.load_pretrained(  # noqa: E731
        tiny_artifact, device=device, dtype=torch.float32, attention=attention, **options
    )
    model = load()
    prompt, other, more = (ids_of(n, n).to(device) for n in (SINKS + WINDOW + 4, PAGE, 12))
    for removed in (1, 4, 5, 7, PAGE) if attention == "reference" else (7,):
        used, fresh = model(prompt).past_key_values, model(prompt).past_key_values
        pages = used.layers[0].num_pages()
        for token in other[:, :removed].split(1, 1):
            model(token, past_key_values=used)
        assert used.layers[0].num_pages() - pages == int(removed >= 4)
        used.crop(-removed)
        assert used.nbytes == fresh.nbytes
        for a, b in zip(*(logits_of(model, c, more, (1, 11)) for c in (used, fresh)), strict=True):
            assert torch.equal(a, b)
    assert not told()
    without = load(rollback=0)
    used, fresh = without(prompt).past_key_values, without(prompt).past_key_values
    without(other[:, :7], past_key_values=used)
    used.crop(-7)
    off = without(more, past_key_values=used).logits - without(more, past_key_values=fresh).logits
    assert float(off.abs().max()) > 1e-3 and "crop by 7 tokens" in told()[0]


@torch.no_grad()
def test_the_account_of_an_artifact_is_what_the_default_takes(tiny_artifact):
    model = runtime.load_pretrained(tiny_artifact, device="cpu")
    metadata = model.kv_artifact.metadata
    assert (
        metadata.format_version == 5
        and metadata.cache.rollback == metadata.cache.page_tokens == PAGE
    )
    prompt = ids_of(512)
    cache = model(prompt).past_key_values
    assert cache.geometry == metadata.geometry and cache.geometry.rollback == PAGE
    assert cache.nbytes == metadata.account.bytes_at["512"] == describe(metadata, 512)["bytes"]
    assert describe(metadata)["rollback"] == PAGE
    assert metadata.account.bytes <= metadata.budget.bytes
    fewer = runtime.load_pretrained(tiny_artifact, device="cpu", rollback=0)
    assert cache.nbytes - fewer(prompt).past_key_values.nbytes == LAYERS * ROWS


@torch.no_grad()
def test_an_artifact_of_before_keeps_its_promise_of_bytes(old_artifact, told):
    stated = json.loads((old_artifact / METADATA_NAME).read_text())
    assert "rollback" not in stated["cache"]
    model = runtime.load_pretrained(old_artifact, device="cpu")
    prompt = ids_of(512)
    cache = model(prompt).past_key_values
    assert cache.geometry.rollback == 0 and cache.nbytes == stated["account"]["bytes_at"]["512"]
    model = runtime.load_pretrained(old_artifact, device="cpu", rollback=PAGE)
    used, fresh = model(prompt).past_key_values, model(prompt).past_key_values
    assert used.nbytes - cache.nbytes == LAYERS * ROWS
    model(ids_of(7), past_key_values=used)
    used.crop(-7)
    more = ids_of(5)
    assert torch.equal(
        model(more, past_key_values=used).logits, model(more, past_key_values=fresh).logits
    )
    assert not told()


@pytest.mark.parametrize("policy", ["floor", "progressive"])
def test_a_budget_without_room_for_the_default_has_none(tiny_artifact, policy, caplog):
    caplog.set_level(logging.INFO, logger="kvfold")
    load = lambda **options: runtime.load_pretrained(  # noqa: E731
        tiny_artifact, device="cpu", policy=policy, **options
    )
    with pytest.raises(KvfoldError, match="too small: sinks, window and one page") as caught:
        load(kv_budget=1000)
    least = int(str(caught.value).split("take ")[1].split()[0])
    with pytest.raises(KvfoldError, match=f"a rollback of {PAGE} tokens and one page") as caught:
        load(kv_budget=least, rollback=PAGE)
    assert f"take {least + LAYERS * ROWS} bytes" in str(caught.value)
    for budget, found in (
        (least, 0),
        (least + LAYERS * ROWS - 1, 0),
        (least + LAYERS * ROWS, PAGE),
    ):
        caplog.clear()
        assert load(kv_budget=budget).new_kv_cache().geometry.rollback == found
        said = f"rollback: 0, because kv_budget={budget} has no room for {PAGE} tokens"
        assert (said in caplog.text) == (not found)


@torch.no_grad()
def test_what_a_budget_refuses_names_the_rows(tiny_artifact):
    plain = runtime.load_pretrained(tiny_artifact, device="cpu", rollback=0)
    budget = plain(ids_of(200)).past_key_values.nbytes
    model = runtime.load_pretrained(tiny_artifact, device="cpu", kv_budget=budget)
    assert model.new_kv_cache().geometry.rollback == PAGE
    saved = f"load with rollback=0, which saves {LAYERS * ROWS} bytes, shorten"
    with pytest.raises(KVBudgetExceeded, match=saved):
        model(ids_of(200))
    model = runtime.load_pretrained(tiny_artifact, device="cpu", kv_budget=budget, rollback=0)
    assert model(ids_of(200)).past_key_values.nbytes == budget
    with pytest.raises(KVBudgetExceeded, match="raise kv_budget, shorten"):
        model(ids_of(300))


def test_a_budget_of_the_search_without_room_for_the_default_has_none(tiny_folder, text_file):
    """The smallest cache that the search can reach is what it was."""
    recipe = load_recipe().model_copy(update={"window": WINDOW, "page_tokens": PAGE})
    plan = lambda nbytes, recipe=recipe: make_plan(  # noqa: E731
        str(tiny_folder), f"{nbytes}B@512", str(text_file), recipe, None
    )
    with pytest.raises(KvfoldError, match="out of reach") as caught:
        plan(1000)
    least = int(str(caught.value).split("takes ")[1].split()[0])
    for nbytes, found in ((least, 0), (least + LAYERS * ROWS, PAGE)):
        made = plan(nbytes)
        assert made.recipe.rollback == made.geometry.rollback == found
    fixed = recipe.model_copy(update={"rollback": PAGE})
    with pytest.raises(KvfoldError, match=f"takes {least + LAYERS * ROWS} bytes"):
        plan(least, fixed)
    assert plan(2 * least, recipe.model_copy(update={"rollback": 0})).geometry.rollback == 0


# -- as if the tokens had never come


def model_of(family, budget=None, **options):
    """A tiny model on a packed cache whose artifact states a rollback of a page."""
    model = tiny_model(family)
    geometry = Geometry(HEADS, DIM, SINKS, 10, PAGE, sliding_windows_of(model.config), PAGE)
    known = SimpleNamespace(
        calibration=SimpleNamespace(covered_positions=10**9), digest="", geometry=geometry,
        formats=[(PACKED.key.format, PACKED.value.format)] * LAYERS,
    )  # fmt: skip
    artifact = Artifact(Path("tiny"), known, [PACKED] * LAYERS)
    if options.pop("progressive", False):
        options["policy"] = Ladders(artifact.specs, [(1.0, 1.0)] * LAYERS, geometry)
    return attach(model, artifact, budget, **options)


MODES = {
    "floor": {},
    "progressive": {"budget": 10**6, "progressive": True},
    "offload": {"budget": 34_600, "offload": True},
    "kernels": {"triton": True, "cuda_graph": False},
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "mode"),
    [
        *((family, "floor") for family in ("llama", "gemma3_text", "phi3", "gpt_oss")),
        ("llama", "progressive"),
        ("gemma3_text", "progressive"),
        ("llama", "offload"),
        ("gemma3_text", "offload"),
        ("gemma3_text", "kernels"),
    ],
)
def test_crops_again_and_again_are_never_having_come(family, mode, told):
    """A left-padded batch, whose prompt comes in chunks: each length that is cropped to is at most
    a page below the longest so far."""
    if mode == "kernels":
        pytest.importorskip("triton")
    model = model_of(family, **MODES[mode])
    # of kernels' pages, which the interpreter takes a second to write, hardly more than are cropped
    longest = 51 if mode == "kernels" else 75
    ids, mask = left_padded([longest, 31])

    def feed(cache, ids, mask, parts):
        for part in ids.split(parts, 1):
            end = (0 if cache is None else cache.get_seq_length()) + part.shape[1]
            out = model(part, attention_mask=mask[:, :end], past_key_values=cache)
            cache = out.past_key_values
        return cache, out.logits

    mask = torch.cat((mask, torch.ones(2, 200, dtype=torch.long)), 1)
    chunk, first = (40, 2) if mode == "kernels" else (20, 0)
    used, _ = feed(None, ids, mask, chunk)
    fresh, _ = feed(None, ids, mask, chunk)
    for i, (more, less) in enumerate(
        [(7, 7), (3, 3), (8, 5), (0, 3), (5, 5), (8, 8)][first:], first
    ):
        if more:
            feed(used, ids_of(more, i, 2), mask, 1 if i % 2 else 3)
        used.crop(-less)
    assert used.get_seq_length() == fresh.get_seq_length() == longest and not told()
    assert (used.host_nbytes > 0) == (mode == "offload")
    more = ids_of(24, 9, 2)
    for part in more.split((1, 9, 1, 13), 1):
        (_, found), (_, want) = (feed(cache, part, mask, part.shape[1]) for cache in (used, fresh))
        assert torch.equal(found, want)
    if mode != "offload":  # whose budget is full
        feed(used, ids_of(40, 10, 2), mask, 40)
        used.crop(-(used.geometry.ring + 1 if family == "llama" else PAGE))
        assert len(told()) == int(family == "llama" and mode == "floor")
