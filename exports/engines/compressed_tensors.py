"""The artifact's weights as a compressed-tensors checkpoint with a calibrated fp8 KV cache, for
vLLM and SGLang.

Only the cache is quantised: the weights are plain. `quantization_config` in config.json is that
project's own object with a `kv_cache_scheme`; the scales are tensors
`model.layers.N.self_attn.k_scale` and `.v_scale`, so that an engine stores e4m3(k / k_scale).
Strategy "tensor" has one scale a layer and side, "attn_head" one for each KV head.
"""

import importlib.util
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.exports.engines.folder import attention_names, write_engine_folder
from kvfold.exports.reader import Artifact

Strategy = Literal["tensor", "attn_head"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


def kv_cache_config(strategy: str) -> dict[str, Any]:
    """config.json's `quantization_config`, made and checked by compressed-tensors' own classes.

    Raises:
        KvfoldError: compressed-tensors is missing, or too old to know the strategy.
    """
    if strategy not in STRATEGIES:
        raise KvfoldError(
            f"--strategy {strategy} is not one of {', '.join(STRATEGIES)}; choose one of those."
        )
    if importlib.util.find_spec("compressed_tensors") is None:
        raise KvfoldError(
            "compressed-tensors is not installed, and this export needs it; say pip install 'kvfold[engines]'."
        )
    import compressed_tensors
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationStatus,
    )

    try:
        scheme = QuantizationArgs.model_validate(
            {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False}
        )
    except ValueError as error:
        raise KvfoldError(
            f"compressed-tensors {compressed_tensors.__version__} does not know the strategy '{strategy}'; "
            "install a newer one or use --strategy tensor."
        ) from error
    config = QuantizationConfig(
        config_groups={},
        ignore=[],
        format="dense",
        kv_cache_scheme=scheme,
        quantization_status=QuantizationStatus.FROZEN,
    )
    return {**config.model_dump(mode="json"), "version": compressed_tensors.__version__}


def write_compressed_tensors(
    artifact: Artifact, out: Path, strategy: str, key_scales: Tensor, value_scales: Tensor
) -> None:
    """Writes the checkpoint folder.

    Args:
        strategy: "tensor" or "attn_head".
        key_scales, value_scales: float32 [num_layers, 1] or [num_layers, num_kv_heads], by
            strategy.
    Raises:
        KvfoldError: compressed-tensors is missing, or the family can't be expressed.
    """
    config = kv_cache_config(strategy)
    shape = (1,) if strategy == "tensor" else (-1, 1, 1)
    scales = {
        f"{name}.{side}_scale": values[i].reshape(shape)
        for i, name in enumerate(attention_names(artifact))
        for side, values in (("k", key_scales), ("v", value_scales))
    }
    each = "layer" if strategy == "tensor" else "KV head"
    about = (
        f"Plain weights and a compressed-tensors `kv_cache_scheme`: a static fp8 scale for each {each}'s keys and "
        "values, made by kvfold. `vllm serve FOLDER` reads it."
    )
    write_engine_folder(artifact, out, scales, config, {}, about)
