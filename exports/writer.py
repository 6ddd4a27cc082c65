"""Writes an artifact: beside its place, checked by reading it back, then renamed,
so that it is there whole or not at all."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvfold.exports.files import CARD_NAME, REPORT_NAME, UNHASHED, write_index
from kvfold.exports.page.card import Base, model_card
from kvfold.exports.page.plots import draw_plots
from kvfold.exports.page.report import report_html
from kvfold.exports.place import open_to_readers, put_in_place, resolve_output
from kvfold.exports.reader import Artifact, file_sha256, read_artifact
from kvfold.exports.schema import METADATA_NAME, TENSORS_NAME, Metadata, dump_metadata
from kvfold.exports.scratch import NEW, remove_leftovers, scratch_folder
from kvfold.exports.spec import LayerSpec


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
            tensors[f"layers.{i}.key.frequencies"] = torch.tensor(
                spec.key.frequencies, dtype=torch.float32
            )
    save_file(tensors, path, metadata={"format": "pt"})


def write_card(folder: Path, metadata: Metadata, name: str, base: Base) -> None:
    """README.md, the plots it shows, report.html, and the licence texts that go with the
    weights."""
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
        OSError, SafetensorError: what the system says, e.g. a full disk (`full_disk`); nothing is
            left behind.
    """

    def fill(folder: Path) -> None:
        save_model(folder)
        write_tensors(folder / TENSORS_NAME, specs)
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        write_card(folder, metadata, resolve_output(out).name, base or Base())

    return install(out, metadata, fill)


def install(out: Path, metadata: Metadata, fill: Callable[[Path], None]) -> Artifact:
    """Has a folder filled beside `out`, adds kv_cache.json with the hashes, validates it, and
    renames it into place.

    Args:
        out: the artifact's folder; what is there goes only when the new one is complete.
        metadata: complete but for `files`.
        fill: writes every other file into the folder that it is given.
    """
    out = resolve_output(out)
    remove_leftovers(out)
    with scratch_folder(out) as scratch:
        new = scratch / NEW
        new.mkdir()
        fill(new)
        write_index(new)
        files = {p.name: file_sha256(p) for p in sorted(new.iterdir()) if p.name not in UNHASHED}
        complete = metadata.model_copy(update={"files": files})
        (new / METADATA_NAME).write_text(dump_metadata(complete), encoding="utf-8")
        made = read_artifact(new)
        open_to_readers(new)
        put_in_place(new, out)
    return replace(made, path=out)
