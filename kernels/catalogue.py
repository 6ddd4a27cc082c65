"""The catalogue: the formats that the search picks from, by head_dim, so that one set of kernels serves all artifacts.

Layers need different numbers of bits and hardly different cuts into classes: two cuts shared by all layers cost about 1 % more
distortion than each layer's own (`python benchmarks/catalogue.py`, which chose these by the spectra of SmolLM2-135M,
Qwen2.5-0.5B and Gemma 3 270M, and prints what each costs). Those of head_dim 80, 96 and 128 come from the same spectra, interpolated.
"""

from functools import cache

from kvfold.kernels.formats import Format, raw16, uniform

# one line for each mean number of bits: cuts, each of channels@bits
KEYS = {
    64: "48@1 16@0",
}
VALUES = {
    64: "32@1 32@0",
}
HEAD_DIMS = tuple(KEYS)

# levels and type of the parameters of formats of one class; the 16- and 8-bit steps of the progressive ladder are among them
UNIFORM_KEYS = ((64, "fp16"), (256, "fp16"))
UNIFORM_VALUES = ((3, "e4m3"), (4, "e4m3"), (8, "e4m3"), (16, "e4m3"), (16, "fp16"), (32, "fp16"), (64, "fp16"), (256, "fp16"))


def _cut(text: str) -> Format:
    """Channels@bits of each class → the mixed format."""
    classes = [tuple(map(int, part.split("@"))) for part in text.split()]
    return Format(tuple((channels, 2**bits if bits else 0) for channels, bits in classes), "scale", "e4m3")


def _formats(cuts: str, head_dim: int, others: tuple) -> tuple[Format, ...]:
    mixed = [_cut(text) for line in cuts.strip().splitlines() for text in line.split("|")]
    single = [uniform(head_dim, levels, dtype) for levels, dtype in others]
    return tuple(sorted([*mixed, *single, raw16(head_dim)], key=lambda f: f.payload_bits))


@cache
def key_formats(head_dim: int) -> tuple[Format, ...]:
    """Formats of keys, payload rising, 16 bits last; empty for a head_dim that the catalogue does not have."""
    return _formats(KEYS[head_dim], head_dim, UNIFORM_KEYS) if head_dim in KEYS else ()


@cache
def value_formats(head_dim: int) -> tuple[Format, ...]:
    """Formats of values, as `key_formats`."""
    return _formats(VALUES[head_dim], head_dim, UNIFORM_VALUES) if head_dim in VALUES else ()


def code_bits(fmt: Format) -> float:
    """Mean bits per channel of a mixed format, codes alone."""
    return sum(p.channels * p.width for p in fmt.planes) / fmt.head_dim


def offered(formats: tuple[Format, ...], bits: tuple[float, ...]) -> list[Format]:
    """The mixed formats that a recipe's mean code bits ask for: those between its least and its most.

    Args:
        formats: of the catalogue.
        bits: mean code bits; the least counts rounded down to whole classes of 8 channels.
    """
    if not bits or not formats:
        return []
    dim = formats[0].head_dim
    least = int(min(bits) * dim) // 8 * 8 / dim
    return [f for f in formats if f.params == "scale" and least - 1e-9 <= code_bits(f) <= max(bits) + 1e-9]
