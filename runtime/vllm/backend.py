"""The attention backend by which vLLM's layers read an artifact's caches, and the pseudo-layer that
holds the 16-bit one."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from kvfold.errors import KvfoldError
from kvfold.runtime.backends.base import LogitOptions
from kvfold.runtime.vllm.layer import ServedLayer
from kvfold.runtime.vllm.specs import packed_spec, raw_spec
from kvfold.runtime.vllm.torch_attention import Batch, Blocks, attend_step

RAW = ".kv_raw"  # behind a layer's name, that of its 16-bit cache


@dataclass
class StepMetadata(AttentionMetadata):
    """One group's part of a step.

    Attributes:
        starts, lengths: as in torch_attention.Batch.
        block_table: int32 [requests, entries].
        slot_mapping: int64 [tokens or more], of this group's blocks.
    """

    starts: list[int]
    lengths: list[int]
    block_table: Tensor
    slot_mapping: Tensor


class StepMetadataBuilder(AttentionMetadataBuilder):
    """Of both caches. Lengths come to the host, so a step with this backend is in no CUDA graph."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StepMetadata:
        """Raises KvfoldError where queries see tokens behind them."""
        common: Any = common_attn_metadata
        if common.causal is not True:
            raise KvfoldError(
                "This step's attention is not causal, but a packed cache is read causally alone; "
                "serve the model for text generation."
            )
        table = common.block_table_tensor
        # layers of several formats have a builder each: a group's step is built once
        step = getattr(common, "kvfold_step", None)
        if step is None or step.block_table is not table:
            starts, lengths = common.query_start_loc.tolist(), common.seq_lens.tolist()
            step = common.kvfold_step = StepMetadata(starts, lengths, table, common.slot_mapping)
        return step


class PackedBackend(AttentionBackend):
    """Of a layer's pages."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """vLLM's own name for a backend that it does not know."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any: blocks are never split."""
        return [MultipleOf(1)]

    @staticmethod
    def get_impl_cls() -> type["PackedImpl"]:
        """What computes."""
        return PackedImpl

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        """What a step is described by."""
        return StepMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """All layers of a block side by side, the only one where each has its own bytes."""
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """By a mask."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Sink logits."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Not tried."""
        return False


class RawBackend(PackedBackend):
    """Of a layer's 16-bit rows; nothing is computed through it."""


class RawCache(nn.Module, AttentionLayerBase):
    """The 16-bit rows of a layer: to vLLM one more layer, which gets blocks of its own."""

    def __init__(self, layer: ServedLayer, drafts: int) -> None:
        super().__init__()
        self.spec = raw_spec(layer, drafts)
        self.kv_cache = torch.tensor([])  # vLLM puts its own here

    def get_attn_backend(self) -> type[AttentionBackend]:
        """RawBackend."""
        return RawBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """A RawSpec."""
        return self.spec


class PackedImpl(AttentionImpl):
    """The attention of one layer; arguments are vLLM's.

    Raises:
        KvfoldError: the model asks for what is not computed.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self.softcap, self.sinks, self.sliding = logits_soft_cap or None, sinks, sliding_window or 0
        others |= {"alibi_slopes": alibi_slopes, "kv_sharing": kv_sharing_target_layer_name}
        others |= {"attn_type": None if attn_type == AttentionType.DECODER else attn_type}
        if asked := sorted(name for name, value in others.items() if value is not None):
            raise KvfoldError(
                f"This model's attention asks for {asked[0]}, which is not computed over a packed "
                "cache; generate with kvfold's own runtime."
            )
        self.layer: ServedLayer | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: StepMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Stores and attends: query [tokens, num_heads, head_dim], key and value of KV heads, output
        as query."""
        assert self.layer is not None
        self.layer.to(query.device)
        if attn_metadata is None:  # memory is being measured
            return output.zero_()
        context, name = get_forward_context(), layer.layer_name + RAW
        raw: Any = context.no_compile_layers[name]
        step, rows = attn_metadata, context.attn_metadata[name]
        tokens = step.starts[-1]
        packed = kv_cache.flatten(1).view(torch.uint8)
        attend_step(
            self.layer,
            Blocks(packed, raw.kv_cache),
            Batch(
                step.starts,
                step.lengths,
                step.block_table,
                rows.block_table,
                rows.slot_mapping[:tokens].long(),
            ),
            query[:tokens],
            key[:tokens],
            value[:tokens],
            self.scale,
            LogitOptions(self.softcap, self.sinks, self.sliding),
            output[:tokens],
        )
        return output


def serve(attention: Any, layer: ServedLayer, contexts: dict[str, Any], drafts: int) -> None:
    """Gives an attention layer of vLLM's, made with PackedBackend, an artifact's layer.

    Args:
        contexts: vLLM's layers by name; that of the 16-bit rows is added.
        drafts: tokens that a step may draft.
    Raises:
        KvfoldError: the layer that vLLM has made is not the artifact's.
    """
    geometry, impl = layer.geometry, attention.impl
    made = (attention.num_kv_heads, attention.head_size, attention.head_size_v, impl.sliding)
    sliding = geometry.sliding_of(layer.index)
    known = (geometry.num_kv_heads, geometry.head_dim, geometry.head_dim, sliding)
    if made != known:
        raise KvfoldError(
            f"vLLM's layer '{attention.layer_name}' has KV heads, head sizes and sliding window {made}, but "
            f"the artifact {known}; leave out what changes the model's configuration."
        )
    impl.layer = layer
    raw = RawCache(layer, drafts)
    contexts[attention.layer_name + RAW] = raw
    # plain attributes: as a submodule it would be among the weights
    spec = packed_spec(layer)
    object.__setattr__(attention, "kv_raw", raw)
    object.__setattr__(attention, "get_kv_cache_spec", lambda vllm_config: spec)
