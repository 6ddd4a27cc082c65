"""Text sources that need no network: files, a dataset folder, the text that ships."""

import json

import pytest
import torch
from conftest import char_tokenizer
from tokenizers.processors import TemplateProcessing

from kvfold.compress.evaluate import windows_of
from kvfold.compress.recipe import CalibrationRecipe, load_recipe
from kvfold.compress.text import (
    BUILT_IN,
    HELD_OUT,
    calibration_sequences,
    data_text,
    prefix_ids,
    read_documents,
    sample_sequences,
)
from kvfold.errors import KvfoldError


def test_a_folder_of_rows_is_read_as_a_dataset(tmp_path):
    rows = [{"text": "first row"}, {"text": "second row"}]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    name, documents = read_documents(str(tmp_path))
    assert name == tmp_path.name and documents == ["first row\n\nsecond row"]


def test_a_dataset_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(
        KvfoldError, match="'nobody/nothing:x:y' is neither a text file nor a dataset"
    ):
        read_documents("nobody/nothing:x:y")
    with pytest.raises(KvfoldError, match="neither a text file nor a dataset"):
        read_documents(str(tmp_path))


def test_evaluation_text_is_not_calibration_text():
    held_out = data_text(HELD_OUT)
    sentences = {s.strip() for s in held_out.replace("\n", ". ").split(". ") if len(s) > 60}
    assert len(sentences) > 100
    for name in BUILT_IN:
        assert not any(sentence in data_text(name) for sentence in sentences)


def test_every_sequence_begins_as_the_tokenizer_begins_a_text(text_file):
    """Gemma without its BOS token is another model: calibration, probes and evaluation all put it
    in front."""
    tokenizer = char_tokenizer()
    name, documents = read_documents(str(text_file))
    assert prefix_ids(tokenizer) == []
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="\x02 $A", special_tokens=[("\x02", 2)]
    )
    assert prefix_ids(tokenizer) == [2]
    for sequence in sample_sequences(tokenizer, documents, 3, 300, 0, name):
        assert sequence.shape == (1, 300) and (sequence == 2).nonzero().tolist() == [[0, 0]]
    windows = windows_of(tokenizer, documents[0], 256, 1, 2, name)
    assert [w.shape for w in windows] == [(1, 256)] * 2 and all(w[0, 0] == 2 for w in windows)
    assert windows[0][0, 1:].tolist() == [ord(c) for c in documents[0][255:510]]


def texts(sequences):
    return [char_tokenizer().decode(ids[0]) for ids in sequences]


def test_a_given_text_is_joined_by_the_built_in_one(text_file):
    tokenizer, given = char_tokenizer(), text_file.read_text()
    recipe = CalibrationRecipe(seq_len=256)
    name, found = calibration_sequences(tokenizer, str(text_file), recipe, 4096, 0)
    assert name == text_file.name and [ids.shape for ids in found] == [(1, 256)] * 5
    given = char_tokenizer().decode(char_tokenizer()(given).input_ids)
    own = [text in given for text in texts(found)]
    assert own == [True, False, True, False, True]
    assert texts(found)[1] in char_tokenizer().decode(
        char_tokenizer()(data_text("recall.txt")).input_ids
    )
    again = calibration_sequences(tokenizer, str(text_file), recipe, 4096, 0)[1]
    assert all(map(torch.equal, found, again))


def test_a_text_alone(text_file):
    recipe = CalibrationRecipe(seq_len=256, general=False)
    name, found = calibration_sequences(char_tokenizer(), str(text_file), recipe, 4096, 0)
    given = char_tokenizer().decode(char_tokenizer()(text_file.read_text()).input_ids)
    assert (
        name == text_file.name and len(found) == 5 and all(text in given for text in texts(found))
    )


def test_the_built_in_text_needs_no_other(text_file):
    name, found = calibration_sequences(
        char_tokenizer(), None, CalibrationRecipe(seq_len=300), 256, 0
    )
    assert (
        name == "built-in" and [ids.shape for ids in found] == [(1, 256)] * 5
    )  # the model's maximum


def test_a_short_text_is_filled_up(tmp_path):
    (tmp_path / "short.txt").write_text(data_text("code.txt")[:600])
    _, found = calibration_sequences(
        char_tokenizer(), str(tmp_path / "short.txt"), CalibrationRecipe(seq_len=512), 4096, 0
    )
    assert [ids.shape for ids in found] == [(1, 512)] * 5


def test_the_first_probe_is_the_text_of_long_references():
    """A layer that only such references need (LOG.md) shows in no other probe; and every text
    calibrates."""
    recipe = load_recipe()
    _, found = calibration_sequences(char_tokenizer(), None, recipe.calibration, 4096, 0)
    wholes = {
        name: char_tokenizer().decode(char_tokenizer()(data_text(name)).input_ids)
        for name in BUILT_IN
    }
    homes = [name for text in texts(found) for name, whole in wholes.items() if text in whole]
    assert homes[0] == "recall.txt" and sorted(homes) == sorted(BUILT_IN)
    one = recipe.calibration.model_copy(update={"texts": ("maths",)})
    _, found = calibration_sequences(char_tokenizer(), None, one, 4096, 0)
    assert all(text in wholes["maths.txt"] for text in texts(found))


@pytest.mark.parametrize("text", ["a" * 5000, "\0" * 5000, "abcabc " * 900, "\U0001f600" * 3000])
def test_a_text_that_repeats_itself_is_refused(text):
    """Nothing is lost on it whatever the bits, so the artifact would state a KL of 0."""
    with pytest.raises(KvfoldError, match=r"'x' holds [1-7] different tokens"):
        sample_sequences(char_tokenizer(), [text], 2, 256, 0, "x")
    assert sample_sequences(char_tokenizer(), ["abcdefgh" * 900], 2, 256, 0, "x")
