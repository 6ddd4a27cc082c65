"""Falcon's attention computes inside its own code, where no packed cache can be read: here is a
subclass that goes by transformers' attention interface, as other families do.

Falcon's own also repeats keys and values for each query head before the cache gets them; here they
stay one a KV head, as they are projected.
"""

from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.falcon.modeling_falcon import (
    FALCON_ATTENTION_CLASSES,
    FalconAttention,
    apply_rotary_pos_emb,
)


class InterfaceFalconAttention(FalconAttention):
    """Falcon's attention with RoPE, by the function that its config names."""

    @property
    def num_key_value_groups(self) -> int:
        """Query heads of a KV head, which attention functions ask for."""
        return self.num_heads // self.num_kv_heads  # type: ignore[operator]

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [B, T, hidden_size] → ([B, T, hidden_size], weights or None)."""
        assert alibi is None and position_embeddings is not None  # ALiBi is refused by its config
        joint = self.query_key_value(hidden_states)  # of each KV head: its queries, key and value
        heads = joint.unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
        parts = heads[..., :-2, :], heads[..., -2:-1, :], heads[..., -1:, :]
        query, key, value = (x.flatten(2, 3).transpose(1, 2) for x in parts)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)  # type: ignore[arg-type]
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.inv_norm_factor)
        return self.dense(out.flatten(2)), weights


def build_with(name: str) -> None:
    """Makes models that are built for the attention function `name` have these modules."""
    FALCON_ATTENTION_CLASSES[name] = InterfaceFalconAttention


def set_attention(model: Any, name: str) -> None:
    """What `set_attn_implementation` does for other families: `name` is an attention function of
    transformers' interface, or one that Falcon's own code computes."""
    own = name in ("eager", "sdpa")
    for module in model.modules():
        if isinstance(module, FalconAttention):  # the same weights and attributes
            module.__class__ = FalconAttention if own else InterfaceFalconAttention
    model.config._attn_implementation_internal = name
