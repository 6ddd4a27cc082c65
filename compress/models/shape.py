"""Whether the numbers in a config make a model at all, before one is built from them: a million
layers take minutes to be refused."""

from pathlib import Path
from typing import Any

from kvfold.errors import KvfoldError
from kvfold.exports.architectures import (
    ARCHITECTURES,
    attention_layers_of,
    heads_of,
    num_kv_heads_of,
)

MOST_LAYERS = 1000  # several times what any model has
MOST_HEADS = 10_000


def check_shape(config: Any, path: Path) -> None:
    """Refuses a config whose numbers of layers and heads make no model.

    Raises:
        KvfoldError: naming the number.
    """
    text = config.get_text_config()
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    row = ARCHITECTURES.get(text.model_type)
    if row is not None and row.by_layer:
        of_layers = {count for count, _ in heads_of(text)}
    else:
        stated = getattr(text, "num_key_value_heads", None)
        of_layers = {num_kv_heads_of(text) if stated is None else stated}
    for name, value, most in (
        ("num_hidden_layers", layers, MOST_LAYERS),
        ("num_attention_heads", heads, MOST_HEADS),
        *(("num_key_value_heads", count, MOST_HEADS) for count in of_layers),
    ):
        if not isinstance(value, int) or not 1 <= value <= most:
            raise KvfoldError(
                f"The config of '{path}' has {name} {value!r}, but there must be 1 to {most}; give the checkpoint's "
                "own config.json."
            )
    if row is not None and not attention_layers_of(text):
        raise KvfoldError(
            f"None of the {layers} layers that the config of '{path}' describes attends, so there is no cache to pack; "
            "give a model with attention layers."
        )
    for kv_heads in sorted(of_layers):
        if heads % kv_heads == 0:
            continue
        raise KvfoldError(
            f"The config of '{path}' has {heads} attention heads for {kv_heads} KV heads, which don't share them "
            "evenly; give the checkpoint's own config.json."
        )
