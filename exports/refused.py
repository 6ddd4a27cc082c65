"""Model families that are refused by name, and why: what their attention does that a packed cache
can't follow."""

_MLA = "its attention caches MLA latents, not keys and values per head"
ALIBI = "its attention adds ALiBi biases inside its own code"
_MULTIMODAL = (
    "it is multi-modal, of a kind whose language model is not known; give its text model as a "
    "checkpoint of its own"
)
_BOTH_WAYS = "it attends to later tokens (use_bidirectional_attention), which a cache does not hold"
_CLIPPED = "it clamps values to a range (clip_qkv), which no basis of values can be folded through"
_SHARED = "its layers normalise values and share them with later layers, so no basis of values can be folded in"
_VALUE_NORM = "it normalises values, and its layers have heads of several sizes, so no basis of values can be folded in"
_HYBRID = (
    "some of its layers keep a recurrent state, or a convolution's, in the place of keys and values"
)
_RECURRENT = "it keeps a recurrent state and no keys and values, so there is no cache to pack"
_SUB_NORM = (
    "a norm stands between its attention and o_proj, which no basis of values can be folded through"
)
_GATED = "it multiplies what was attended to by a gate before o_proj, which no basis of values can be folded through"
_OWN_CODE = "it computes attention inside its own code, where no packed cache can be read"
_LEARNED = "its attention has other projections than q_proj, k_proj, v_proj and o_proj, and learned positions"
_CHUNKED = "some of its layers attend in chunks, which the packed cache does not know"
_VALUE_DIM = "its values have another head_dim than its keys"
_MASKED = "it computes its mask from the values, inside its own code"
_DIFFERENTIAL = (
    "it takes the difference of two attentions of a head and normalises it before o_proj"
)

REFUSED = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "kimi_k2", "minicpm3", "longcat_flash",
         "glm4_moe_lite", "glm_moe_dsa", "youtu", "axk1", "axk2", "hy_v4", "dots3_note_text"), _MLA),
    **dict.fromkeys(("bloom", "mpt", "baichuan"), ALIBI),
    **dict.fromkeys(
        ("gemma4", "mllama", "llama4", "qwen3_vl_moe",
         "qwen3_5", "qwen3_5_moe"), _MULTIMODAL),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), _SHARED),
    "gemma4_text": _VALUE_NORM,
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "granitemoehybrid", "nemotron_h", "falcon_h1", "lfm2",
         "lfm2_moe", "jamba", "bamba", "zamba", "zamba2", "recurrent_gemma", "olmo_hybrid", "kimi_linear", "minimax",
         "bailing_hybrid", "lfm3", "zaya", "inkling_text", "qwen4_exp_text"), _HYBRID),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"), _RECURRENT),
    "bitnet": _SUB_NORM,
    "diffllama": _DIFFERENTIAL,
    **dict.fromkeys(("afmoe", "laguna"), _GATED),
    "doge": _MASKED,
    **dict.fromkeys(("falcon", "gpt_neox_japanese", "gptj", "codegen"), _OWN_CODE),
    "dbrx": _CLIPPED,
    **dict.fromkeys(("gpt2", "gpt-sw3", "gpt_bigcode", "gpt_neo", "opt", "biogpt", "xglm"), _LEARNED),
    "llama4_text": _CHUNKED,
    "mimo_v2_flash": _VALUE_DIM,
}  # fmt: skip

# what a config may say of a model of any family
FIELDS = {
    "kv_lora_rank": _MLA,
    "vision_config": _MULTIMODAL,
    "use_bidirectional_attention": _BOTH_WAYS,
    "clip_qkv": _CLIPPED,
}
