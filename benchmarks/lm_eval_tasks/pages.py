"""The documents of the task `pages`: the held-out text that `kvfold eval` reads by default, in
pages."""

from typing import Any

from datasets import Dataset

from kvfold.compress.text import HELD_OUT, data_text

PAGE = 6000  # characters: about 1500 tokens, far beyond a window of 128


def load(**_: Any) -> dict[str, Dataset]:
    """Split → documents with a `page`, as the harness wants a `custom_dataset`."""
    text = data_text(HELD_OUT)
    return {
        "test": Dataset.from_dict({"page": [text[i : i + PAGE] for i in range(0, len(text), PAGE)]})
    }
