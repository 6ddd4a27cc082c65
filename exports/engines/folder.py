"""A checkpoint folder for an engine: the artifact's plain weights, byte for byte,
with scales of the engine's own KV cache."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.exports.architectures import architecture_of, attention_layers_of
from kvfold.exports.files import REPORT_NAME
from kvfold.exports.place import check_output, new_folder
from kvfold.exports.reader import Artifact
from kvfold.exports.schema import METADATA_NAME, TENSORS_NAME
from kvfold.pretrained import config_from_pretrained

OURS = {
    METADATA_NAME,
    TENSORS_NAME,
    REPORT_NAME,
    "recipe.yaml",
    "README.md",
}  # of no use to an engine
INDEX = "model.safetensors.index.json"


def check_engine_folder(artifact: Artifact, out: Path) -> None:
    """Refuses a place that the export can't go, before anything is computed.

    Raises:
        KvfoldError: it exists and isn't empty, can't be written, or the disk is too full.
    """
    if out.is_dir() and any(out.iterdir()):
        raise KvfoldError(
            f"Output '{out}' exists and is not empty; choose another folder or empty it."
        )
    check_output(
        out, sum(p.stat().st_size for p in artifact.path.glob("*.safetensors")) + (16 << 20)
    )


def attention_names(artifact: Artifact) -> list[str]:
    """Name of each layer's attention module, "model.layers.0.self_attn", under which engines look
    for scales.

    Raises:
        KvfoldError: a family whose attention modules are called something else, or whose layers
            differ.
    """
    config = config_from_pretrained(artifact.path)
    arch = architecture_of(config)
    if (arch.layers, arch.attention) != ("model.layers", "self_attn"):
        raise KvfoldError(
            f"Model family '{arch.model_type}' cannot be expressed: engines look for scales at "
            f"model.layers.N.self_attn, this family keeps its attention at {arch.layers}.N.{arch.attention}; "
            "export another family."
        )
    if artifact.metadata.cache.heads or artifact.metadata.cache.shared:
        raise KvfoldError(
            f"Model family '{arch.model_type}' cannot be expressed: its layers have heads of several shapes or read "
            "other layers' keys and values, for which engines' scales have no names that are known; export another "
            "family."
        )
    return [f"{arch.layers}.{i}.{arch.attention}" for i in attention_layers_of(config)]


def write_engine_folder(
    artifact: Artifact,
    out: Path,
    scales: Mapping[str, Tensor],
    quantization_config: dict[str, Any],
    extra: Mapping[str, Any],
    about: str,
) -> None:
    """Writes the folder; it appears by rename when it is complete.

    Args:
        artifact: whose weights, tokenizer and generation config are copied unchanged.
        out: the folder; must pass `check_engine_folder`.
        scales: name → tensor, written to a shard of their own.
        quantization_config: goes into config.json under that name.
        extra: file name → object, written as JSON.
        about: a sentence for README.md on what the folder holds.
    Raises:
        KvfoldError: the disk filled up; nothing is left behind.
    """
    with new_folder(out) as scratch:
        for path in sorted(artifact.path.iterdir()):
            if (
                path.is_file()
                and path.name not in OURS
                and path.suffix != ".safetensors"
                and path.name != INDEX
            ):
                shutil.copyfile(path, scratch / path.name)
        _write_weights(artifact.path, scratch, scales)
        config = json.loads((scratch / "config.json").read_text(encoding="utf-8"))
        _dump(scratch / "config.json", {**config, "quantization_config": quantization_config})
        for name, data in extra.items():
            _dump(scratch / name, data)
        model = artifact.metadata.provenance.model
        (scratch / "README.md").write_text(
            f"---\nbase_model: {json.dumps(model)}\nbase_model_relation: quantized\n---\n# {model} with a calibrated "
            f"KV cache\n\n{about}\n",
            encoding="utf-8",
        )


def _dump(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(source: Path, target: Path, scales: Mapping[str, Tensor]) -> None:
    """Copies the weight shards under new numbers and adds the scales as the last one, with an index
    over all."""
    shards = sorted(p for p in source.glob("*.safetensors") if p.name != TENSORS_NAME)
    count = len(shards) + 1
    where: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{count:05d}.safetensors"
        shutil.copyfile(shard, target / name)
        with safe_open(shard, framework="pt") as stored:
            where |= dict.fromkeys(stored.keys(), name)
        total += shard.stat().st_size
    name = f"model-{count:05d}-of-{count:05d}.safetensors"
    save_file(
        {key: tensor.contiguous() for key, tensor in scales.items()},
        target / name,
        metadata={"format": "pt"},
    )
    shutil.copymode(
        target / "config.json", target / name
    )  # safetensors makes files that only their owner can read
    where |= dict.fromkeys(scales, name)
    total += sum(tensor.nbytes for tensor in scales.values())
    _dump(
        target / INDEX,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
    )
