"""An artifact to be damaged, and both readers that must refuse it (fixtures for the tests that
do)."""

import shutil
import sys
from pathlib import Path

import pytest

from kvfold import KvfoldError, runtime
from kvfold.compress.cli import main
from kvfold.exports.reader import file_sha256, read_metadata
from kvfold.exports.schema import METADATA_NAME, dump_metadata
from kvfold.exports.units import printable


@pytest.fixture
def artifact(tmp_path, tiny_artifact) -> Path:
    """A copy of the tiny artifact, to be damaged."""
    return shutil.copytree(tiny_artifact, tmp_path / "artifact")


@pytest.fixture
def both_refuse(artifact, monkeypatch, capsys):
    """Checks that both readers refuse the artifact with the same sentence, which has these
    words."""

    def check(*words: str, artifact: Path = artifact) -> None:
        with pytest.raises(KvfoldError) as error:
            runtime.load_pretrained(artifact)
        message = str(error.value)
        monkeypatch.setattr(sys, "argv", ["kvfold", "validate", str(artifact)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert (stop.value.code, out) == (2, "")
        assert err == f"kvfold: {printable(' '.join(message.split()))}\n"
        for word in words:
            assert word in message, message

    return check


def restate(artifact: Path, **fields) -> None:
    """Makes kv_cache.json state other top-level fields, with a digest that fits."""
    metadata = read_metadata(artifact)
    (artifact / METADATA_NAME).write_text(dump_metadata(metadata.model_copy(update=fields)))


def rehash(artifact: Path, *names: str) -> None:
    """Makes kv_cache.json state the hashes of files that were changed."""
    files = read_metadata(artifact).files
    restate(artifact, files={**files, **{name: file_sha256(artifact / name) for name in names}})
