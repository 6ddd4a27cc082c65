"""The two caches of a layer as vLLM's `KVCacheSpec`s, and their two groups.

One block of the pool is one block of either group: of the packed group, whose layers each bring
their own bytes, or of the raw group. vLLM's own grouping would split the raw layers where page sizes
differ, and waste most of such blocks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvfold.runtime.vllm.layer import ServedLayer
from kvfold.runtime.vllm.manager import RawManager

# of both: where dtypes differ vLLM zeroes each new block, and packed bytes are viewed as uint8
DTYPE = torch.float16


@dataclass(frozen=True, kw_only=True)
class PackedSpec(FullAttentionSpec):
    """Packed pages: to vLLM a block is one state of so many bytes."""


@dataclass(frozen=True, kw_only=True)
class RawSpec(SlidingWindowSpec):
    """16-bit rows of a sliding window and of the sinks, which stay.

    Attributes:
        sinks: first tokens of a request whose blocks stay as long as it does.
    """

    sinks: int = 0

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """The most blocks that a request holds."""
        window = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return window + cdiv(self.sinks, self.block_size)


def packed_spec(layer: ServedLayer) -> PackedSpec:
    """Of a layer's pages."""
    return PackedSpec(
        block_size=layer.layout.block_tokens,
        num_kv_heads=layer.geometry.num_kv_heads,
        head_size=layer.geometry.head_dim,
        dtype=DTYPE,
        num_head_slots=1,
        state_content_bytes=layer.block_nbytes,
        tokens_per_state=layer.layout.block_tokens,
    )


def raw_spec(layer: ServedLayer, drafts: int) -> RawSpec:
    """Of a layer's 16-bit rows, where a step may bring so many drafted tokens."""
    return RawSpec(
        block_size=layer.layout.raw_block_tokens,
        num_kv_heads=layer.geometry.num_kv_heads,
        head_size=layer.geometry.head_dim,
        dtype=DTYPE,
        sliding_window=layer.layout.raw_window(drafts),
        sinks=layer.layout.sinks,
    )


def register_specs() -> None:
    """Tells vLLM which manager has the blocks of each of the two; again and again changes
    nothing."""
    KVCacheSpecRegistry._ensure_registered()  # its own, which it leaves out once there are others
    KVCacheSpecRegistry.register(
        PackedSpec, FullAttentionManager, uniform_type_base_spec=FullAttentionSpec
    )
    KVCacheSpecRegistry.register(RawSpec, RawManager, uniform_type_base_spec=SlidingWindowSpec)


def served_groups(specs: dict[str, KVCacheSpec]) -> list[Any] | None:
    """The packed and the raw group; None where any layer is not an artifact's."""
    packed = {name: spec for name, spec in specs.items() if isinstance(spec, PackedSpec)}
    raw = {name: spec for name, spec in specs.items() if isinstance(spec, RawSpec)}
    if not specs or len(packed) + len(raw) < len(specs):
        return None
    return [
        KVCacheGroupSpec(list(group), UniformTypeKVCacheSpecs.from_specs(group))
        for group in (packed, raw)
    ]
