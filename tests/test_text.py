"""Text sources that need no network: files, a dataset folder, the text that ships."""

import json

import pytest
from conftest import char_tokenizer
from tokenizers.processors import TemplateProcessing

from kvfold.compress.evaluate import windows_of
from kvfold.compress.text import BUILT_IN, HELD_OUT, data_text, prefix_ids, read_documents, sample_sequences
from kvfold.errors import KvfoldError


def test_a_folder_of_rows_is_read_as_a_dataset(tmp_path):
    rows = [{"text": "first row"}, {"text": "second row"}]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    name, documents = read_documents(str(tmp_path))
    assert name == tmp_path.name and documents == ["first row\n\nsecond row"]


def test_a_dataset_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(KvfoldError, match="'nobody/nothing:x:y' is neither a text file nor a dataset"):
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
    """Gemma without its BOS token is another model: calibration, probes and evaluation all put it in front."""
    tokenizer = char_tokenizer()
    name, documents = read_documents(str(text_file))
    assert prefix_ids(tokenizer) == []
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="\x02 $A", special_tokens=[("\x02", 2)])
    assert prefix_ids(tokenizer) == [2]
    for sequence in sample_sequences(tokenizer, documents, 3, 300, 0, name):
        assert sequence.shape == (1, 300) and (sequence == 2).nonzero().tolist() == [[0, 0]]
    windows = windows_of(tokenizer, documents[0], 256, 1, 2, name)
    assert [w.shape for w in windows] == [(1, 256)] * 2 and all(w[0, 0] == 2 for w in windows)
    assert windows[0][0, 1:].tolist() == [ord(c) for c in documents[0][255:510]]
