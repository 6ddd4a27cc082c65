"""One tiny configuration for each family beyond the nine of conftest.py: two layers, and what the
family has of its own small enough that a short text meets it."""

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = "linear_attention"
FIELDS: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
    # all experts are asked: a choice between two that are alike would amplify rounding
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "num_experts_per_tok": 2, "moe_topk": 2,
    "moe_k": 2, "moe_num_experts": 2, "n_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_layer_start_index": 1,
}  # fmt: skip
TWO = {"sliding_window": 40, "layer_types": [SLIDING, FULL]}


def _rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **fields}}


BY_TYPE = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": t} for kind, t in ((FULL, 1e5), (SLIDING, 1e3))
    }
}
SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
GRANITE = {"logits_scaling": 4.0, "attention_multiplier": 0.3}
HALF = _rope(partial_rotary_factor=0.5)
NO_WINDOW = {"sliding_window": None}
# hybrid models: the layers that attend are not the first ones, nor beside each other
FOUR = {"num_hidden_layers": 4, "layer_types": [LINEAR, FULL, LINEAR, FULL]}
DELTA = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
QWEN = {**FOUR, **DELTA, **_rope(partial_rotary_factor=0.25)}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
LFM = {"num_hidden_layers": 4, "layer_types": ["conv", FULL, "conv", FULL]}
GEMMA4 = {  # heads of two shapes
    **BY_TYPE, "num_hidden_layers": 6, "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL, FULL],
    "sliding_window": 40, "global_head_dim": 32, "final_logit_softcapping": 5.0, "pad_token_id": 0,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "afmoe": {**TWO, "num_dense_layers": 1},
    "apertus": _rope(),
    "arcee": _rope(),
    "bamba": {**MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [1, 3], **_rope(partial_rotary_factor=0.5)},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {**TWO, "logit_scale": 0.25},
    "cohere2_moe": {**TWO, **SPARSE, "logit_scale": 0.25},
    "cwm": {**TWO, **_rope(), "bos_token_id": 1, "eos_token_id": 2},
    "dots1": TWO,
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": TWO,
    "exaone_moe": {**TWO, **SPARSE},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "falcon_h1": {
        **MAMBA, "mamba_d_ssm": 128, "key_multiplier": 0.7, "lm_head_multiplier": 0.5, "ssm_out_multiplier": 0.6,
    },
    "flex_olmo": {},
    "flint": TWO,
    "gemma": {},
    # the last two layers read the keys and values of one before them
    "gemma4_text": {
        **GEMMA4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128,
        "use_double_wide_mlp": True,
    },
    "gemma4_unified_text": {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "glm": HALF,
    "glm4": HALF,
    "glm4_moe": {**HALF, "use_qk_norm": True},
    "gpt_neox": {**_rope(partial_rotary_factor=0.5), "attention_bias": True},
    "granite": GRANITE,
    "granite_swa": {**GRANITE, **TWO},
    "granitemoe": GRANITE,
    "granitemoe_swa": {**GRANITE, **TWO},
    "granitemoehybrid": {**MAMBA, **FOUR, **GRANITE, "position_embedding_type": "rope"},
    "granitemoeshared": GRANITE,
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": SPARSE,
    "hyperclovax": {"logits_scaling": 0.25, "attention_multiplier": 0.3},
    "internlm3": {},
    "jais2": {},
    "jamba": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8,
        "expert_layer_offset": 1,
    },
    "kolibri1": TWO,
    "laguna": {**TWO, **BY_TYPE, **SPARSE, "gating": "per-element"},
    "lfm2": LFM,
    "lfm2_moe": {**LFM, "num_dense_layers": 2},
    "lfm3": {
        **BY_TYPE, "num_hidden_layers": 4, "layer_types": ["conv", FULL, "conv", SLIDING], "sliding_window": 40,
        "use_attention_gate": True,
    },
    "llama4_text": {
        "num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1], "attention_chunk_size": 40,
        "interleave_moe_layer_step": 2, "intermediate_size_mlp": 96,
    },
    "mellum": {**TWO, **BY_TYPE, **SPARSE},
    "minimax_m2": HALF,
    "ministral": TWO,
    "ministral3": {},
    "mixtral": NO_WINDOW,
    "nanochat": {"final_logit_softcapping": 5.0},
    "nemotron": HALF,
    "nemotron_h": {
        "layer_types": [LINEAR, FULL, "mlp", LINEAR, "moe", FULL], "ssm_state_size": 8, "mamba_num_heads": 4,
        "mamba_head_dim": 32, "n_groups": 1, "chunk_size": 16,
    },
    "olmo": {},
    "olmo2": {},
    "olmo_hybrid": {**FOUR, **DELTA, **_rope()},
    "olmo3": {**TWO, **BY_TYPE},
    "olmoe": {},
    "persimmon": HALF,
    "phi": {**HALF, "qk_layernorm": True},
    "phimoe": NO_WINDOW,
    "qwen2_moe": {},
    "qwen3_5_moe_text": QWEN,
    "qwen3_5_text": QWEN,
    "qwen3_moe": {},
    "qwen3_next": QWEN,
    "seed_oss": {},
    "solar_open": {},
    "stablelm": {**_rope(partial_rotary_factor=0.25), "use_qkv_bias": True},
    "starcoder2": {**NO_WINDOW, "use_bias": True},
    "vaultgemma": {
        **TWO, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0,
    },
}  # fmt: skip


SECTIONS = _rope(mrope_section=[2, 3, 3])
# checkpoints of several towers: the language model's family, fields, and the tokens of an image of
# 28 × 28
TOWERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "gemma3": ("gemma3_text", {**TWO, **BY_TYPE, "mm_tokens_per_image": 4}, 4),
    "gemma4": ("gemma4_text", {}, 4),
    "gemma4_unified": ("gemma4_unified_text", {}, 4),
    "idefics3": ("llama", {"scale_factor": 2}, 4),
    "internvl": ("qwen2", {}, 4),
    "llava": ("llama", {}, 16),
    "llava_next": ("mistral", NO_WINDOW, 16),
    "mistral3": ("mistral", NO_WINDOW, 4),
    "qwen2_5_vl": ("qwen2_5_vl_text", SECTIONS, 4),
    "qwen2_vl": ("qwen2_vl_text", SECTIONS, 4),
    "qwen3_vl": ("qwen3_vl_text", SECTIONS, 4),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", SECTIONS, 4),
    "smolvlm": ("llama", {"scale_factor": 2}, 4),
}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_channels": 3,
    "head_dim": 16, "image_size": 28, "patch_size": 7, "depth": 1, "num_heads": 2, "embed_dim": 32,
    "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0], "window_size": 28, "num_position_embeddings": 16,
    "out_hidden_size": 64, "num_key_value_heads": 2, "pooling_kernel_size": 2, "position_embedding_size": 16,
}  # fmt: skip
IMAGE = 31  # a token that no text of the tests has


def _tower(family: str) -> Any:
    """A tiny config of images and text."""
    kind: Any = CONFIG_MAPPING[family]
    default, (text, fields, _) = kind(), TOWERS[family]
    tower = default.vision_config or CONFIG_MAPPING[f"{family}_vision"]()
    kinds, own = type(tower), {k: v for k, v in fields.items() if hasattr(default, k)}
    vision = {k: v for k, v in VISION.items() if hasattr(tower, k)}
    twice = {
        k for k in ("image_size", "patch_size") if isinstance(getattr(tower, k, 0), list | tuple)
    }
    vision = {k: [v, v] if k in twice else v for k, v in vision.items()}
    vision = {k: v for k, v in vision.items() if k not in getattr(kinds, "attribute_map", {})}
    language = config_of(text, **{k: v for k, v in fields.items() if k not in own})
    return kind(
        text_config=language.to_dict(), vision_config={**vision, "model_type": kinds.model_type},
        **{k: IMAGE for k in ("image_token_id", "image_token_index") if hasattr(default, k)}, **own,
    )  # fmt: skip


def config_of(family: str, **own: Any) -> Any:
    """A tiny config of a model_type, which need not be one that is supported; `own` fields replace
    what is there."""
    if family in TOWERS:
        return _tower(family)
    kind: Any = CONFIG_MAPPING[family]
    default, names = kind(), getattr(kind, "attribute_map", {})
    default.allow_global_per_layer_attribute_access = True  # of heads that layers differ in
    fields = {k: v for k, v in FIELDS.items() if hasattr(default, k) and k not in names}
    fields = {k: v for k, v in fields.items() if not isinstance(getattr(kind, k, None), property)}
    return kind(**{**fields, **OWN.get(family, {}), **own})
