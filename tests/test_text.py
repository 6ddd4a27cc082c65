"""Text sources that need no network: files, a dataset folder, the text that ships."""

import json

import pytest

from kvfold.compress.text import BUILT_IN, HELD_OUT, data_text, read_documents
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
