"""The artifact's weights as a Model Optimizer checkpoint whose layers keep their KV cache in FP8 or
NVFP4.

hf_quant_config.json carries `kv_cache_quantized_layers`, schema version 1: attention module →
`quant_algo` of its keys and values, the same for both. Scales are
`model.layers.N.self_attn.k_proj.k_scale` and `.v_proj.v_scale`, absmax / 448 for both formats:
NVFP4's second-level scale is a sixth of that.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kvfold.exports.engines.folder import attention_names, write_engine_folder
from kvfold.exports.reader import Artifact
from kvfold.version import __version__

KV_BITS = {
    "FP8": 8.0,
    "NVFP4": 4.5,
}  # payload bits an element: e4m3; e2m1 and an e4m3 scale for 16 elements
SCHEMA_VERSION = 1
QUANT_CONFIG_NAME = "hf_quant_config.json"


def quant_config(names: Sequence[str], algos: Sequence[str]) -> dict[str, Any]:
    """hf_quant_config.json.

    Args:
        names: of the attention modules; algos: "FP8" or "NVFP4" for each.
    """
    kinds = set(algos)
    return {
        # engines recognise the format by this name, whoever wrote it
        "producer": {"name": "modelopt", "version": f"kvfold {__version__}"},
        "quantization": {
            "quant_algo": None,
            "kv_cache_quant_algo": kinds.pop() if len(kinds) == 1 else "MIXED_PRECISION",
            "kv_cache_quantized_layers": {
                n: {"quant_algo": a} for n, a in zip(names, algos, strict=True)
            },
            "kv_cache_schema_version": SCHEMA_VERSION,
            "exclude_modules": [],
        },
    }


def embedded_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json's `quantization_config` for an hf_quant_config.json: what the project's own
    converter makes of it."""
    stated = config["quantization"]
    algo = stated["kv_cache_quant_algo"]
    embedded: dict[str, Any] = {
        "quant_method": "modelopt",
        "producer": config["producer"],
        "ignore": stated["exclude_modules"],
        "kv_cache_quant_algo": algo,
        "kv_cache_quantized_layers": stated["kv_cache_quantized_layers"],
        "kv_cache_schema_version": stated["kv_cache_schema_version"],
    }
    if algo == "FP8":
        embedded["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    elif algo != "MIXED_PRECISION":
        embedded["kv_cache_scheme"] = algo
    return embedded


def write_modelopt(
    artifact: Artifact, out: Path, algos: Sequence[str], key_scales: Tensor, value_scales: Tensor
) -> None:
    """Writes the checkpoint folder.

    Args:
        algos: "FP8" or "NVFP4" of each layer.
        key_scales, value_scales: float32 [num_layers], absmax / 448.
    Raises:
        KvfoldError: the family can't be expressed.
    """
    names = attention_names(artifact)
    config = quant_config(names, algos)
    scales = {
        f"{name}.{side}_proj.{side}_scale": values[i].reshape(())
        for i, name in enumerate(names)
        for side, values in (("k", key_scales), ("v", value_scales))
    }
    about = (
        f"Plain weights and a Model Optimizer `{QUANT_CONFIG_NAME}`: {algos.count('FP8')} layers keep their KV cache "
        f"in FP8, {algos.count('NVFP4')} in NVFP4, with static scales, chosen by kvfold. Engines that read "
        f"`kv_cache_quantized_layers` (schema version {SCHEMA_VERSION}) use it."
    )
    write_engine_folder(
        artifact, out, scales, embedded_config(config), {QUANT_CONFIG_NAME: config}, about
    )
