"""The table of model families. A new family of this shape is one row here and one test parameter."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from kvfold.errors import KvfoldError


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps what kvfold reads and changes.

    Attributes:
        model_type: of config.json.
        layers: path from the causal LM to the list of decoder layers.
        attention: attribute of the attention module in a decoder layer.
        qk_norm: queries and keys are normalised per head (q_norm, k_norm) before RoPE, so a scale belongs there.
        norm_plus: what a norm adds to its stored weight before it multiplies: 1 in Gemma's (1 + w).
        rope_by_type: the rotary module is asked by layer type, e.g. another base for sliding layers.
        rope_halves: its tables hold each angle once, not once for each channel of a pair.
        sliding: layers that attend in a window of config.sliding_window tokens: "none", "all", or those that
            "layer_types" names.
        sink_logits: a learned logit of each head joins the denominator of its softmax.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    qk_norm: bool = False
    norm_plus: float = 0.0
    rope_by_type: bool = False
    rope_halves: bool = False
    sliding: Literal["none", "all", "layer_types"] = "none"
    sink_logits: bool = False

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def attention_modules(self, model: nn.Module) -> list[nn.Module]:
        return [layer.get_submodule(self.attention) for layer in self.decoder_layers(model)]


ARCHITECTURES = {
    row.model_type: row
    for row in (
        Architecture("llama"),
        Architecture("mistral", sliding="all"),
        Architecture("qwen2", sliding="layer_types"),
        Architecture("qwen3", qk_norm=True, sliding="layer_types"),
        Architecture("gemma2", norm_plus=1.0, sliding="layer_types"),  # soft-capped logits
        Architecture("gemma3_text", qk_norm=True, norm_plus=1.0, rope_by_type=True, sliding="layer_types"),
        Architecture("phi3", sliding="all"),  # one qkv_proj
        Architecture("smollm3", sliding="layer_types"),  # layers without RoPE
        Architecture("gpt_oss", rope_halves=True, sliding="layer_types", sink_logits=True),
    )
}

_MLA = "its attention caches MLA latents, not keys and values per head"
_ALIBI = "its attention adds ALiBi biases inside its own code"
_MULTIMODAL = (
    "it is multi-modal; give its text model (for Gemma 3 one of model_type gemma3_text) as a checkpoint of its own"
)
_SHARED = "its layers normalise values and share them with later layers, so no basis of values can be folded in"
_BOTH_WAYS = "it attends to later tokens (use_bidirectional_attention), which a cache does not hold"
REFUSED = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "minicpm3", "longcat_flash"), _MLA),
    **dict.fromkeys(("bloom", "mpt", "falcon", "baichuan"), _ALIBI),
    **dict.fromkeys(("gemma3", "mllama", "llama4", "qwen2_vl", "qwen2_5_vl"), _MULTIMODAL),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), _SHARED),
}


def architecture_of(config: Any) -> Architecture:
    """The table row for a transformers config.

    Raises:
        KvfoldError: the family isn't in the table, or its heads can't be packed.
    """
    name = getattr(config, "model_type", None)
    known = ", ".join(sorted(ARCHITECTURES))
    if name in REFUSED or getattr(config, "kv_lora_rank", None):
        reason = REFUSED.get(str(name), _MLA)
        raise KvfoldError(f"Model family '{name}' is not supported: {reason}; supported families are {known}.")
    for field, reason in (
        ("alibi", _ALIBI),
        ("vision_config", _MULTIMODAL),
        ("use_bidirectional_attention", _BOTH_WAYS),
    ):
        if getattr(config, field, None):
            raise KvfoldError(f"Model family '{name}' is not supported: {reason}; supported families are {known}.")
    if name not in ARCHITECTURES:
        raise KvfoldError(
            f"Model family '{name}' is not in the table of architectures; supported families are {known}."
        )
    if head_dim_of(config) % 8:
        raise KvfoldError(
            f"head_dim {head_dim_of(config)} of this '{name}' model is not a multiple of 8, so no head can be packed."
        )
    return ARCHITECTURES[name]


def head_dim_of(config: Any) -> int:
    """Channels of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotary_dim_of(config: Any) -> int:
    """Leading channels of a head that RoPE rotates; the others carry no position."""
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(head_dim_of(config) * factor)


def sliding_windows_of(config: Any) -> tuple[int, ...]:
    """For each layer the tokens that a query sees at the most, itself included, 0 for all; empty if no layer slides."""
    window = getattr(config, "sliding_window", None) or 0
    if getattr(config, "use_sliding_window", True) is False:
        window = 0
    rule = ARCHITECTURES[config.model_type].sliding
    count = config.num_hidden_layers
    types = config.layer_types if rule == "layer_types" else ["sliding_attention" if rule == "all" else ""] * count
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in types)
    return windows if any(windows) else ()


def logits_of(model: Any, hidden: Any) -> Any:
    """A causal LM's logits, float32 [..., vocabulary], of its last hidden states after the norm, soft-cap included."""
    logits = model.lm_head(hidden).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap


def num_kv_heads_of(config: Any) -> int:
    """Heads that keys and values have; as many as queries have without grouping."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
