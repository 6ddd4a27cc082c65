"""Artifacts: any file damaged, its hash as it was or made to fit."""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz.mutate import corrupt, dump, replace_file, tamper, tamper_tensors, text_bomb
from kvfold import KvfoldError, runtime
from kvfold.compress.cli import print_table
from kvfold.exports.account import cache_nbytes
from kvfold.exports.files import UNHASHED
from kvfold.exports.page.report import report_html
from kvfold.exports.reader import read_artifact, update_artifact
from kvfold.exports.schema import METADATA_NAME, TENSORS_NAME, Metadata
from kvfold.pretrained import tokenizer_from_pretrained

IDS = torch.randint(1, 128, (1, 70), generator=torch.Generator().manual_seed(3))
LARGEST = 1 << 26  # bytes of a file that is hashed here
KINDS = (
    "bytes",
    "sealed bytes",
    "field",
    "field",
    "json",
    "json",
    "tensors",
    "weights",
    "place",
    "text",
)
JSON_FILES = (
    "config.json",
    "config.json",
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
)


class Artifacts:
    """Cases from one good artifact."""

    name = "artifact"

    def __init__(self, base: Path) -> None:
        self.base = base
        self.names = sorted(p.name for p in base.iterdir() if p.name not in UNHASHED)
        with torch.no_grad():
            self.logits = runtime.load_pretrained(base, device="cpu")(IDS).logits
        self.check(base, False, Random(1))  # imports what is imported late

    def make(self, folder: Path, rng: Random) -> tuple[str, bool]:
        """Writes a mutation of the artifact into an empty folder; says what it is, and whether the
        hashes fit it."""
        for file in self.base.iterdir():
            os.link(file, folder / file.name)
        metadata = json.loads((self.base / METADATA_NAME).read_text())
        kind = rng.choice(KINDS)
        if kind == "bytes":
            name = rng.choice([*self.names, METADATA_NAME])
            put(folder / name, corrupt((folder / name).read_bytes(), rng))
            return f"{kind} {name}", False
        if kind == "field":
            what = tamper(metadata, rng)
            seal(folder, metadata, account=rng.random() < 0.5)
            return f"{kind} {what}", True
        if kind == "text":
            name = rng.choice((METADATA_NAME, "config.json", "tokenizer.json"))
            put(folder / name, text_bomb((folder / name).read_text(), rng).encode())
            what = name
        elif kind == "sealed bytes":
            what = rng.choice(self.names)
            most = 4000 if what.endswith(".safetensors") else None
            put(folder / what, corrupt((folder / what).read_bytes(), rng, most))
        elif kind == "json":
            name = rng.choice(JSON_FILES)
            fields = json.loads((folder / name).read_text())
            what = f"{name} {tamper(fields, rng)}"
            put(folder / name, dump(fields))
        elif kind == "place":
            name = rng.choice([*self.names, METADATA_NAME])
            what = f"{name} {replace_file(folder / name, rng)}"
        else:
            name = TENSORS_NAME if kind == "tensors" else "model.safetensors"
            data, what = tamper_tensors((folder / name).read_bytes(), rng)
            put(folder / name, data)
        fits = rng.random() < 0.8
        if fits and not what.startswith(METADATA_NAME):
            seal(folder, metadata)
        return f"{kind} {what}", fits

    @torch.no_grad()
    def check(self, folder: Path, sealed: bool, rng: Random) -> str:
        """Reads it with everything that reads artifacts; "refused", "same" or "another".

        Raises:
            whatever it should not.
        """
        if rng.random() < 0.1:
            with contextlib.suppress(KvfoldError):
                update_artifact(folder)
                sealed = True
        try:
            artifact = read_artifact(folder)
        except KvfoldError:
            refuses(lambda: runtime.load_pretrained(folder, device="cpu"))
            raise
        with contextlib.redirect_stdout(io.StringIO()):
            print_table(artifact.metadata)
        report_html(artifact.metadata)
        tokenizer = tokenizer_from_pretrained(folder)
        model: Any = runtime.load_pretrained(folder, device="cpu")
        if (
            sealed
        ):  # transformers' own errors of odd settings are the caller's: what counts is that it ends
            with contextlib.suppress(KvfoldError, FloatingPointError):
                model(IDS, return_dict=True)
            with contextlib.suppress(Exception):
                tokenizer("The cache")
            return "another"
        assert torch.equal(model(IDS).logits, self.logits)
        return "same"


def refuses(call: Callable[[], object]) -> None:
    """Asserts that a call raises KvfoldError."""
    try:
        call()
    except KvfoldError:
        return
    raise AssertionError("one reader refuses it and the other does not")


def put(file: Path, data: bytes) -> None:
    """Writes a file anew: it may have been a second name of the base's."""
    file.unlink()
    file.write_bytes(data)


def seal(folder: Path, metadata: Any, account: bool = False) -> None:
    """Writes kv_cache.json with hashes and a digest that fit, and with a fitting account if asked
    to."""
    files = metadata.get("files") if isinstance(metadata, dict) else None
    for name in list(files) if isinstance(files, dict) else []:
        file = (
            folder / name
            if isinstance(name, str) and name.isprintable() and len(name) < 200
            else folder
        )
        if file.is_file() and file.stat().st_size < LARGEST:
            files[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    if isinstance(metadata, dict):
        body = {name: value for name, value in metadata.items() if name != "digest"}
        try:
            model = Metadata.model_validate(body)
            if account:
                lengths = {
                    n: cache_nbytes(model.geometry, model.formats, int(n))
                    for n in model.account.bytes_at
                }
                nbytes = cache_nbytes(model.geometry, model.formats, model.account.at)
                metadata["account"].update(bytes=nbytes, bytes_at=lengths)
                model = Metadata.model_validate({**body, "account": metadata["account"]})
            metadata["digest"] = model.digest
        except (ValueError, TypeError, OverflowError, RecursionError):
            text = json.dumps(body, sort_keys=True, separators=(",", ":"))
            metadata["digest"] = hashlib.sha256(text.encode()).hexdigest()
    put(folder / METADATA_NAME, dump(metadata))
