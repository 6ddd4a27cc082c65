"""The attention backend by which vLLM's layers read an artifact's caches, and the pseudo-layer that
holds the 16-bit one."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
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
from kvfold.runtime.vllm import torch_attention
from kvfold.runtime.vllm.batch import Chunk, DeviceBatch, divide
from kvfold.runtime.vllm.layer import ServedLayer
from kvfold.runtime.vllm.served_kernels import Served, wait
from kvfold.runtime.vllm.specs import packed_spec, raw_spec
from kvfold.runtime.vllm.torch_attention import Batch, Blocks

RAW = ".kv_raw"  # behind a layer's name, that of its 16-bit cache


@dataclass
class StepMetadata(AttentionMetadata):
    """One group's part of a step.

    Attributes:
        starts: int32 [requests + 1] on the host, first new token of each request among the step's,
            and their number at the end.
        lengths: int32 [requests] on the device, tokens of each request, new ones included.
        bounds: int32 [requests] on the host, the same, exact for requests with several new tokens;
            None where nobody has said it.
        most_new: new tokens of a request at the most.
        most_tokens: tokens of a request at the most.
        block_table: int32 [requests, entries].
        slot_mapping: int64 [tokens or more], of this group's blocks.
    """

    starts: Tensor
    lengths: Tensor
    bounds: Tensor | None
    most_new: int
    most_tokens: int
    block_table: Tensor
    slot_mapping: Tensor
    _batch: DeviceBatch | None = None

    @cached_property
    def host_starts(self) -> list[int]:
        """`starts` as numbers."""
        return self.starts.tolist()

    @cached_property
    def host_lengths(self) -> list[int]:
        """`lengths` as numbers; waits for a device."""
        return self.lengths.tolist()

    @cached_property
    def divided(self) -> tuple[int, list[int]]:
        """(requests with one new token that come first, numbers of the chunks behind them)."""
        return (len(self.lengths), []) if self.most_new == 1 else divide(self.host_starts)

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The chunks of `divided`."""
        behind = self.divided[1]
        if not behind:
            return []
        lengths = self.host_lengths if self.bounds is None else self.bounds.tolist()
        starts = self.host_starts
        return [Chunk(i, starts[i], starts[i + 1], lengths[i]) for i in behind]

    def with_rows(self, rows: "StepMetadata") -> DeviceBatch:
        """The step of both groups, this one's and that of the 16-bit rows; made once."""
        if self._batch is None:
            self._batch = DeviceBatch(
                self.divided[0],
                self.chunks,
                self.most_tokens,
                self.lengths,
                self.block_table,
                rows.block_table,
                rows.slot_mapping,
            )
        return self._batch


class StepMetadataBuilder(AttentionMetadataBuilder):
    """Of both caches. On a GPU steps of one new token a request are captured in CUDA graphs."""

    reorder_batch_threshold = 1  # requests with one new token come first

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Of steps that bring each request one token, where kernels attend."""
        graphs = vllm_config.device_config.device_type == "cuda"
        return (
            AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if graphs else AttentionCGSupport.NEVER
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StepMetadata:
        """Raises KvfoldError where queries see tokens behind them."""
        return self._step(common_attn_metadata, common_attn_metadata.max_seq_len)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> StepMetadata:
        """With room for any length, since the graph is replayed with others."""
        return self._step(common_attn_metadata, self.vllm_config.model_config.max_model_len)

    def _step(self, common: Any, most_tokens: int) -> StepMetadata:
        if common.causal is not True:
            raise KvfoldError(
                "This step's attention is not causal, but a packed cache is read causally alone; "
                "serve the model for text generation."
            )
        table = common.block_table_tensor
        # layers of several formats have a builder each: a group's step is built once
        step = getattr(common, "kvfold_step", None)
        if step is None or step.block_table is not table:
            # how many drafts of the step before were accepted, only the device may know yet
            drafting = self.vllm_config.speculative_config is not None
            bounds = None if drafting else common.seq_lens_cpu_upper_bound
            step = common.kvfold_step = StepMetadata(
                common.query_start_loc_cpu, common.seq_lens, bounds,
                common.max_query_len, most_tokens, table, common.slot_mapping,
            )  # fmt: skip
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
        self.most = (0, 0)  # sequences of a step, and tokens of one

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
        ours = self.layer
        assert ours is not None
        ours.to(query.device)
        kernels = query.is_cuda
        if kernels:
            wait()
        if attn_metadata is None:  # memory is being measured
            if kernels:
                self._reserve(query)
            return output.zero_()
        context, name = get_forward_context(), layer.layer_name + RAW
        raw: Any = context.no_compile_layers[name]
        blocks = Blocks(kv_cache.flatten(1).view(torch.uint8), raw.kv_cache)
        step, rows = attn_metadata, context.attn_metadata[name]
        options = LogitOptions(self.softcap, self.sinks, self.sliding)
        if kernels:
            from kvfold.runtime.vllm import triton_attention

            batch = step.with_rows(rows)
            triton_attention.attend_step(
                ours, blocks, batch, query, key, value, self.scale, options, output
            )
            return output
        tokens = step.host_starts[-1]
        plain = Batch(
            step.host_starts, step.host_lengths, step.block_table, rows.block_table, rows.slot_mapping[:tokens].long()
        )  # fmt: skip
        torch_attention.attend_step(
            ours, blocks, plain, query[:tokens], key[:tokens], value[:tokens], self.scale, options,
            output[:tokens],
        )  # fmt: skip
        return output

    def _reserve(self, query: Tensor) -> None:
        """Takes for a moment what a step of this size takes beside the pool."""
        from kvfold.runtime.vllm.triton_attention import scratch_nbytes

        assert self.layer is not None
        room = scratch_nbytes(len(query), *self.most, self.num_heads, self.layer)
        torch.empty(room, dtype=torch.uint8, device=query.device)


def serve(attention: Any, layer: ServedLayer, config: Any, drafts: int) -> Served:
    """Gives an attention layer of vLLM's, made with PackedBackend, an artifact's layer, and returns
    what decides which kernels it needs.

    Args:
        config: VllmConfig; to its layers by name that of the 16-bit rows is added.
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
    impl.most = (config.scheduler_config.max_num_seqs, config.model_config.max_model_len)
    raw = RawCache(layer, drafts)
    config.compilation_config.static_forward_context[attention.layer_name + RAW] = raw
    # plain attributes: as a submodule it would be among the weights
    spec = packed_spec(layer)
    object.__setattr__(attention, "kv_raw", raw)
    object.__setattr__(attention, "get_kv_cache_spec", lambda vllm_config: spec)
    options = LogitOptions(impl.softcap, impl.sinks, impl.sliding)
    return Served(layer, impl.num_heads, options, config.model_config.dtype, *impl.most)
