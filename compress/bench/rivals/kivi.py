"""KIVI (2402.02750): keys per channel over blocks of tokens, values per token."""

from kvfold.compress.bench.rivals.base import Rival
from kvfold.compress.bench.rivals.codecs import PARAM_BITS, Affine, Channelwise, ParamType


class KIVI(Rival):
    """Key parameters in float16 for a block of 128 tokens, value parameters in e4m3 for a head: b +
    32/128 and b + 16/D bits.

    The paper's own setting, groups of 32 and float16 everywhere, is `KIVI32`, at b + 1 bits.
    """

    source = (
        "KIVI (2402.02750), K per channel in blocks of 128 tokens, V per token with e4m3 parameters"
    )
    block_tokens = 128
    value_group = 128
    value_params: ParamType = "e4m3"

    def __init__(self, bits: int, head_dim: int) -> None:
        super().__init__(bits, head_dim)
        self.key = Channelwise(Affine(bits, self.block_tokens, "fp16"), self.block_tokens)
        self.value = Affine(bits, self._value_group(head_dim), self.value_params)

    def _value_group(self, head_dim: int) -> int:
        return min(self.value_group, head_dim)

    def payload_bits(self, head_dim: int) -> float:
        value = 2 * PARAM_BITS[self.value_params] / self._value_group(head_dim)
        return self.bits + (32 / self.block_tokens + value) / 2


class KIVI32(KIVI):
    source = "KIVI (2402.02750) as published: groups of 32, float16 parameters"
    block_tokens = 32
    value_group = 32
    value_params: ParamType = "fp16"
