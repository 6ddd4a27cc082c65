"""What every prompt got from either cache, as JSON lines: to look at, and for an interrupted run to
go on from."""

import json
from pathlib import Path
from typing import Any

from kvfold.compress.tasks.task import Prompt
from kvfold.errors import KvfoldError


class Samples:
    """The file of one task. Its first line says what the answers depend on, each further one is a
    prompt.

    Args:
        path: FOLDER/TASK.jsonl; the folder is made.
        key: what answers depend on besides the prompt: artifact, device, dtype, versions.
        resume: go on with what the file has; otherwise it begins anew.
    Raises:
        KvfoldError: to be resumed, but the answers come from another artifact, device or version,
            or it is no such file.
    """

    def __init__(self, path: Path, key: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume and path.is_file() and path.stat().st_size:
                self._read(key)
            else:
                path.write_text(json.dumps(key) + "\n", encoding="utf-8")
        except OSError as error:
            raise KvfoldError(
                f"'{path}' cannot be written ({error.strerror}); give another --samples folder."
            ) from error

    def _read(self, key: dict[str, Any]) -> None:
        whole, _, rest = self.path.read_text(encoding="utf-8").rpartition("\n")
        try:
            header, *records = [json.loads(line) for line in whole.splitlines()] or [None]
            self.records = {record["id"]: record for record in records}
        except (ValueError, TypeError, KeyError):
            raise KvfoldError(
                f"'{self.path}' is not a file of answers; move it away or drop --resume."
            ) from None
        if header is None:  # killed before the first line was whole
            header = key
        if header != key:
            names = sorted(n for n in header.keys() | key.keys() if header.get(n) != key.get(n))
            raise KvfoldError(
                f"'{self.path}' belongs to a run with another {', '.join(names)}; repeat that run's options or drop "
                "--resume."
            )
        if rest or not whole:  # a line was cut off by the end of that run
            self._write([key, *self.records.values()], "w")

    def _write(self, lines: list[dict[str, Any]], mode: str) -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def has(self, prompt: Prompt) -> bool:
        """Whether this prompt is answered by both caches.

        Raises:
            KvfoldError: the id is, but for another question.
        """
        record = self.records.get(prompt.id)
        if record is not None and record["prompt_sha256"] != prompt.sha256:
            raise KvfoldError(
                f"'{self.path}' answers another question under {prompt.id}; repeat that run's options or drop --resume."
            )
        return record is not None

    def add(self, records: list[dict[str, Any]]) -> None:
        """Appends answered prompts."""
        self._write(records, "a")
        self.records |= {record["id"]: record for record in records}
