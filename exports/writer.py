"""Writes an artifact: beside its place, checked by reading it back, then renamed, so that it is there whole or not at all."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from kvfold.errors import KvfoldError
from kvfold.exports.card import CARD_NAME, Base, model_card
from kvfold.exports.plots import draw_plots
from kvfold.exports.reader import Artifact, file_sha256, is_artifact, read_artifact
from kvfold.exports.report import REPORT_NAME, report_html
from kvfold.exports.schema import METADATA_NAME, TENSORS_NAME, Metadata, dump_metadata
from kvfold.exports.spec import LayerSpec
from kvfold.exports.units import format_nbytes

UNHASHED = {METADATA_NAME, CARD_NAME, REPORT_NAME}  # people edit the card, `kvfold report` adds measured rows


def check_output(out: Path, need_nbytes: int) -> None:
    """Refuses a place that an artifact can't or shouldn't go.

    Args:
        need_nbytes: bytes that the run will write beside it.
    Raises:
        KvfoldError: something else is there, the parent isn't writable, or the disk is too full.
    """
    if out.name in ("", ".."):
        raise KvfoldError(
            f"Output '{out}' has no name of its own; name the artifact's folder, for example '{out / 'artifact'}'."
        )
    if out.exists() and not out.is_dir():
        raise KvfoldError(f"Output '{out}' is a file, but an artifact is a folder; choose another --out.")
    if out.is_dir() and any(out.iterdir()) and not is_artifact(out):
        raise KvfoldError(f"Output '{out}' exists and is not an artifact; choose another --out or empty it.")
    parent = out.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise KvfoldError(f"Output '{out}' cannot be written, since '{parent}' is a file; choose another --out.")
    if not os.access(parent, os.W_OK):
        raise KvfoldError(
            f"Output '{out}' cannot be written, since '{parent}' is read-only for this user; choose another --out."
        )
    free = shutil.disk_usage(parent).free
    if free < need_nbytes:
        raise KvfoldError(
            f"Output '{out}' needs {format_nbytes(need_nbytes)} of disk space while it is made, but {format_nbytes(free)} are free; "
            "free some or choose another --out."
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that no space is left; safetensors raises its own kind, with the system's number in the text."""
    if isinstance(error, SafetensorError):
        return f"os error {errno.ENOSPC}" in str(error)
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, to be filled; it becomes `out`, which must not exist or be empty, when the block ends well.

    Raises:
        KvfoldError: the disk filled up; nothing is left behind.
    """
    scratch = out.with_name(out.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        _open_to_readers(scratch)
        if out.is_dir():
            out.rmdir()
        os.replace(scratch, out)
    except OSError as error:
        if is_disk_full(error):
            raise KvfoldError(
                f"The disk filled up while making '{out}'; free some space or choose another folder."
            ) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_tensors(path: Path, specs: list[LayerSpec]) -> None:
    """kv_cache.safetensors: float32, named layers.I.key|value.matrix|offset|clip|frequencies."""
    tensors = {}
    for i, spec in enumerate(specs):
        for side, part in (("key", spec.key), ("value", spec.value)):
            for name in ("matrix", "offset", "clip"):
                tensor = getattr(part, name, None)
                if tensor is not None:
                    tensors[f"layers.{i}.{side}.{name}"] = tensor.contiguous().float()
        if spec.key.frequencies is not None:
            tensors[f"layers.{i}.key.frequencies"] = torch.tensor(spec.key.frequencies, dtype=torch.float32)
    save_file(tensors, path, metadata={"format": "pt"})


def write_card(folder: Path, metadata: Metadata, name: str, base: Base) -> None:
    """README.md, the plots it shows, report.html, and the licence texts that go with the weights."""
    draw_plots(folder, metadata)
    for text in base.licence.texts:
        shutil.copyfile(text, folder / text.name)
    (folder / CARD_NAME).write_text(model_card(metadata, name, base), encoding="utf-8")
    (folder / REPORT_NAME).write_text(report_html(metadata), encoding="utf-8")


def write_artifact(
    out: Path,
    metadata: Metadata,
    specs: list[LayerSpec],
    save_model: Callable[[Path], None],
    recipe: str,
    base: Base | None = None,
) -> Artifact:
    """Writes and validates an artifact; replaces one that is there.

    Args:
        out: its folder.
        metadata: complete but for `files`.
        specs: one LayerSpec a layer.
        save_model: writes config.json, weights and tokenizer files into a folder.
        recipe: recipe.yaml's text.
        base: what the card says of the base model.
    Raises:
        OSError, SafetensorError: what the system says, e.g. a full disk (`is_disk_full`); nothing is left behind.
    """

    def fill(folder: Path) -> None:
        save_model(folder)
        write_tensors(folder / TENSORS_NAME, specs)
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        write_card(folder, metadata, out.name, base or Base())

    return install(out, metadata, fill)


def install(out: Path, metadata: Metadata, fill: Callable[[Path], None]) -> Artifact:
    """Has a folder filled beside `out`, adds kv_cache.json with the hashes, validates it, and renames it into place.

    Args:
        out: the artifact's folder; what is there goes only when the new one is complete.
        metadata: complete but for `files`.
        fill: writes every other file into the folder that it is given.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(out.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        fill(scratch)
        files = {p.name: file_sha256(p) for p in sorted(scratch.iterdir()) if p.name not in UNHASHED}
        complete = metadata.model_copy(update={"files": files})
        (scratch / METADATA_NAME).write_text(dump_metadata(complete), encoding="utf-8")
        read_artifact(scratch)
        _open_to_readers(scratch)
        _swap(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return read_artifact(out)


def _open_to_readers(folder: Path) -> None:
    """Gives every file the rights that a new file has here; safetensors' are for their owner alone."""
    allowed = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        path.chmod(allowed)


def _swap(scratch: Path, out: Path) -> None:
    """Puts the finished folder in its place; an older artifact there goes only then."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(scratch, out)
    shutil.rmtree(old, ignore_errors=True)
