"""Texts and recipes of any size: memory and time are bounded, and what is beyond is refused or left
out."""

import itertools
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from conftest import char_tokenizer
from fuzz.run import peak_nbytes

from kvfold import KvfoldError
from kvfold.compress import text
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import CalibrationRecipe, load_recipe
from kvfold.compress.text import calibration_sequences, pieces, tokenize
from kvfold.compress.work import keep, kept

WORDS = "the cache of a long sequence\nholds keys and values "


@pytest.mark.parametrize("most", [40, 61, 1000])
def test_pieces_are_the_text_cut_between_words(most):
    whole = WORDS * 20 + "x" * 200 + WORDS * 3
    found = list(pieces(whole, most))
    assert "".join(found) == whole and max(map(len, found)) <= most
    for before, after in itertools.pairwise(found):
        assert before.endswith("\n") or after.startswith(" ") or "x" in before
    assert list(pieces(WORDS, len(WORDS))) == [WORDS] and list(pieces("", 8)) == [""]


def test_a_long_text_has_the_same_tokens_in_pieces(monkeypatch):
    tokenizer, whole = char_tokenizer(), WORDS * 50
    ids = tokenize(tokenizer, whole)
    monkeypatch.setattr(text, "PIECE_CHARS", 100)
    assert tokenize(tokenizer, whole) == ids == [ord(c) for c in whole]


def test_memory_does_not_grow_with_a_text(tmp_path, monkeypatch):
    """A fortieth of each limit, on a text of fifty times the limit."""
    monkeypatch.setattr(text, "MOST_CHARS", text.MOST_CHARS // 40)
    monkeypatch.setattr(text, "PIECE_CHARS", text.PIECE_CHARS // 40)
    file = tmp_path / "large.txt"
    file.write_text(WORDS * (50 * text.MOST_CHARS // len(WORDS)))
    tokenizer = char_tokenizer()
    calibration_sequences(tokenizer, None, CalibrationRecipe(), 256, 0)
    before = peak_nbytes(restart=True)
    _, sequences = calibration_sequences(tokenizer, str(file), CalibrationRecipe(), 256, 0)
    assert len(sequences) == 5 and all(ids.dtype == torch.int64 for ids in sequences)
    assert peak_nbytes() - before < 32 << 20


@pytest.mark.parametrize(
    "field",
    ["calibration: {num_sequences: N}", "calibration: {seq_len: N}", "calibration: {sample_tokens: N}",
     "calibration: {spread: N}", "sensitivity: {num_sequences: N}", "sensitivity: {seq_len: N}",
     "sensitivity: {stride: N}", "sensitivity: {conversations: N}", "sensitivity: {probes: N}",
     "sensitivity: {directions: N}", "pairs: N", "sinks: N", "window: N", "page_tokens: N", "value: {group_size: N}",
     "key: {transform: none, levels: [N]}"],
)  # fmt: skip
@pytest.mark.parametrize("number", [10**10, 2**63, 10**30])
def test_a_recipes_numbers_have_bounds(tmp_path, field, number):
    (tmp_path / "recipe.yaml").write_text(field.replace("N", str(number)))
    with pytest.raises(KvfoldError, match=r"Recipe '.*recipe\.yaml' is not valid at '"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "field", ["calibration: {texts: [N]}", "key: {bits: [N]}", "value: {levels: [N]}"]
)
def test_a_recipes_lists_have_bounds(tmp_path, field):
    item = {"t": "prose", "b": "1.5", "l": "4"}[field[field.index("{") + 1]]
    (tmp_path / "recipe.yaml").write_text(field.replace("N", ", ".join([item] * 1000)))
    with pytest.raises(KvfoldError, match="at most 64 items"):
        load_recipe(tmp_path / "recipe.yaml")


def test_the_largest_seed_is_one_too(tmp_path, tiny_folder, text_file, recipe_file):
    recipe = load_recipe(recipe_file, seed=2**63 - 1)
    found = compress(str(tiny_folder), "6.0", tmp_path / "out", calib=str(text_file), recipe=recipe)
    assert found.metadata.calibration.seed == 2**63 - 1
    with pytest.raises(KvfoldError, match="seed"):
        load_recipe(recipe_file, seed=2**63)


def test_sums_of_gigabytes_are_not_read(tmp_path):
    kept_file = tmp_path / "x.json"
    keep(kept_file, lambda scratch: scratch.write_text("1"))
    assert kept(kept_file, Path.read_text) == "1"
    os.truncate(tmp_path / "x.json.sha256", 4 << 30)  # sparse
    tracemalloc.start()
    try:
        assert kept(kept_file, Path.read_text) is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
