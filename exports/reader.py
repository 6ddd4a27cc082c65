"""Reads and checks an artifact."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry, cache_nbytes, stepped_nbytes
from kvfold.exports.architectures import (
    architecture_of,
    attention_layers_of,
    heads_of,
    is_chunked,
    keeps_states,
    shared_layers_of,
    sliding_windows_of,
    text_of,
)
from kvfold.exports.files import (
    AGAIN,
    INDEX,
    WEIGHTS,
    check_files,
    file_sha256,
    read_index,
    signed_files,
    write_index,
)
from kvfold.exports.schema import (
    METADATA_NAME,
    TENSORS_NAME,
    Metadata,
    SideModel,
    dump_metadata,
    parse_metadata,
)
from kvfold.exports.scratch import write_whole
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.exports.weights import check_weights_fit, stored_shapes
from kvfold.kernels.formats import Format
from kvfold.pretrained import config_from_pretrained, reason_of

__all__ = [
    "Artifact", "check_artifact", "file_sha256", "fix_artifact", "is_artifact", "read_artifact", "read_cache",
    "read_metadata", "tensor_shapes", "update_artifact",
]  # fmt: skip
MOST_NBYTES = 16 << 20  # of kv_cache.json; a thousand layers take a tenth
MOST_OFFSET = 2.0**64  # of an offset, a matrix or its inverse; its square is finite in float32
UNDONE = 0.01  # the most that a matrix times its inverse may differ from 1
MOST_CONDITION = 1e10  # of a matrix, in Frobenius norms; an orthogonal one has head_dim


@dataclass(frozen=True)
class Artifact:
    """A checked artifact: its folder, kv_cache.json, and one LayerSpec a layer on the CPU.

    Attributes:
        heads: the KV heads that one process of several caches, whose `specs` these are; None for
            all of them.
    """

    path: Path
    metadata: Metadata
    specs: list[LayerSpec]
    heads: slice | None = None

    @property
    def geometry(self) -> Geometry:
        """Of the heads that are cached."""
        whole = self.metadata.geometry
        if self.heads is None:
            return whole
        return replace(
            whole, num_kv_heads=self.heads.stop - self.heads.start
        )  # layers are alike (runtime/parallel.py)

    @property
    def num_heads(self) -> int:
        """Query heads of the KV heads that are cached."""
        cache = self.metadata.cache
        return cache.num_heads * self.geometry.num_kv_heads // cache.num_kv_heads

    @property
    def digest(self) -> str:
        """Of kv_cache.json, and of the heads if they are a part: what a saved cache belongs to."""
        if self.heads is None:
            return self.metadata.digest
        return f"{self.metadata.digest}, KV heads {self.heads.start} to {self.heads.stop - 1}"

    @property
    def formats(self) -> list[tuple[Format, Format]]:
        return self.metadata.formats


def is_artifact(path: Path) -> bool:
    """Whether a folder claims to be an artifact."""
    return (path / METADATA_NAME).is_file()


def read_metadata(path: Path) -> Metadata:
    """kv_cache.json of an artifact's folder, without looking at the tensors.

    Raises:
        KvfoldError: no artifact there, or a damaged kv_cache.json.
    """
    if not path.is_dir():
        raise KvfoldError(
            f"'{path}' is not a folder; give the folder that `kvfold compress` printed."
        )
    if not is_artifact(path):
        raise KvfoldError(
            f"'{path}' holds no {METADATA_NAME}, so it is not an artifact; give a folder that `kvfold compress` wrote."
        )
    if (path / METADATA_NAME).stat().st_size > MOST_NBYTES:
        raise KvfoldError(
            f"{METADATA_NAME} in '{path}' has more than {MOST_NBYTES >> 20} MiB; {AGAIN}."
        )
    try:
        text = (path / METADATA_NAME).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise KvfoldError(f"{METADATA_NAME} in '{path}' is not UTF-8; {AGAIN}.") from None
    return parse_metadata(text)


def read_artifact(path: Path | str) -> Artifact:
    """Reads an artifact and checks all of it: hashes, schema, weights, tensors, the account, the
    model's shape.

    Raises:
        KvfoldError: what is wrong with it, in one sentence.
    """
    path = Path(path)
    return check_artifact(path, read_metadata(path))


def read_cache(path: Path) -> tuple[Metadata, list[LayerSpec]]:
    """What an artifact says of its cache, checked, and none of its other files: for the further
    processes of one that has called `read_artifact`.

    Raises:
        KvfoldError: kv_cache.json or kv_cache.safetensors is damaged.
    """
    metadata = read_metadata(path)
    tensors = path / TENSORS_NAME
    if not tensors.is_file() or file_sha256(tensors) != metadata.files.get(TENSORS_NAME):
        raise KvfoldError(
            f"'{path}' has no {TENSORS_NAME} of the sha256 that {METADATA_NAME} states; {AGAIN}."
        )
    return metadata, _read_specs(tensors, metadata)


def check_artifact(path: Path, metadata: Metadata) -> Artifact:
    """`read_artifact` of a folder whose kv_cache.json says `metadata`, or is to say it."""
    check_files(path, metadata.files)
    _check_config(path, metadata)
    specs = _read_specs(path / TENSORS_NAME, metadata)
    account = metadata.account
    for at, nbytes in [
        (account.at, account.bytes),
        *((int(n), b) for n, b in account.bytes_at.items()),
    ]:
        if nbytes not in [
            of(metadata.geometry, metadata.formats, at) for of in (cache_nbytes, stepped_nbytes)
        ]:
            raise KvfoldError(
                f"{METADATA_NAME} states {nbytes} bytes at {at} tokens, which its own formats contradict; {AGAIN}."
            )
    return Artifact(path, metadata, specs)


def fix_artifact(path: Path) -> list[str]:
    """Adds to an artifact of an earlier version what is written today, and signs that: the index of
    a single file of weights, which serving engines need.

    Returns:
        Names of the files that were written.
    Raises:
        KvfoldError: it isn't valid; nothing is written then.
    """
    read_artifact(path)
    try:
        written = write_index(path)
    except OSError as error:
        raise KvfoldError(
            f"'{path / INDEX}' cannot be written ({error.strerror}); fix a copy of the artifact that you may write to."
        ) from None
    if not written:
        return []
    try:
        return update_artifact(path)
    except KvfoldError:
        (path / INDEX).unlink()
        raise


def update_artifact(path: Path) -> list[str]:
    """Signs an artifact after an edit: lists the hashes of its files as they are now, once all else
    is valid.

    Returns:
        Names of the files that were changed, added or removed.
    Raises:
        KvfoldError: what would still be wrong; nothing is written then.
    """
    old = read_metadata(path)
    files = signed_files(path, old.files)
    changed = sorted(
        name for name in {*files, *old.files} if files.get(name) != old.files.get(name)
    )
    metadata = old.model_copy(update={"files": files})
    check_artifact(path, metadata)
    if changed:
        text = dump_metadata(metadata)
        try:
            write_whole(
                path / METADATA_NAME, lambda scratch: scratch.write_text(text, encoding="utf-8")
            )
        except OSError as error:
            raise KvfoldError(
                f"'{path / METADATA_NAME}' cannot be written ({error.strerror}); "
                "sign a copy of the artifact that you may write to."
            ) from None
    return changed


def _check_config(path: Path, metadata: Metadata) -> None:
    config = config_from_pretrained(path)
    pairs = architecture_of(config).rope_pairs
    if getattr(config, "quantization_config", None) is not None:
        raise KvfoldError(
            f"config.json in '{path}' has a quantization_config, but an artifact's weights are plain; {AGAIN}."
        )
    try:
        text = text_of(config)
        found = (
            len(attention_layers_of(text)),
            text.num_attention_heads,
            *heads_of(text)[0],
        )
        heads = heads_of(text)
        shared = shared_layers_of(text)
        windows, keeping = sliding_windows_of(config), keeps_states(config)
    except Exception as error:  # fields of the right names that hold anything
        raise KvfoldError(
            f"config.json in '{path}' does not describe a model ({type(error).__name__}: {reason_of(error)}); {AGAIN}."
        ) from error
    cache = metadata.cache
    if cache.sliding and tuple(cache.sliding) != windows:
        raise KvfoldError(
            f"config.json has sliding windows {windows}, but {METADATA_NAME} {tuple(cache.sliding)}; {AGAIN}."
        )
    if cache.rope_pairs != pairs:
        raise KvfoldError(
            f"config.json names a family whose RoPE turns {pairs} pairs, but {METADATA_NAME} says {cache.rope_pairs}; "
            f"{AGAIN}."
        )
    if keeping != (cache.states is not None):
        known = "some of whose layers" if keeping else "none of whose layers"
        raise KvfoldError(
            f"config.json describes a model {known} keep a state, but {METADATA_NAME} says otherwise (cache.states); "
            f"{AGAIN}."
        )
    stated = (cache.num_layers, cache.num_heads, cache.num_kv_heads, cache.head_dim)
    if found != stated:
        raise KvfoldError(
            f"config.json has layers, heads, KV heads and head_dim {found}, but {METADATA_NAME} {stated}; {AGAIN}."
        )
    if len(set(heads)) > 1 and heads != tuple(cache.heads_of(i) for i in range(cache.num_layers)):
        raise KvfoldError(
            f"config.json has layers of KV heads and head_dim {heads}, but {METADATA_NAME} {cache.heads}; {AGAIN}."
        )
    if tuple(cache.shared) != shared:
        raise KvfoldError(
            f"config.json has other layers read the keys and values of layers {shared}, but {METADATA_NAME} says "
            f"{tuple(cache.shared)}; {AGAIN}."
        )
    if cache.chunked != is_chunked(config):
        raise KvfoldError(
            f"config.json and {METADATA_NAME} (cache.chunked) differ in whether layers attend in chunks; {AGAIN}."
        )
    shards = (
        [WEIGHTS] if WEIGHTS in metadata.files else sorted(set(read_index(path / INDEX).values()))
    )
    check_weights_fit(path, config, stored_shapes([path / name for name in shards], AGAIN), AGAIN)


def tensor_shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that kv_cache.safetensors must hold, all float32;
    −1 is any number up to head_dim / 2."""

    def shape(name: str, layer: int, groups: int) -> tuple[int, ...]:
        heads, dim = metadata.cache.heads_of(layer)
        clip = (heads,) if groups == 1 else (heads, groups)
        return {
            "matrix": (heads, dim, dim),
            "offset": (heads, dim),
            "clip": clip,
            "frequencies": (-1,),
        }[name]

    return {
        f"layers.{i}.{side}.{name}": shape(name, i, model.format.build().num_groups)
        for i, layer in enumerate(metadata.layers)
        for side, model in (("key", layer.key), ("value", layer.value))
        for name in model.tensors
    }


def _fits(tensor: Tensor, shape: tuple[int, ...], head_dim: int) -> bool:
    if shape == (-1,):
        return (
            tensor.dtype == torch.float32 and tensor.dim() == 1 and 0 < len(tensor) <= head_dim // 2
        )
    return tensor.dtype == torch.float32 and tuple(tensor.shape) == shape


def has_inverse(matrix: Tensor) -> bool:
    """Whether float32 holds an inverse of each matrix [heads, dim, dim] that undoes it: one that
    float64 finds may be infinite there, or too coarse."""
    found = torch.linalg.inv_ex(matrix.double())
    inverse = found.inverse.float().double()
    if bool(found.info.any()) or not bool(torch.isfinite(inverse).all()):
        return False
    if not max(float(x.abs().max()) for x in (matrix, inverse)) < MOST_OFFSET:
        return False
    rest = matrix.double() @ inverse - torch.eye(
        matrix.shape[-1], dtype=torch.float64, device=matrix.device
    )
    condition = torch.linalg.matrix_norm(matrix.double()) * torch.linalg.matrix_norm(inverse)
    return bool((rest.abs() < UNDONE).all()) and bool((condition < MOST_CONDITION).all())


def _read_specs(path: Path, metadata: Metadata) -> list[LayerSpec]:
    expected = tensor_shapes(metadata)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as stored:
            names = set(stored.keys())
            for name in sorted(names ^ set(expected)):
                fault = (
                    f"holds the tensor {name}, which no layer uses"
                    if name in names
                    else f"lacks the tensor {name}"
                )
                raise KvfoldError(f"{path.name} {fault}; {AGAIN}.")
            for name, shape in expected.items():
                tensors[name] = stored.get_tensor(name)
                dim = metadata.cache.heads_of(int(name.split(".")[1]))[1]
                if not _fits(tensors[name], shape, dim):
                    raise KvfoldError(
                        f"{path.name}: {name} is {tuple(tensors[name].shape)}, but must be float32 {shape}; {AGAIN}."
                    )
                if name.endswith("frequencies") and not bool(
                    ((tensors[name] >= 0) & (tensors[name] <= math.pi)).all()
                ):
                    raise KvfoldError(
                        f"{path.name}: {name} has a value outside 0 … π radians a token; {AGAIN}."
                    )
                if name.endswith("clip") and not bool(
                    ((tensors[name] > 0) & (tensors[name] <= 1)).all()
                ):
                    raise KvfoldError(f"{path.name}: {name} has a value outside (0, 1]; {AGAIN}.")
                if not bool(torch.isfinite(tensors[name]).all()):
                    raise KvfoldError(f"{path.name}: {name} is not finite; {AGAIN}.")
                if name.endswith("offset") and bool((tensors[name].abs() > MOST_OFFSET).any()):
                    raise KvfoldError(f"{path.name}: {name} has a value beyond ±2^64; {AGAIN}.")
                if name.endswith("matrix") and not has_inverse(tensors[name]):
                    raise KvfoldError(
                        f"{path.name}: {name} is singular, so no query can follow it; {AGAIN}."
                    )
    except SafetensorError as error:
        raise KvfoldError(
            f"{path.name} is not a readable safetensors file ({error}); {AGAIN}."
        ) from None

    def side(i: int, name: str, model: SideModel) -> dict:
        found: dict[str, Any] = {t: tensors[f"layers.{i}.{name}.{t}"] for t in model.tensors}
        if "frequencies" in found:
            found |= {
                "frequencies": tuple(found["frequencies"].tolist()),
                "pairs": metadata.cache.rope_pairs,
            }
        return {"format": model.format.build(), "transforms": tuple(model.transforms), **found}

    return [
        LayerSpec(KeySpec(**side(i, "key", layer.key)), ValueSpec(**side(i, "value", layer.value)))
        for i, layer in enumerate(metadata.layers)
    ]
