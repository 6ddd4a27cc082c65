"""Reads and checks an artifact."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry, cache_nbytes, stepped_nbytes
from kvfold.exports.architectures import head_dim_of, num_kv_heads_of, sliding_windows_of
from kvfold.exports.schema import METADATA_NAME, TENSORS_NAME, Metadata, SideModel, parse_metadata
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format

AGAIN = "the artifact is damaged, write or download it again"


@dataclass(frozen=True)
class Artifact:
    """A checked artifact: its folder, kv_cache.json, and one LayerSpec a layer on the CPU."""

    path: Path
    metadata: Metadata
    specs: list[LayerSpec]

    @property
    def geometry(self) -> Geometry:
        return self.metadata.geometry

    @property
    def formats(self) -> list[tuple[Format, Format]]:
        return self.metadata.formats


def is_artifact(path: Path) -> bool:
    """Whether a folder claims to be an artifact."""
    return (path / METADATA_NAME).is_file()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_metadata(path: Path) -> Metadata:
    """kv_cache.json of an artifact's folder, without looking at the tensors.

    Raises:
        KvfoldError: no artifact there, or a damaged kv_cache.json.
    """
    if not path.is_dir():
        raise KvfoldError(f"'{path}' is not a folder; give the folder that `kvfold compress` printed.")
    if not is_artifact(path):
        raise KvfoldError(
            f"'{path}' holds no {METADATA_NAME}, so it is not an artifact; give a folder that `kvfold compress` wrote."
        )
    try:
        text = (path / METADATA_NAME).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise KvfoldError(f"{METADATA_NAME} in '{path}' is not UTF-8; {AGAIN}.") from None
    return parse_metadata(text)


def read_artifact(path: Path | str) -> Artifact:
    """Reads an artifact and checks all of it: hashes, schema, tensors, the account, the model's shape.

    Raises:
        KvfoldError: what is wrong with it, in one sentence.
    """
    path = Path(path)
    metadata = read_metadata(path)
    _check_files(path, metadata)
    _check_config(path, metadata)
    specs = _read_specs(path / TENSORS_NAME, metadata)
    account = metadata.account
    for at, nbytes in [(account.at, account.bytes), *((int(n), b) for n, b in account.bytes_at.items())]:
        if nbytes not in [of(metadata.geometry, metadata.formats, at) for of in (cache_nbytes, stepped_nbytes)]:
            raise KvfoldError(
                f"{METADATA_NAME} states {nbytes} bytes at {at} tokens, which its own formats contradict; {AGAIN}."
            )
    return Artifact(path, metadata, specs)


def _check_files(path: Path, metadata: Metadata) -> None:
    for name in ("config.json", TENSORS_NAME):
        if name not in metadata.files:
            raise KvfoldError(f"{METADATA_NAME} in '{path}' lists no sha256 of {name}; {AGAIN}.")
    for name, digest in metadata.files.items():
        if Path(name).name != name:
            raise KvfoldError(
                f"{METADATA_NAME} lists the file '{name}', but an artifact's files lie side by side; {AGAIN}."
            )
        if not (path / name).is_file():
            raise KvfoldError(f"'{path}' lacks {name}; {AGAIN}.")
        if file_sha256(path / name) != digest:
            raise KvfoldError(f"{name} in '{path}' does not match its sha256 in {METADATA_NAME}; {AGAIN}.")
    unlisted = sorted(p.name for p in path.glob("*.safetensors") if p.name not in metadata.files)
    if unlisted:
        raise KvfoldError(f"'{path}' holds {unlisted[0]}, which {METADATA_NAME} does not list; remove it.")


def _check_config(path: Path, metadata: Metadata) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    cache = metadata.cache
    if cache.sliding and tuple(cache.sliding) != sliding_windows_of(config):
        raise KvfoldError(
            f"config.json has sliding windows {sliding_windows_of(config)}, but {METADATA_NAME} {tuple(cache.sliding)}; {AGAIN}."
        )
    found = (config.num_hidden_layers, config.num_attention_heads, num_kv_heads_of(config), head_dim_of(config))
    stated = (cache.num_layers, cache.num_heads, cache.num_kv_heads, cache.head_dim)
    if found != stated:
        raise KvfoldError(
            f"config.json has layers, heads, KV heads and head_dim {found}, but {METADATA_NAME} {stated}; {AGAIN}."
        )


def tensor_shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that kv_cache.safetensors must hold, all float32; −1 is any number up to head_dim / 2."""
    heads, dim = metadata.cache.num_kv_heads, metadata.cache.head_dim

    def shape(name: str, groups: int) -> tuple[int, ...]:
        clip = (heads,) if groups == 1 else (heads, groups)
        return {"matrix": (heads, dim, dim), "offset": (heads, dim), "clip": clip, "frequencies": (-1,)}[name]

    return {
        f"layers.{i}.{side}.{name}": shape(name, model.format.build().num_groups)
        for i, layer in enumerate(metadata.layers)
        for side, model in (("key", layer.key), ("value", layer.value))
        for name in model.tensors
    }


def _fits(tensor: Tensor, shape: tuple[int, ...], head_dim: int) -> bool:
    if shape == (-1,):
        return tensor.dtype == torch.float32 and tensor.dim() == 1 and 0 < len(tensor) <= head_dim // 2
    return tensor.dtype == torch.float32 and tuple(tensor.shape) == shape


def _read_specs(path: Path, metadata: Metadata) -> list[LayerSpec]:
    expected = tensor_shapes(metadata)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as stored:
            names = set(stored.keys())
            for name in sorted(names ^ set(expected)):
                fault = f"holds the tensor {name}, which no layer uses" if name in names else f"lacks the tensor {name}"
                raise KvfoldError(f"{path.name} {fault}; {AGAIN}.")
            for name, shape in expected.items():
                tensors[name] = stored.get_tensor(name)
                if not _fits(tensors[name], shape, metadata.cache.head_dim):
                    raise KvfoldError(
                        f"{path.name}: {name} is {tuple(tensors[name].shape)}, but must be float32 {shape}; {AGAIN}."
                    )
                if name.endswith("frequencies") and not bool(((tensors[name] >= 0) & (tensors[name] <= math.pi)).all()):
                    raise KvfoldError(f"{path.name}: {name} has a value outside 0 … π radians a token; {AGAIN}.")
                if name.endswith("clip") and not bool(((tensors[name] > 0) & (tensors[name] <= 1)).all()):
                    raise KvfoldError(f"{path.name}: {name} has a value outside (0, 1]; {AGAIN}.")
                if name.endswith("matrix") and bool(torch.linalg.inv_ex(tensors[name].double()).info.any()):
                    raise KvfoldError(f"{path.name}: {name} is singular, so no query can follow it; {AGAIN}.")
                if not bool(torch.isfinite(tensors[name]).all()):
                    raise KvfoldError(f"{path.name}: {name} is not finite; {AGAIN}.")
    except SafetensorError as error:
        raise KvfoldError(f"{path.name} is not a readable safetensors file ({error}); {AGAIN}.") from None

    def side(i: int, name: str, model: SideModel) -> dict:
        found: dict[str, Any] = {t: tensors[f"layers.{i}.{name}.{t}"] for t in model.tensors}
        if "frequencies" in found:
            found["frequencies"] = tuple(found["frequencies"].tolist())
        return {"format": model.format.build(), "transforms": tuple(model.transforms), **found}

    return [
        LayerSpec(KeySpec(**side(i, "key", layer.key)), ValueSpec(**side(i, "value", layer.value)))
        for i, layer in enumerate(metadata.layers)
    ]
