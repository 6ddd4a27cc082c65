"""The blocks of 16-bit rows in vLLM's pool: sinks stay, and hits bring them."""

import engine  # skips this module where vLLM is not installed  # noqa: F401
import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from kvfold.runtime.vllm.manager import RawManager
from kvfold.runtime.vllm.specs import RawSpec

SIZE, SINKS, WINDOW, BLOCKS = 8, 12, 32, 40
SPEC = RawSpec(
    block_size=SIZE,
    num_kv_heads=1,
    head_size=8,
    dtype=torch.float16,
    sliding_window=WINDOW,
    sinks=SINKS,
)


class Pool:
    """A pool of blocks with one manager."""

    def __init__(self) -> None:
        init_none_hash(sha256)
        self.blocks = BlockPool(BLOCKS, True, SIZE)
        self.manager = RawManager(
            SPEC,
            block_pool=self.blocks,
            enable_caching=True,
            kv_cache_group_id=0,
            scheduler_block_size=SIZE,
        )

    def request(self, name: str, tokens: list[int]) -> Request:
        hasher = get_request_block_hasher(SIZE, sha256)
        return Request(name, tokens, SamplingParams(max_tokens=9), None, block_hasher=hasher)

    def hit(self, request: Request) -> list:
        found, length = RawManager.find_longest_cache_hit(
            block_hashes=request.block_hashes,
            max_length=request.num_tokens - 1,
            kv_cache_group_ids=[0],
            block_pool=self.blocks,
            kv_cache_spec=SPEC,
            drop_eagle_block=False,
            alignment_tokens=SIZE,
        )
        assert length == SIZE * len(found[0])
        return found[0]

    def begin(self, request: Request) -> int:
        """Takes up a hit and makes room for all tokens; returns the tokens that were hit."""
        hit, free = self.hit(request), self.blocks.get_num_free_blocks()
        done, total = SIZE * len(hit), request.num_tokens
        needed = self.manager.get_num_blocks_to_allocate(
            request.request_id, total, hit, done, done, total
        )
        self.manager.add_local_computed_blocks(request.request_id, hit, done, 0)
        self.manager.allocate_new_blocks(request.request_id, total, total)
        assert self.blocks.get_num_free_blocks() == free - needed  # as the scheduler was told
        self.manager.cache_blocks(request, total, replay_boundaries=[])
        return done

    def held(self, request: Request) -> list[int]:
        """Numbers of blocks that a request holds, by their place in its table."""
        table = self.manager.req_to_blocks[request.request_id]
        return [i for i, block in enumerate(table) if not block.is_null]


@pytest.fixture
def pool():
    return Pool()


TEXT = list(range(100))


def test_blocks_between_sinks_and_window_are_given_back(pool):
    request = pool.request("a", TEXT)
    assert pool.begin(request) == 0
    free = pool.blocks.get_num_free_blocks()
    for computed in (20, 60, 60, 90):
        pool.manager.remove_skipped_blocks("a", computed)
    # the next query, of token 90, reads 59 and later ones: block 7; sinks are blocks 0 and 1
    assert pool.held(request) == [0, 1, *range(7, 13)]
    assert pool.blocks.get_num_free_blocks() == free + 5
    pool.manager.free("a")
    assert pool.blocks.get_num_free_blocks() == BLOCKS - 1


def test_a_hit_brings_sinks_and_window(pool):
    first = pool.request("a", TEXT)
    pool.begin(first)
    table = [block.block_id for block in pool.manager.req_to_blocks["a"]]
    pool.manager.free("a")
    again = pool.request("b", [*TEXT, 7, 7, 7])
    assert pool.begin(again) == 96
    assert pool.held(again) == [0, 1, *range(8, 13)]
    found = [block.block_id for block in pool.manager.req_to_blocks["b"]]
    assert [found[i] for i in (0, 1, 8, 11)] == [table[i] for i in (0, 1, 8, 11)]
    shared = pool.request("c", [*TEXT, 8])  # of blocks that are held already
    assert pool.begin(shared) == 96
    for name in "bc":
        pool.manager.free(name)
    assert pool.blocks.get_num_free_blocks() == BLOCKS - 1


@pytest.mark.parametrize("gone", [0, 1])
def test_nothing_is_hit_where_a_block_of_sinks_was_evicted(pool, gone):
    first = pool.request("a", TEXT)
    pool.begin(first)
    number = pool.manager.req_to_blocks["a"][gone].block_id
    pool.manager.free("a")
    assert len(pool.hit(pool.request("b", [*TEXT, 7]))) == 12
    pool.blocks.evict_blocks({number})
    assert pool.hit(pool.request("c", [*TEXT, 7])) == []
    assert pool.begin(pool.request("d", [*TEXT, 7])) == 0


def test_a_short_beginning_is_hit_before_a_window_is_full(pool):
    pool.begin(pool.request("a", TEXT[:20]))
    assert pool.begin(pool.request("b", [*TEXT[:18], 5, 5, 5, 5])) == 16


def test_the_pool_is_sized_for_sinks_too():
    # 31 tokens behind the next one, 64 in flight, the first block in part; two blocks of sinks
    assert SPEC.max_admission_blocks_per_request(64, 1000) == -(-(31 + 64) // 8) + 1 + 2


def test_sinks_are_kept_in_the_cache_where_blocks_are_left_out():
    mask = RawManager.reachable_block_mask(
        0, 40, 40 * SIZE, SPEC, False, retention_interval=40 * SIZE
    )
    assert mask is not None and mask[:2] == [True, True] and not any(mask[2:30]) and mask[39]
