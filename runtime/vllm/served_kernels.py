"""The kernels of a served artifact, compiled in processes beside this one while vLLM reads the
weights, so that no request waits for a compiler."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from kvfold.kernels.compile.launch import Launch, noting
from kvfold.runtime.backends.base import LogitOptions
from kvfold.runtime.cache.ambient import neutrally
from kvfold.runtime.vllm.batch import Chunk, DeviceBatch
from kvfold.runtime.vllm.layer import ServedLayer
from kvfold.runtime.vllm.torch_attention import Blocks

log = logging.getLogger("kvfold")
FIRST, CHUNK, DRAFTS = 700, 300, 3  # tokens of prompts, of chunks behind them, and of drafts


class Served(NamedTuple):
    """A layer as vLLM has made it.

    Attributes:
        layer: on the CPU.
        num_heads: query heads of this rank.
        options: of its logits.
        dtype: of activations.
        sequences, tokens: requests of a step, and tokens of one, at the most.
    """

    layer: ServedLayer
    num_heads: int
    options: LogitOptions
    dtype: torch.dtype
    sequences: int
    tokens: int


class _Pending:
    """What this process compiles."""

    def __init__(self) -> None:
        self.layers: list[Served] = []
        self.compilation: Any = None


_pending = _Pending()


def note_layer(served: Served, count: int, device: str) -> None:
    """Takes a layer into account, and with the last of `count` begins to compile; returns at once.
    What goes wrong is logged: kernels are then compiled where they are first launched."""
    _pending.layers.append(served)
    if len(_pending.layers) < count:
        return
    layers, _pending.layers = _pending.layers, []
    if device != "cuda":
        return
    from kvfold.runtime.generate.compile import begin

    try:
        _pending.compilation = begin(torch.device(device), partial(launches_of, layers))
    except Exception as error:
        log.warning("kernels are compiled at their first use: %s", error)


def wait() -> None:
    """Returns when what `note_layer` began is over, at once from the second call on."""
    compilation, _pending.compilation = _pending.compilation, None
    if compilation is None:
        return
    compilation.builder.wait()
    if compilation.builder.failed:
        job, message = compilation.builder.failed[0]
        log.warning("kernel %s can't be compiled: %s", job.label, message)


@neutrally
@torch.no_grad()
def launches_of(layers: Sequence[Served], multiprocessors: int) -> list[Launch]:
    """What steps of these layers launch: any number of requests with one new token, prompts, chunks
    behind other tokens, and drafts. Nothing runs."""
    kinds = {_sort(served): served for served in layers}
    found: list[Launch] = []
    for served in kinds.values():
        with noting(multiprocessors) as noted:
            _walk(served)
        found += noted
    return found


def _sort(served: Served) -> tuple:
    """What of a layer decides which kernels it needs."""
    spec, options = served.layer.spec, served.options
    tensors = (spec.key.matrix, spec.key.offset, spec.key.clip, spec.value.clip)
    return (
        spec.key.format, spec.value.format, spec.key.turns, *(x is None for x in tensors),
        options.softcap, options.sinks_logit is None, options.sliding > 0, served.layer.geometry,
    )  # fmt: skip


def _walk(served: Served) -> None:
    from kvfold.runtime.vllm.triton_attention import attend_step

    layer = served.layer
    g, layout = layer.geometry, layer.layout
    packed = torch.zeros(2, layer.block_nbytes, dtype=torch.uint8)
    raw = torch.zeros(
        2, g.num_kv_heads, layout.raw_block_tokens, 2 * g.head_dim, dtype=torch.float16
    )
    sizes = layout.block_tokens, layout.raw_block_tokens

    def step(singles: int, chunks: list[Chunk]) -> None:
        requests = singles + len(chunks)
        longest = max(served.tokens, *(x.length for x in chunks), 1)
        entries = [-(-longest // size) + 1 for size in sizes]
        tokens = chunks[-1].end if chunks else singles
        batch = DeviceBatch(
            singles, chunks, served.tokens, torch.zeros(requests, dtype=torch.int32),
            torch.zeros(requests, entries[0], dtype=torch.int32),
            torch.zeros(requests, entries[1], dtype=torch.int32),
            torch.zeros(tokens, dtype=torch.int64),
        )  # fmt: skip
        query, out = (
            torch.zeros(tokens, served.num_heads, g.head_dim, dtype=served.dtype) for _ in range(2)
        )
        key = torch.zeros(tokens, g.num_kv_heads, g.head_dim, dtype=served.dtype)
        attend_step(layer, Blocks(packed, raw), batch, query, key, key, 1.0, served.options, out)

    count = 1
    while count < served.sequences:
        step(count, [])
        count *= 2
    step(served.sequences, [])
    for new, length in ((FIRST, FIRST), (CHUNK, FIRST + CHUNK), (DRAFTS, FIRST + DRAFTS)):
        step(0, [Chunk(0, 0, new, length)])
