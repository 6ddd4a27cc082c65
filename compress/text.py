"""Calibration and evaluation text: built in, a text file, or a `datasets` id, cut into seeded
sequences of tokens."""

import logging
import random
from collections.abc import Iterator
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.compress.recipe import TEXTS, CalibrationRecipe
from kvfold.errors import KvfoldError

log = logging.getLogger("kvfold")
BUILT_IN = tuple(f"{name}.txt" for name in TEXTS)
GENERAL = (
    "recall.txt",
    "prose.txt",
    "code.txt",
    "maths.txt",
    "drama.txt",
)  # beside a text that is given, as many as it takes
HELD_OUT = "heldout.txt"
LEAST_TOKENS = 256  # below this there is nothing to calibrate on
LEAST_DISTINCT = 8  # different tokens: of one repeated character every choice of bits looks free
MOST_CHARS = 4_000_000  # read of a file or dataset
PIECE_CHARS = (
    500_000  # tokenised at a time, which takes hundreds of bytes a character; few texts are longer
)


def data_text(name: str) -> str:
    """A text file that the package ships."""
    return files("kvfold.compress").joinpath("data", name).read_text(encoding="utf-8")


def read_documents(
    source: str | None, default: tuple[str, ...] = BUILT_IN
) -> tuple[str, list[str]]:
    """The name and documents of a text source.

    Args:
        source: path of a UTF-8 text file; a `datasets` id as ID, ID:CONFIG or ID:CONFIG:SPLIT, or
            the folder of a dataset; None for the built-in text.
        default: files of the package that make up the built-in text.
    Raises:
        KvfoldError: no such file or dataset, not text, or empty.
    """
    if source is None:
        return "built-in", [data_text(name) for name in default]
    path = Path(source)
    if path.is_file():
        try:
            with open(path, encoding="utf-8") as stream:
                text = stream.read(MOST_CHARS)
                more = bool(stream.read(1))
        except UnicodeDecodeError:
            raise KvfoldError(f"Text '{source}' is not UTF-8; give a plain text file.") from None
        except OSError as error:
            raise KvfoldError(
                f"Text '{source}' cannot be read ({error.strerror}); give a file that can."
            ) from None
        if more:
            log.warning("of '%s' only the first %d characters are read", source, MOST_CHARS)
        name, documents = path.name, [text]
    elif path.is_dir():
        name, documents = path.resolve().name, ["\n\n".join(_dataset_rows(source))]
    elif (
        path.exists()
        or path.suffix in (".txt", ".md", ".json", ".jsonl")
        or source.startswith((".", "/", "~"))
    ):
        raise KvfoldError(
            f"Text '{source}' is not a file that can be read; give the path of a text file or a datasets id."
        )
    else:
        name, documents = source, ["\n\n".join(_dataset_rows(source))]
    if not any(text.strip() for text in documents):
        raise KvfoldError(f"Text '{source}' is empty; give at least {LEAST_TOKENS} tokens of text.")
    return name, documents


def _dataset_rows(source: str) -> list[str]:
    from datasets import load_dataset

    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        texts: list[str] = []
        size = 0
        for row in rows:
            column = row.get("text") or next((v for v in row.values() if isinstance(v, str)), None)
            if isinstance(column, str):
                texts.append(column[: MOST_CHARS - size])
                size += len(texts[-1])
            if size >= MOST_CHARS:
                break
    except Exception as error:  # datasets raises a dozen kinds, offline, missing, gated, broken
        raise KvfoldError(
            f"'{source}' is neither a text file nor a dataset that can be loaded ({type(error).__name__}); "
            "give a file's path or ID:CONFIG:SPLIT."
        ) from error
    return texts


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a long text without special tokens; of a very long one in pieces, cut at line
    breaks or spaces."""
    ids: list[int] = []
    for piece in pieces(text, PIECE_CHARS):
        ids += tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
    return ids


def pieces(text: str, most: int) -> Iterator[str]:
    """A text in pieces of `most` characters at the most: cut behind the last line break, else
    before the last space, else anywhere."""
    start = 0
    while len(text) - start > most:
        line, space = (text.rfind(mark, start + most // 2, start + most) for mark in ("\n", " "))
        end = line + 1 if line > 0 else space if space > 0 else start + most
        yield text[start:end]
        start = end
    yield text[start:]


def prefix_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text, e.g. the BOS token."""
    return list(tokenizer("").input_ids)


def calibration_sequences(
    tokenizer: Any, source: str | None, recipe: CalibrationRecipe, most: int, seed: int
) -> tuple[str, list[Tensor]]:
    """What a model is calibrated on: the given text, every second sequence from the built-in one,
    or the built-in text alone.

    Args:
        source: as in read_documents.
        most: tokens of a sequence at the most, the model's maximum.
    Returns:
        The text's name, and int64 [1, n] each, all of one length.
    Raises:
        KvfoldError: as read_documents and sample_sequences.
    """
    name, documents = read_documents(source, tuple(f"{text}.txt" for text in recipe.texts))
    count = recipe.num_sequences
    mixed = source is not None and recipe.general
    own = count - count // 2 if mixed else count
    found = sample_sequences(tokenizer, documents, own, min(recipe.seq_len, most), seed, name)
    if mixed:
        size = found[0].shape[1]
        others = [data_text(file) for file in GENERAL]
        more = sample_sequences(tokenizer, others, count - len(found), size, seed, "built-in")
        found = [x for pair in zip_longest(found, more) for x in pair if x is not None]
    return name, found


def sample_sequences(
    tokenizer: Any, documents: list[str], num_sequences: int, seq_len: int, seed: int, name: str
) -> list[Tensor]:
    """Seeded sequences that do not overlap, taken from the documents in turn.

    Returns:
        Up to num_sequences tensors int64 [1, n] with n = seq_len, or the longest document's length
        if that is shorter.
    Raises:
        KvfoldError: fewer than 256 tokens in every document, or hardly two that differ.
    """
    prefix = prefix_ids(tokenizer)
    tokens = [tokenize(tokenizer, text) for text in documents]
    longest = max(len(ids) for ids in tokens)
    if longest < LEAST_TOKENS:
        raise KvfoldError(
            f"Text '{name}' has {longest} tokens, too few to calibrate on; give at least {LEAST_TOKENS}."
        )
    distinct = len(set().union(*tokens))
    if distinct < LEAST_DISTINCT:
        raise KvfoldError(
            f"Text '{name}' holds {distinct} different tokens, from which nothing can be learned; give ordinary text "
            f"(at least {LEAST_DISTINCT} different ones)."
        )
    size = min(seq_len - len(prefix), longest)
    rng = random.Random(seed)
    windows: list[list[list[int]]] = []
    for ids in tokens:
        count = len(ids) // size
        start = rng.randrange(len(ids) - count * size + 1)
        cuts = [ids[start + i * size : start + (i + 1) * size] for i in range(count)]
        rng.shuffle(cuts)
        windows.append(cuts)
    chosen: list[Tensor] = []
    while len(chosen) < num_sequences and any(windows):
        for cuts in windows:
            if cuts and len(chosen) < num_sequences:
                chosen.append(torch.tensor([prefix + cuts.pop()]))
    return chosen
