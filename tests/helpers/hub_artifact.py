"""Artifacts that state something else, and what the local Hub holds of them."""

import re
from pathlib import Path

from hub_server import Hub

from kvfold.exports.reader import read_metadata
from kvfold.exports.schema import METADATA_NAME, dump_metadata


def set_licence(artifact: Path, licence: str | None) -> None:
    card = (artifact / "README.md").read_text()
    line = f"license: {licence}\n" if licence else ""
    (artifact / "README.md").write_text(re.sub(r"license: .*\n", line, card, count=1))


def remake(artifact: Path, **fields) -> None:
    """Makes kv_cache.json state other top-level fields, with a digest that fits."""
    metadata = read_metadata(artifact)
    (artifact / METADATA_NAME).write_text(dump_metadata(metadata.model_copy(update=fields)))


def rename_model(artifact: Path, name: str) -> None:
    provenance = read_metadata(artifact).provenance
    remake(artifact, provenance=provenance.model_copy(update={"model": name}))


def files_on(hub: Hub, repo: str = "someone/small", branch: str = "main") -> dict[str, bytes]:
    held = hub.repos[repo]
    return {name: file.content for name, file in held.commits[held.branches[branch]].items()}
