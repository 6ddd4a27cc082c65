"""One layer of a served artifact: its formats and transforms, cut to the heads of one rank."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from kvfold.exports.account import Geometry
from kvfold.exports.reader import read_cache
from kvfold.exports.spec import LayerSpec
from kvfold.runtime.backends.base import Workspace
from kvfold.runtime.cache.ambient import neutrally
from kvfold.runtime.vllm.blocks import BlockLayout, block_layout, stride_of

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ServedCache:
    """What an artifact says of its cache, all KV heads, on the CPU.

    Attributes:
        geometry: of all KV heads.
        specs: formats and transforms of each layer.
        workspace: buffers that the layers take turns with.
    """

    geometry: Geometry
    specs: list[LayerSpec]
    workspace: Workspace

    def layout(self, block_tokens: int | None = None) -> BlockLayout:
        """Where it lies in blocks of so many tokens; see `block_layout`."""
        formats = [(spec.key.format, spec.value.format) for spec in self.specs]
        return block_layout(self.geometry, formats, block_tokens)


@cache
@neutrally  # vLLM makes models with the GPU as the default device
def served_cache(path: str) -> ServedCache:
    """Of the artifact in a folder, read once in each process.

    Raises:
        KvfoldError: it is damaged, or not there.
    """
    metadata, specs = read_cache(Path(path))
    return ServedCache(metadata.geometry, specs, Workspace())


@dataclass
class ServedLayer:
    """One layer as one rank of tensor parallelism reads and writes it.

    Attributes:
        index: number of the layer.
        geometry: of this rank's KV heads.
        spec: the same heads' formats and transforms.
        layout: of blocks.
        workspace: of all layers.
        device: where the spec's tensors are.
    """

    index: int
    geometry: Geometry
    spec: LayerSpec
    layout: BlockLayout
    workspace: Workspace
    device: torch.device = CPU

    @property
    def page_stride(self) -> int:
        """Bytes from one page of this layer to the next in a block."""
        return stride_of(self.geometry, (self.spec.key.format, self.spec.value.format))

    @property
    def block_nbytes(self) -> int:
        """Bytes of this layer in a packed block."""
        return self.layout.pages_per_block * self.page_stride

    def to(self, device: torch.device) -> None:
        """Moves matrices, means and clips to the device that attends."""
        if self.device != device:
            self.spec, self.device = self.spec.to(device), device


@neutrally
def served_layer(
    path: str, index: int, rank: int, ranks: int, block_tokens: int | None
) -> ServedLayer:
    """Layer `index` of the artifact in a folder, on one of so many ranks, in blocks of
    `block_tokens` tokens.

    Where there are more ranks than KV heads, neighbours hold the same head.
    """
    cached = served_cache(path)
    total = cached.geometry.num_kv_heads
    count = max(1, total // ranks)
    heads = slice(rank * total // ranks, rank * total // ranks + count)
    geometry = replace(cached.geometry, num_kv_heads=count)
    spec = cached.specs[index].of_heads(heads)
    return ServedLayer(index, geometry, spec, cached.layout(block_tokens), cached.workspace)
