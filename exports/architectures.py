"""The table of model families. A new family of this shape is one row here and one test parameter."""

from dataclasses import dataclass
from typing import Any

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
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    qk_norm: bool = False

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
        Architecture("mistral"),
        Architecture("qwen2"),
        Architecture("qwen3", qk_norm=True),
    )
}

_MLA = "its attention caches MLA latents, not keys and values per head"
_ALIBI = "its attention adds ALiBi biases inside its own code"
REFUSED = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "minicpm3", "longcat_flash"), _MLA),
    **dict.fromkeys(("bloom", "mpt", "falcon", "baichuan"), _ALIBI),
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
    if getattr(config, "alibi", False):
        raise KvfoldError(f"Model family '{name}' is not supported: {_ALIBI}; supported families are {known}.")
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


def num_kv_heads_of(config: Any) -> int:
    """Heads that keys and values have; as many as queries have without grouping."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
