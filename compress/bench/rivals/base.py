"""What every rival is: a scheme at a number of bits, for one layer."""

from torch import Tensor

from kvfold.compress.bench.rivals.codecs import Codec, Stored
from kvfold.compress.calibrate import LayerStats
from kvfold.errors import KvfoldError


class Rival:
    """One scheme at one number of bits, one instance for each layer. A subclass is a short file and
    a row of `RIVALS`.

    Attributes:
        source: whose scheme it is, and what differs here.
        needs: "" for no calibration; "plain" for statistics at the text's own positions; "spread"
            at interpolated ones.
        block_tokens: tokens quantised together, which leave the 16-bit window together.
        widths: bits that the scheme is defined for.
        key, value: the codecs, set by `__init__`, or by `calibrate` where `needs` says so.
    Raises:
        KvfoldError: `bits` is not one of `widths`, or what the scheme builds on is not installed.
    """

    source = ""
    needs = ""
    block_tokens = 1
    widths: tuple[int, ...] = (2, 3, 4)
    key: Codec
    value: Codec

    def __init__(self, bits: int, head_dim: int) -> None:
        if bits not in self.widths:
            known = ", ".join(map(str, self.widths))
            raise KvfoldError(f"{type(self).__name__} has no {bits}-bit form; choose from {known}.")
        self.bits, self.head_dim = bits, head_dim

    def calibrate(self, stats: LayerStats) -> None:
        """Fits the layer's static tables to `stats`, taken at the positions that `needs` asks
        for."""

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Stored, Stored]:
        """Keys after RoPE and values, float32 [Hkv, T, D], T a multiple of block_tokens → all that
        is kept of them."""
        return self.key.encode(keys), self.value.encode(values)

    def decode(self, stored: tuple[Stored, Stored]) -> tuple[Tensor, Tensor]:
        """What attention reads back: keys in their own basis, and values, float32 [Hkv, T, D]."""
        return self.key.decode(stored[0]), self.value.decode(stored[1])

    def quantise(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """There and back, through the stored arrays."""
        return self.decode(self.encode(keys, values))

    def payload_bits(self, head_dim: int) -> float:
        """Bits per element, mean of keys and values, with all scales and minima: the size of what
        `encode` returns."""
        raise NotImplementedError
