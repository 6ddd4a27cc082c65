"""Round to nearest: the floor that all others start from."""

from kvfold.compress.bench.rivals.base import Rival
from kvfold.compress.bench.rivals.codecs import Affine, group_of


class RTN(Rival):
    """Each token's head on its own, asymmetric, minimum and scale in 8 bits: b + 16/D bits."""

    source = "round to nearest, per token and head, parameters in e4m3; no calibration"

    def __init__(self, bits: int, head_dim: int) -> None:
        super().__init__(bits, head_dim)
        self.key = self.value = Affine(bits, group_of(head_dim))

    def payload_bits(self, head_dim: int) -> float:
        return self.bits + 16 / group_of(head_dim)
