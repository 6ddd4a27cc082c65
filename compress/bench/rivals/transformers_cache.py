"""transformers' QuantizedCache with its quanto and HQQ backends: their own quantisers, under the
window rule of this comparison.

Used as is, that cache reads a whole prompt unquantised and then quantises everything at once
whenever its residual fills, so a teacher-forced pass would measure nothing. Here its layer's
`_quantize` and `_dequantize` are called on what left the window.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from kvfold.compress.bench.rivals.base import Rival
from kvfold.compress.bench.rivals.codecs import Stored
from kvfold.errors import KvfoldError

GROUP = 64  # transformers' default, contiguous elements


class Backend:
    """A codec that hands float16 to a transformers cache layer. The library's object is what it
    decodes; `encode` lists its arrays."""

    def __init__(self, layer: Any, axis: int) -> None:
        self.layer, self.axis = layer, axis
        self.held: Any = None

    def encode(self, x: Tensor) -> Stored:
        x = x.clamp(-65504, 65504).to(torch.float16)[None].contiguous()
        self.layer.lazy_initialization(x, x)
        self.held = self.layer._quantize(x, self.axis)
        if isinstance(self.held, tuple):  # HQQ: codes and a dictionary
            return self.held[0], self.held[1]["scale"], self.held[1]["zero"]
        return self.held._data._data, self.held._scale, self.held._shift

    def decode(self, stored: Stored) -> Tensor:
        return self.layer._dequantize(self.held)[0].float()


class _QuantizedCache(Rival):
    widths = (2, 4)  # quanto has no other; HQQ's 3-bit packing does not read back at these shapes
    block_tokens = 32  # small heads share a group of 64 elements between tokens
    module, layer, axis = "", "", 0

    def __init__(self, bits: int, head_dim: int) -> None:
        super().__init__(bits, head_dim)
        if find_spec(self.module.partition(".")[0]) is None or find_spec(self.module) is None:
            package = self.module.replace(".", "-")
            raise KvfoldError(
                f"{package} is not installed; run pip install {package} to compare with it."
            )
        self.key, self.value = (
            Backend(getattr(cache_utils, self.layer)(bits, self.axis, self.axis, GROUP), self.axis)
            for _ in range(2)
        )

    def payload_bits(self, head_dim: int) -> float:
        return self.bits + 32 / GROUP


class Quanto(_QuantizedCache):
    source = "transformers QuantizedCache, quanto backend, its defaults (axis 0, groups of 64, float16 parameters)"
    module, layer, axis = "optimum.quanto", "QuantoQuantizedLayer", 0


class HQQ(_QuantizedCache):
    source = (
        "transformers QuantizedCache, HQQ backend, axis 1 as its documentation says, groups of 64, "
        "float16 parameters"
    )
    module, layer, axis = "hqq", "HQQQuantizedLayer", 1
