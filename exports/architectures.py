"""What kvfold asks of a model's config: its family, which layers have keys and values, of how many
heads and channels, and what its head does. The table of families is families.py."""

from dataclasses import replace
from typing import Any

from kvfold.errors import KvfoldError
from kvfold.exports.families import (
    ARCHITECTURES,
    BOTH_WAYS,
    TEXT_ALONE,
    TOWERS,
    Architecture,
    text_of,
)
from kvfold.exports.hybrids import Hybrid, attending_layers, readers, state_layers
from kvfold.exports.refused import ALIBI, BOTH, FIELDS, REFUSED

__all__ = [
    "ARCHITECTURES", "BOTH_WAYS", "TEXT_ALONE", "TOWERS", "Architecture", "architecture_of", "attention_layers_of",
    "head_dim_of", "heads_of", "hybrid_of", "is_chunked", "keeps_states", "last_norm_of", "logits_of",
    "looks_both_ways", "num_kv_heads_of", "readers_of", "rotary_dim_of", "row_of", "shared_layers_of",
    "sliding_windows_of", "text_of",
]  # fmt: skip


BY_LAYER = {"head_dim", "num_key_value_heads"}  # what layers may differ in


def row_of(config: Any) -> Architecture:
    """The table row of a config's language model; the family must be supported."""
    return ARCHITECTURES[text_of(config).model_type]


def architecture_of(config: Any) -> Architecture:
    """The table row for a transformers config.

    Raises:
        KvfoldError: the family isn't in the table, or its heads can't be packed.
    """
    name = getattr(config, "model_type", None)
    known = ", ".join(sorted({*ARCHITECTURES, *TOWERS, *TEXT_ALONE}))
    if name in TEXT_ALONE and text_of(config) is not config:
        return architecture_of(text_of(config))
    if name in TOWERS and text_of(config) is not config:
        row, tower = architecture_of(text_of(config)), TOWERS[name]
        return replace(row, model_type=name, tower=tower, layers=f"model.{tower}.layers")
    reason = ALIBI if getattr(config, "alibi", None) else REFUSED.get(str(name))
    for field, why in FIELDS.items():
        stated = getattr(config, field, None)
        # images alone look both ways: the gate refuses those
        if reason is None and stated and (field, stated) != (BOTH, "vision"):
            reason = why
    if reason is not None:
        raise KvfoldError(
            f"Model family '{name}' is not supported: {reason}; supported families are {known}."
        )
    if name not in ARCHITECTURES:
        raise KvfoldError(
            f"Model family '{name}' is not in the table of architectures; supported families are {known}."
        )
    for dim in _head_dims(config, ARCHITECTURES[name]):
        if dim % 8:
            raise KvfoldError(
                f"head_dim {dim} of this '{name}' model is not a multiple of 8, so no head can be packed."
            )
    each = getattr(config, "num_attention_heads_per_layer", None) or ()
    if set(each) - {getattr(config, "num_attention_heads", None)}:
        raise KvfoldError(
            f"The layers of this '{name}' model have query heads of several numbers (num_attention_heads_per_layer), "
            "but an artifact states one; give a model whose layers are alike."
        )
    row = ARCHITECTURES[name]
    whole = getattr(config, "gating", None) in (True, "per-head")
    return replace(row, gate="") if whole else row  # a gate of a whole head lets any basis through


def _head_dims(config: Any, row: Architecture) -> list[int]:
    """Channels that heads of any layer have.

    Raises:
        KvfoldError: layers differ and the family's code is not known to have such, or what the
            config says of them makes no model.
    """
    if not row.by_layer and getattr(config, "is_heterogeneous", False):
        raise KvfoldError(
            f"The layers of this '{row.model_type}' model differ (per_layer_config), which kvfold does not know of "
            "that family; give a model whose layers are alike."
        )
    if not row.by_layer:
        return [head_dim_of(config)]
    if not (hasattr(type(config), "kv_sharing_modes") and hasattr(config, "per_layer_config")):
        import transformers

        raise KvfoldError(
            f"transformers {transformers.__version__} does not say which layers of a '{row.model_type}' model share "
            "keys and values; install a newer one, such as 5.23."
        )
    fields = config.to_dict().get("per_layer_config") or {}
    if other := sorted({name for of_layer in fields.values() for name in of_layer} - BY_LAYER):
        raise KvfoldError(
            f"The layers of this '{row.model_type}' model differ in {other[0]} (per_layer_config), but kvfold knows of "
            f"layers that differ in {' and '.join(sorted(BY_LAYER))}; give a model whose layers are alike in the rest."
        )
    try:
        readers(config, row.hybrid)
        heads = heads_of(config)
        bad = [x for x in heads if not all(isinstance(n, int) and n > 0 for n in x)]
        if bad or not heads:
            raise ValueError(f"a layer of {bad[0] if bad else 0} heads and channels")
    except Exception as error:  # fields of the right names that hold anything
        raise KvfoldError(
            f"config.json of this '{row.model_type}' model does not say what heads its layers have "
            f"({type(error).__name__}: {error}); give the checkpoint's own config.json."
        ) from None
    return sorted({dim for _, dim in heads})


def heads_of(config: Any) -> tuple[tuple[int, int], ...]:
    """(KV heads, channels of a head) of each layer that has keys and values."""
    text = text_of(config)
    places = attention_layers_of(text)
    if not row_of(text).by_layer:
        return ((num_kv_heads_of(text), head_dim_of(text)),) * len(places)
    layers = [text.per_layer_config[i] for i in places]
    return tuple((num_kv_heads_of(x), head_dim_of(x)) for x in layers)


def readers_of(config: Any) -> dict[int, tuple[int, ...]]:
    """Number of each layer that has keys and values → numbers of the later layers that read the
    same."""
    text = text_of(config)
    return readers(text, row_of(text).hybrid)


def shared_layers_of(config: Any) -> tuple[int, ...]:
    """Which of the layers that have keys and values, counted from 0, are read by later layers too."""
    return tuple(i for i, others in enumerate(readers_of(config).values()) if others)


def _alike(config: Any) -> Any:
    """The config itself.

    Raises:
        KvfoldError: it is of layers that differ in their heads.
    """
    if getattr(config, "is_heterogeneous", False):
        raise KvfoldError(
            f"Layers of this '{config.model_type}' model have heads of several shapes, but one is asked for; give a "
            "model whose layers are alike."
        )
    return config


def head_dim_of(config: Any) -> int:
    """Channels of one head, of a model whose layers are alike.

    Raises:
        KvfoldError: they are not.
    """
    config = _alike(text_of(config))
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotary_dim_of(config: Any) -> int:
    """Leading channels of a head that RoPE rotates; the others carry no position."""
    config = text_of(config)
    rope = getattr(config, "rope_parameters", None) or {}
    factor = (
        rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    )
    return int(head_dim_of(config) * factor)


def attention_layers_of(config: Any) -> tuple[int, ...]:
    """Which of the model's layers attend with keys and values of their own, in order."""
    config = text_of(config)
    return attending_layers(config, ARCHITECTURES[config.model_type].hybrid)


def hybrid_of(config: Any) -> Hybrid | None:
    """Which layers of a hybrid model attend and which keep states; None where all attend and none
    keeps a state, as some models of hybrid families are."""
    config = text_of(config)
    row = ARCHITECTURES[config.model_type]
    if not row.hybrid:
        return None
    found = Hybrid(attending_layers(config, True), state_layers(config), row.continues)
    plain = len(found.attending) == config.num_hidden_layers and not found.states
    return None if plain else found


def keeps_states(config: Any) -> bool:
    """Whether some layers of a model keep states."""
    hybrid = hybrid_of(config)
    return hybrid is not None and bool(hybrid.states)


def sliding_windows_of(config: Any) -> tuple[int, ...]:
    """For each layer that attends the tokens that a query sees at the most, itself included, 0 for
    all; empty if no layer slides. Of a layer that attends in chunks a chunk's length."""
    config = text_of(config)
    rule = ARCHITECTURES[config.model_type].sliding
    named = "chunked_attention" if rule == "chunks" else "sliding_attention"
    field = "attention_chunk_size" if rule == "chunks" else "sliding_window"
    window = getattr(config, field, None) or 0
    if getattr(config, "use_sliding_window", True) is False:
        window = 0
    count = config.num_hidden_layers
    types = (
        config.layer_types
        if rule in ("layer_types", "chunks")
        else ["sliding_attention" if rule == "all" else ""] * count
    )
    windows = tuple(window if types[i] == named else 0 for i in attention_layers_of(config))
    return windows if any(windows) else ()


def is_chunked(config: Any) -> bool:
    """Whether what a layer sees at the most are the tokens of a chunk, and not the latest ones."""
    return row_of(config).sliding == "chunks" and bool(sliding_windows_of(config))


def looks_both_ways(config: Any) -> bool:
    """Whether tokens of an image attend to each other, also to later ones."""
    if config.model_type not in BOTH_WAYS:
        return False
    return config.model_type == "gemma3" or getattr(text_of(config), BOTH, None) == "vision"


def last_norm_of(model: Any) -> Any:
    """A causal LM's norm before its head."""
    row = replace(row_of(model.config), tower=TOWERS.get(model.config.model_type, ""))
    return getattr(row.language_model(model), row.last_norm)


def logits_of(model: Any, hidden: Any) -> Any:
    """A causal LM's logits, float32 [..., vocabulary], of its last hidden states after the norm:
    with the factor or the soft-cap that its family has."""
    logits = model.lm_head(hidden).float()
    row, config = row_of(model.config), text_of(model.config)
    if row.logit_factor:
        logits = logits * getattr(config, row.logit_factor)
    if row.logit_divisor:
        logits = logits / getattr(config, row.logit_divisor)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap


def num_kv_heads_of(config: Any) -> int:
    """Heads that keys and values have, of a model whose layers are alike; as many as queries have
    without grouping.

    Raises:
        KvfoldError: they are not.
    """
    config = _alike(text_of(config))
    if config.model_type == "falcon":  # whose num_kv_heads counts in the new architecture alone
        if config.new_decoder_architecture:
            return config.num_kv_heads
        return 1 if config.multi_query else config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
