"""The table of model families. A new family of this shape is one row here and one test
parameter."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from kvfold.errors import KvfoldError
from kvfold.exports.hybrids import attending_layers, readers
from kvfold.kernels.key_mean import RopePairs


@dataclass(frozen=True)
class Architecture:
    """Where a family keeps what kvfold reads and changes.

    Attributes:
        model_type: of config.json.
        layers: path from the causal LM to the list of decoder layers.
        attention: attribute of the attention module in a decoder layer.
        last_norm: attribute of the norm before the head, in the base model.
        qk_norm: queries and keys are normalised, so a scale belongs into those norms. Their weights
            have one number a channel of a head, of each head, or of the whole projection; a config
            may leave them out.
        norms: what the attention module calls them.
        norm_after_rope: they come after RoPE.
        norm_plus: what a norm adds to its stored weight before it multiplies: 1 in Gemma's (1 + w).
        rotary: what the language model calls its rotary module, which it may be without.
        rope_by_type: the rotary module is asked by layer type, e.g. another base for sliding
            layers.
        rope_halves: its tables hold each angle once, not once for each channel of a pair.
        rope_repeats: its tables hold a pair's angle at two places beside each other, not half a
            table apart.
        rope_pairs: which channels RoPE turns together (kernels/key_mean.py).
        rope_axes: numbers that a position has, 3 where images have rows and columns; of a text they
            are equal.
        rope_if_sliding: where some layers slide, only those have RoPE.
        sliding: layers that attend in a window of config.sliding_window tokens: "none", "all", or
            those that "layer_types" names; "chunks": those that it names attend within chunks of
            config.attention_chunk_size tokens, counted from each sequence's first.
        sink_logits: a learned logit of each head joins the denominator of its softmax.
        logit_factor, logit_divisor: fields of the config by which the head's logits are multiplied
            or divided.
        tower: attribute of the base model that holds the language model, where it has other towers;
            else "".
        hybrid: config.layer_types says which layers attend and which keep a state of fixed size,
            a recurrent one or a convolution's (exports/hybrids.py).
        continues: of a hybrid family: a call of several tokens goes on from the states that are
            there. The code of others starts them anew, without a word.
        by_layer: heads are of several shapes, which config.per_layer_config says.
        value_norm: values are normalised behind their projection, which only an orthogonal basis
            goes through; where they come of the keys' projection, none does.
        gives_tuples: a decoder layer gives its hidden states as the first of a tuple.
        gate: the projection whose outputs multiply those of attention, channel by channel, before
            o_proj: "q_proj", whose heads have their gate behind their query, or one of its own; ""
            for none.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    last_norm: str = "norm"
    qk_norm: bool = False
    norms: tuple[str, str] = ("q_norm", "k_norm")
    norm_after_rope: bool = False
    norm_plus: float = 0.0
    rotary: str = "rotary_emb"
    rope_by_type: bool = False
    rope_halves: bool = False
    rope_repeats: bool = False
    rope_pairs: RopePairs = "halves"
    rope_axes: int = 1
    rope_if_sliding: bool = False
    sliding: Literal["none", "all", "layer_types", "chunks"] = "none"
    sink_logits: bool = False
    logit_factor: str = ""
    logit_divisor: str = ""
    tower: str = ""
    hybrid: bool = False
    continues: bool = True
    by_layer: bool = False
    value_norm: bool = False
    gives_tuples: bool = False
    gate: Literal["", "q_proj", "gate_proj", "g_proj"] = ""

    def language_model(self, model: Any) -> Any:
        """What turns tokens into the hidden states that the head reads."""
        base = model.base_model
        if self.tower:
            return getattr(base, self.tower)
        return base.model if base is model else base  # a family may misname its own

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def attention_modules(self, model: nn.Module) -> list[nn.Module]:
        """Those of the layers that attend, in order."""
        layers = self.decoder_layers(model)
        places = attending_layers(text_of(model.config), self.hybrid)
        return [layers[i].get_submodule(self.attention) for i in places]

    def reading_modules(self, model: nn.Module) -> list[list[nn.Module]]:
        """Of each layer that attends with keys and values of its own: its attention module, and
        those of later layers that read the same."""
        layers = self.decoder_layers(model)
        return [
            [layers[i].get_submodule(self.attention) for i in (place, *others)]
            for place, others in readers(text_of(model.config), self.hybrid).items()
        ]


_AFTER: dict[str, Any] = {"qk_norm": True, "norm_after_rope": True}
_HUNYUAN: dict[str, Any] = {**_AFTER, "norms": ("query_layernorm", "key_layernorm")}
_EXAONE: dict[str, Any] = {"qk_norm": True, "sliding": "layer_types", "rope_if_sliding": True}
_LAYERNORMS: dict[str, Any] = {"qk_norm": True, "norms": ("q_layernorm", "k_layernorm")}
_GRANITE_SWA: dict[str, Any] = {
    "sliding": "layer_types", "sink_logits": True, "logit_divisor": "logits_scaling",
}  # fmt: skip
_GEMMA4: dict[str, Any] = {
    "qk_norm": True, "rope_by_type": True, "sliding": "layer_types", "by_layer": True, "value_norm": True,
}  # fmt: skip
_LFM: dict[str, Any] = {"hybrid": True, "last_norm": "embedding_norm", **_LAYERNORMS}
_HYBRID_QWEN: dict[str, Any] = {
    "hybrid": True, "qk_norm": True, "norm_plus": 1.0, "gate": "q_proj",
}  # fmt: skip
_COHERE: dict[str, Any] = {
    "rope_pairs": "adjacent",
    "rope_repeats": True,
    "logit_factor": "logit_scale",
}

ARCHITECTURES = {
    row.model_type: row
    for row in (
        Architecture("llama"),
        Architecture("mistral", sliding="all"),
        Architecture("qwen2", sliding="layer_types"),
        Architecture("qwen3", qk_norm=True, sliding="layer_types"),
        Architecture("gemma2", norm_plus=1.0, sliding="layer_types"),  # soft-capped logits
        Architecture(
            "gemma3_text", qk_norm=True, norm_plus=1.0, rope_by_type=True, sliding="layer_types"
        ),
        Architecture("phi3", sliding="all"),  # one qkv_proj
        Architecture("gemma4_text", **_GEMMA4),
        Architecture("gemma4_unified_text", **_GEMMA4),
        Architecture("smollm3", sliding="layer_types"),  # layers without RoPE
        Architecture("gpt_oss", rope_halves=True, sliding="layer_types", sink_logits=True),
        Architecture("flint", sink_logits=True, **_EXAONE),
        # as those, with feed-forward layers or norms of their own
        Architecture("arcee"),
        Architecture("gemma", norm_plus=1.0),
        Architecture("jais2"),
        Architecture("internlm3"),
        Architecture("olmo"),
        Architecture("seed_oss"),
        Architecture("solar_open"),
        Architecture("cwm", sliding="layer_types"),
        Architecture("ministral", sliding="layer_types"),
        Architecture("ministral3", sliding="all"),  # queries grow with the position
        Architecture("mixtral", sliding="all"),
        Architecture("phimoe", sliding="all"),
        Architecture("qwen2_moe", sliding="layer_types"),
        Architecture("starcoder2", sliding="all"),
        Architecture("vaultgemma", norm_plus=1.0, sliding="layer_types"),
        Architecture("nemotron", norm_plus=1.0),  # as the next four, turns a part of each head
        Architecture("stablelm", **_LAYERNORMS),
        Architecture(
            "phi", last_norm="final_layernorm", **_LAYERNORMS
        ),  # as the next two, a `dense` for an o_proj
        Architecture(
            "persimmon", last_norm="final_layernorm", **_LAYERNORMS
        ),  # as the next, one query_key_value
        Architecture(
            "gpt_neox",
            layers="gpt_neox.layers",
            attention="attention",
            last_norm="final_layer_norm",
        ),
        Architecture(  # attention in its own code (exports/falcon.py)
            "falcon",
            layers="transformer.h",
            attention="self_attention",
            last_norm="ln_f",
            gives_tuples=True,
        ),
        Architecture("minimax_m2", qk_norm=True),  # one norm for the whole projection, as OLMo has
        Architecture("olmo2", qk_norm=True),
        Architecture("olmo3", qk_norm=True, rope_by_type=True, sliding="layer_types"),
        Architecture("olmoe", qk_norm=True),
        Architecture("flex_olmo", qk_norm=True),
        Architecture("apertus", qk_norm=True),  # a norm for each head, as qwen3
        Architecture("dots1", qk_norm=True, sliding="layer_types"),
        Architecture("glm4_moe", qk_norm=True),
        Architecture("hy_v3", qk_norm=True),
        Architecture("mellum", qk_norm=True, rope_by_type=True, sliding="layer_types"),
        Architecture("qwen3_moe", qk_norm=True, sliding="all"),
        Architecture("exaone4", **_EXAONE),
        Architecture("exaone_moe", **_EXAONE),
        Architecture("kolibri1", **_EXAONE),
        Architecture("hunyuan_v1_dense", **_HUNYUAN),
        Architecture("hunyuan_v1_moe", **_HUNYUAN),
        Architecture("nanochat", **_AFTER, rope_pairs="swapped"),  # norms without weights
        Architecture(
            "qwen2_vl_text", sliding="layer_types", rope_axes=3
        ),  # of checkpoints with other towers
        Architecture("qwen2_5_vl_text", sliding="layer_types", rope_axes=3),
        Architecture("qwen3_vl_text", qk_norm=True, rope_axes=3),
        Architecture("qwen3_vl_moe_text", qk_norm=True, rope_axes=3),
        # RoPE turns channels 2i and 2i + 1
        Architecture(  # and not in each layer; queries of the others grow with the position
            "llama4_text",
            norms=("qk_norm", "qk_norm"),  # without weights
            rope_pairs="adjacent",
            sliding="chunks",
            **_AFTER,
        ),
        Architecture("glm", rope_pairs="adjacent"),
        Architecture("glm4", rope_pairs="adjacent"),
        Architecture("ernie4_5", rope_pairs="adjacent"),
        Architecture("ernie4_5_moe", rope_pairs="adjacent"),
        Architecture("helium", rope_pairs="adjacent"),
        Architecture("cohere", qk_norm=True, **_COHERE),
        Architecture("cohere2", sliding="layer_types", rope_if_sliding=True, **_COHERE),
        Architecture("cohere2_moe", sliding="layer_types", rope_if_sliding=True, **_COHERE),
        # logits times a number, or through one
        Architecture("granite", logit_divisor="logits_scaling"),
        Architecture("granitemoe", logit_divisor="logits_scaling"),
        Architecture("granitemoeshared", logit_divisor="logits_scaling"),
        Architecture("granite_swa", **_GRANITE_SWA),
        Architecture("granitemoe_swa", **_GRANITE_SWA),
        Architecture("hyperclovax", logit_factor="logits_scaling"),
        # layers that keep a state stand between those that attend, or beside them
        Architecture("qwen3_next", **_HYBRID_QWEN),
        Architecture("qwen3_5_text", **_HYBRID_QWEN),
        Architecture("qwen3_5_moe_text", **_HYBRID_QWEN),
        Architecture("granitemoehybrid", hybrid=True, logit_divisor="logits_scaling"),
        Architecture("nemotron_h", hybrid=True, attention="mixer", last_norm="norm_f"),
        Architecture(
            "falcon_h1",
            hybrid=True,
            last_norm="final_layernorm",
            gives_tuples=True,
            logit_factor="lm_head_multiplier",
        ),
        Architecture("lfm2", **_LFM),
        Architecture("lfm2_moe", rotary="pos_emb", **_LFM),
        Architecture(  # a gate of a whole head, as laguna may have: any basis goes through
            "lfm3",
            hybrid=True,
            qk_norm=True,
            last_norm="embedding_norm",
            rope_by_type=True,
            sliding="layer_types",
        ),
        Architecture("jamba", hybrid=True, continues=False, last_norm="final_layernorm"),
        Architecture("bamba", hybrid=True, last_norm="final_layernorm", gives_tuples=True),
        Architecture("olmo_hybrid", hybrid=True, qk_norm=True),
        # a gate behind attention
        Architecture(
            "afmoe", qk_norm=True, sliding="layer_types", rope_if_sliding=True, gate="gate_proj"
        ),
        Architecture(
            "laguna", qk_norm=True, sliding="layer_types", rope_by_type=True, gate="g_proj"
        ),
    )
}


# checkpoints of several towers, whose language model is of a family of the table: what the base
# model calls it
TOWERS = {
    "gemma4_unified": "language_model",
    **dict.fromkeys(
        ("gemma3", "gemma4", "mistral3", "llava", "llava_next", "internvl"), "language_model"
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), "language_model"),
    **dict.fromkeys(("idefics3", "smolvlm"), "text_model"),
}
# checkpoints of several towers that transformers reads as their language model alone, which is what
# is compressed then
TEXT_ALONE = {"llama4", "qwen3_5", "qwen3_5_moe"}
# whose tokens of an image attend to each other, also to later ones; smaller models of gemma4 don't
BOTH_WAYS = {"gemma3", "gemma4", "gemma4_unified"}


def text_of(config: Any) -> Any:
    """The part of a config that the language model is made from: the config itself where it has no
    other.

    Raises:
        KvfoldError: that part is none.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not hasattr(text, "model_type"):
        raise KvfoldError(
            f"config.json has the text_config {text!r:.80}, which describes no model; give the "
            "checkpoint's own config.json."
        )
    return text
