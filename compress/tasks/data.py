"""Rows of a dataset that a task reads: a .jsonl file (or .jsonl.gz), a folder that holds it, or a
`datasets` id."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvfold.errors import KvfoldError


def read_rows(
    source: str, files: Sequence[str], fields: Sequence[str], limit: int | None = None
) -> list[dict[str, Any]]:
    """The first rows of a dataset, in its order.

    Args:
        source: file, folder, or ID, ID:CONFIG, ID:CONFIG:SPLIT (split "test" by default).
        files: names under which the dataset may lie in a folder, the first that exists counts.
        fields: text columns that every row must have.
        limit: rows at the most.
    Raises:
        KvfoldError: none of the three, not JSON lines, a column is missing, or no rows.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in files if (path / name).is_file()]
        if not found:
            raise KvfoldError(
                f"--task-data '{source}' is a folder without {' or '.join(files)}; give one that has it."
            )
        path = found[0]
    if path.is_file():
        rows = _read_lines(path, limit)
    elif path.suffix in (".jsonl", ".json", ".gz") or source.startswith((".", "/", "~")):
        raise KvfoldError(
            f"--task-data '{source}' does not exist; give a .jsonl file, a folder or a datasets id."
        )
    else:
        rows = _read_dataset(source, limit)
    for i, row in enumerate(rows):
        for name in fields:
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise KvfoldError(
                    f"Row {i} of '{source}' has no text '{name}'; every row needs {', '.join(fields)}: give the task's "
                    "own data."
                )
    if not rows:
        raise KvfoldError(
            f"--task-data '{source}' has no rows; give a file with one JSON object a line."
        )
    return rows


def _read_lines(path: Path, limit: int | None) -> list[Any]:
    rows: list[Any] = []
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8") as file
        ):
            for line in file:
                if limit is not None and len(rows) >= limit:
                    break
                if line.strip():
                    rows.append(json.loads(line))
    except (UnicodeDecodeError, json.JSONDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise KvfoldError(
            f"'{path}' is no JSON-lines file ({type(error).__name__} after {len(rows)} rows); give one JSON object a "
            "line."
        ) from error
    return rows


def _read_dataset(source: str, limit: int | None) -> list[Any]:
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise KvfoldError(
            f"'{source}' is no file, and the package `datasets`, which could fetch it, is not installed; give "
            "--task-data a file or a folder."
        ) from None
    try:
        rows = load_dataset(name, config or None, split=split or "test")
        return [
            dict(row)
            for row in rows.select(range(min(len(rows), len(rows) if limit is None else limit)))
        ]
    except Exception as error:  # datasets raises a dozen kinds, offline, missing, gated, broken
        raise KvfoldError(
            f"'{source}' is neither a file nor a dataset that can be loaded ({type(error).__name__}); "
            "give --task-data a .jsonl file, a folder or ID:CONFIG:SPLIT."
        ) from error
