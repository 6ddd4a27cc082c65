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
BOTH = "use_bidirectional_attention"
_ALTUP = (
    "its layers pass on several streams of hidden states at once (AltUp), which no search that runs them one by one "
    "follows"
)
_TIED = (
    "several of its layers share one attention module and differ in their keys and values, so no basis of values fits "
    "them all"
)
_OWN_STATES = "its layers keep their states in themselves and not in a cache, so that one text would go on in another's"
_INDEXED = "its layers keep an index beside keys and values, by which each query chooses what it attends to"
_DELAYED = "half of its values are those of the token before, projected by weights of their own"
_BIASED = "its attention adds learned biases to logits (position_bias)"
_OWN_CACHE = "its code takes no cache but one of its own (MiniMaxCache)"
_RECURRENT = "it keeps a recurrent state and no keys and values, so there is no cache to pack"
_SUB_NORM = (
    "a norm stands between its attention and o_proj, which no basis of values can be folded through"
)
_OWN_CODE = "it computes attention inside its own code, where no packed cache can be read"
_LEARNED = "its attention has other projections than q_proj, k_proj, v_proj and o_proj, and learned positions"
_VALUE_DIM = "its values have another head_dim than its keys"
_MASKED = "it computes its mask from the values, inside its own code"
_DIFFERENTIAL = (
    "it takes the difference of two attentions of a head and normalises it before o_proj"
)

REFUSED = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "kimi_k2", "minicpm3", "longcat_flash",
         "glm4_moe_lite", "glm_moe_dsa", "youtu", "axk1", "axk2", "hy_v4", "dots3_note_text",
         "kimi_linear", "bailing_hybrid"), _MLA),
    **dict.fromkeys(("bloom", "mpt", "baichuan"), ALIBI),
    "mllama": _MULTIMODAL,
    **dict.fromkeys(("gemma3n", "gemma3n_text"), _ALTUP),
    **dict.fromkeys(("zamba", "zamba2"), _TIED),
    "recurrent_gemma": _OWN_STATES,
    "zaya": _DELAYED,
    "inkling_text": _BIASED,
    "qwen4_exp_text": _INDEXED,
    "minimax": _OWN_CACHE,
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"), _RECURRENT),
    "bitnet": _SUB_NORM,
    "diffllama": _DIFFERENTIAL,
    "doge": _MASKED,
    **dict.fromkeys(("gpt_neox_japanese", "gptj", "codegen"), _OWN_CODE),
    "dbrx": _CLIPPED,
    **dict.fromkeys(("gpt2", "gpt-sw3", "gpt_bigcode", "gpt_neo", "opt", "biogpt", "xglm"), _LEARNED),
    "mimo_v2_flash": _VALUE_DIM,
}  # fmt: skip

# what a config may say of a model of any family
FIELDS = {
    "kv_lora_rank": _MLA,
    "vision_config": _MULTIMODAL,
    BOTH: _BOTH_WAYS,
    "clip_qkv": _CLIPPED,
}
