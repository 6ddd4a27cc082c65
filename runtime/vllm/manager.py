"""The blocks of 16-bit rows: vLLM's sliding window, whose first blocks, the sinks', are never given
back and must be among those that a prefix hit brings."""

from collections.abc import Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager


def sink_blocks(spec: Any) -> int:
    """Blocks that hold the sinks of a request, of a RawSpec."""
    return cdiv(spec.sinks, spec.block_size)


class RawManager(SlidingWindowManager):
    """A manager for RawSpec. Arguments and results are those of the methods that it takes the place
    of."""

    def _kept(self, computed_tokens: int) -> int:
        """Blocks of sinks that a sliding window alone would have given back once so many tokens are
        computed."""
        skipped = self.get_num_skipped_tokens(computed_tokens) // self.block_size
        return min(sink_blocks(self.kv_cache_spec), skipped)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Gives back what lies between sinks and window."""
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, sink_blocks(self.kv_cache_spec), skipped)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Also counts the sinks' blocks of a hit that are free for eviction until then."""
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        head = new_computed_blocks[: self._kept(total_computed_tokens)]
        return needed + self._get_num_evictable_blocks(head)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[Any],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Puts the sinks' blocks of a hit back where the window's have become null."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        kept = self._kept(num_local_computed_tokens + num_external_computed_tokens)
        head = list(new_computed_blocks[:kept])
        self.block_pool.touch(head)
        self.req_to_blocks[request_id][: len(head)] = head

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        """The window's hit, with the sinks' blocks; no hit where one of those is gone."""
        found, length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec,
            drop_eagle_block, alignment_tokens, **kwargs,
        )  # fmt: skip
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        for entry in range(min(sink_blocks(kv_cache_spec), len(found[0]))):
            cached = block_pool.get_cached_block(hashes[entry], kv_cache_group_ids)
            if cached is None:
                return tuple([] for _ in kv_cache_group_ids), 0
            for blocks, block in zip(found, cached, strict=True):
                blocks[entry] = block
        return found, length

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, alignment_tokens: Any, kv_cache_spec: Any,
        *args: Any, **kwargs: Any,
    ) -> list[bool] | None:  # fmt: skip
        """Any hit needs the sinks, so they are worth keeping."""
        mask = super().reachable_block_mask(
            start_block, end_block, alignment_tokens, kv_cache_spec, *args, **kwargs
        )
        if mask is not None:
            for entry in range(start_block, min(end_block, sink_blocks(kv_cache_spec))):
                mask[entry - start_block] = True
        return mask
