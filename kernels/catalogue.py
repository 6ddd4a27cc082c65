"""The catalogue: the formats that the search picks from, by head_dim, so that one set of kernels
serves all artifacts.

Layers need different numbers of bits and hardly different cuts into classes: two cuts shared by all
layers cost 1 to 2 % more distortion than each layer's own (`python benchmarks/catalogue.py`, which
chose these by the spectra of SmolLM2-135M, Qwen2.5-0.5B and Gemma 3 270M, and prints what each
costs). Those of head_dim 80, 96 and 128 come from the same spectra, interpolated.
"""

from functools import cache

from kvfold.kernels.formats import Format, raw16, uniform

# one line for each mean number of bits: cuts, each of channels@bits
KEYS = {
    64: """
        8@3 8@2 8@1 40@0 | 8@3 24@1 32@0
        8@4 16@2 40@0 | 8@3 8@2 24@1 24@0
        8@4 16@2 16@1 24@0 | 8@4 8@2 32@1 16@0
        8@4 16@2 32@1 8@0 | 8@4 8@3 16@2 8@1 24@0
        8@4 32@2 16@1 8@0 | 8@4 8@3 24@2 8@1 16@0
        8@4 8@3 24@2 24@1 | 8@5 16@3 16@2 8@1 16@0
        8@5 8@3 32@2 16@1 | 8@5 8@4 8@3 24@2 16@0
        8@5 16@3 32@2 8@1 | 8@5 8@4 16@3 16@2 8@1 8@0
        8@5 24@3 32@2 | 8@5 8@4 24@3 8@2 16@1
        8@5 8@4 24@3 24@2 | 8@6 16@4 16@3 16@2 8@0
        8@6 16@4 32@3 8@2 | 8@6 8@5 16@4 16@3 8@2 8@1
        8@6 8@5 24@4 24@3 | 16@6 16@5 16@4 8@2 8@0
        16@6 8@5 32@4 8@3 | 24@6 16@5 16@4 8@0
        24@6 16@5 24@4 | 40@6 16@4 8@2
    """,
    80: """
        8@3 8@2 16@1 48@0 | 8@3 16@2 56@0
        8@4 16@2 16@1 40@0 | 8@4 8@2 32@1 32@0
        8@4 16@2 32@1 24@0 | 8@4 8@3 16@2 8@1 40@0
        8@4 8@3 24@2 16@1 24@0 | 8@4 24@2 40@1 8@0
        8@4 8@3 24@2 32@1 8@0 | 8@5 16@3 16@2 16@1 24@0
        8@5 16@3 24@2 24@1 8@0 | 8@4 8@3 40@2 24@1
        8@5 16@3 32@2 24@1 | 8@5 8@4 16@3 24@2 8@1 16@0
        8@5 24@3 40@2 8@1 | 8@5 8@4 24@3 24@2 8@1 8@0
        8@5 8@4 24@3 32@2 8@1 | 8@6 16@4 24@3 16@2 16@0
        8@6 16@4 24@3 24@2 8@1 | 8@5 8@4 40@3 24@2
        8@6 24@4 40@3 8@2 | 8@6 8@5 24@4 16@3 24@2
        8@6 8@5 40@4 24@3 | 16@6 8@5 24@4 24@3 8@2
        16@6 16@5 40@4 8@3 | 32@6 8@5 24@4 16@2
        24@6 32@5 24@4 | 40@6 8@5 24@4 8@3
    """,
    96: """
        8@4 16@2 8@1 64@0 | 8@3 8@2 32@1 48@0
        8@4 16@2 32@1 40@0 | 8@4 8@3 16@2 8@1 56@0
        8@4 8@3 24@2 16@1 40@0 | 8@4 24@2 40@1 24@0
        8@4 8@3 24@2 40@1 16@0 | 8@4 16@3 24@2 16@1 32@0
        8@4 8@3 40@2 32@1 8@0 | 8@5 16@3 32@2 16@1 24@0
        8@5 16@3 32@2 40@1 | 8@5 8@4 16@3 32@2 8@1 24@0
        8@5 24@3 40@2 24@1 | 8@5 16@4 16@3 32@2 24@0
        8@5 8@4 24@3 40@2 16@1 | 8@6 16@4 24@3 24@2 8@1 16@0
        8@5 8@4 40@3 32@2 8@1 | 8@6 24@4 24@3 24@2 16@0
        8@6 16@4 32@3 40@2 | 8@6 8@5 24@4 24@3 16@2 16@0
        8@6 8@5 24@4 40@3 16@2 | 16@6 8@5 32@4 24@3 16@0
        8@6 16@5 40@4 32@3 | 16@6 16@5 32@4 16@3 16@2
        16@6 24@5 48@4 8@3 | 32@6 16@5 24@4 16@3 8@2
        32@6 32@5 32@4 | 56@6 32@4 8@2
    """,
    128: """
        8@4 16@2 32@1 72@0 | 8@4 32@2 88@0
        8@4 8@3 24@2 24@1 64@0 | 8@4 24@2 48@1 48@0
        8@4 40@2 48@1 32@0 | 8@4 16@3 24@2 32@1 48@0
        8@5 24@3 24@2 32@1 40@0 | 8@4 8@3 40@2 56@1 16@0
        8@5 16@3 40@2 56@1 8@0 | 8@5 8@4 16@3 40@2 24@1 32@0
        8@5 24@3 48@2 48@1 | 8@5 8@4 32@3 32@2 24@1 24@0
        8@5 8@4 24@3 56@2 32@1 | 8@6 16@4 32@3 40@2 32@0
        8@5 8@4 40@3 56@2 16@1 | 8@6 24@4 32@3 32@2 16@1 16@0
        8@6 16@4 40@3 56@2 8@1 | 8@6 8@5 24@4 40@3 24@2 24@0
        8@6 24@4 48@3 48@2 | 8@6 16@5 24@4 32@3 32@2 16@0
        8@6 8@5 40@4 56@3 16@2 | 16@6 16@5 32@4 32@3 24@2 8@0
        16@6 16@5 48@4 48@3 | 40@6 48@4 16@3 16@2 8@0
        24@6 32@5 56@4 16@3 | 56@6 40@4 16@3 16@2
        48@6 32@5 48@4 | 80@6 40@4 8@0
    """,
    256: """
        16@4 32@2 64@1 144@0 | 16@4 64@2 176@0
        16@4 16@3 48@2 48@1 128@0 | 16@4 48@2 96@1 96@0
        16@4 16@3 48@2 112@1 64@0 | 16@4 32@3 64@2 32@1 112@0
        16@5 16@3 80@2 96@1 48@0 | 16@5 48@3 64@2 32@1 96@0
        16@5 32@3 80@2 112@1 16@0 | 16@5 16@4 48@3 64@2 32@1 80@0
        16@5 48@3 112@2 64@1 16@0 | 16@5 32@4 48@3 64@2 32@1 64@0
        16@5 16@4 48@3 112@2 64@1 | 16@6 48@4 32@3 96@2 64@0
        16@5 16@4 80@3 112@2 32@1 | 16@6 48@4 64@3 64@2 32@1 32@0
        16@6 32@4 80@3 112@2 16@1 | 16@6 16@5 48@4 80@3 48@2 48@0
        16@6 48@4 96@3 96@2 | 16@6 32@5 48@4 64@3 64@2 32@0
        16@6 16@5 80@4 112@3 32@2 | 48@6 96@4 48@3 32@2 16@1 16@0
        32@6 32@5 96@4 96@3 | 80@6 96@4 32@3 32@2 16@0
        64@6 32@5 128@4 32@3 | 112@6 96@4 32@3 16@0
        96@6 64@5 96@4 | 160@6 80@4 16@0
    """,
}
VALUES = {
    64: """
        8@2 16@1 40@0 | 8@4 56@0
        8@2 32@1 24@0 | 8@3 24@1 32@0
        16@2 32@1 16@0 | 8@3 8@2 24@1 24@0
        8@3 16@2 24@1 16@0 | 24@2 32@1 8@0
        8@3 16@2 40@1 | 8@4 24@2 16@1 16@0
        8@3 32@2 24@1 | 8@4 32@2 16@1 8@0
        16@3 32@2 16@1 | 16@4 24@2 16@1 8@0
        8@4 16@3 40@2 | 8@5 24@3 16@2 16@1
        16@4 32@3 16@2 | 8@5 8@4 24@3 24@2
    """,
    80: """
        8@2 24@1 48@0 | 8@3 16@1 56@0
        16@2 24@1 40@0 | 8@3 8@2 16@1 48@0
        8@3 16@2 24@1 32@0 | 16@2 48@1 16@0
        8@3 16@2 40@1 16@0 | 8@4 24@2 16@1 32@0
        8@3 24@2 48@1 | 8@4 32@2 24@1 16@0
        8@3 40@2 32@1 | 8@4 8@3 24@2 32@1 8@0
        8@4 16@3 24@2 32@1 | 16@3 48@2 16@1
        8@4 24@3 48@2 | 8@5 32@3 24@2 16@1
        16@4 48@3 16@2 | 8@5 16@4 24@3 32@2
    """,
    96: """
        8@2 32@1 56@0 | 8@3 8@2 8@1 72@0
        8@3 8@2 32@1 48@0 | 16@2 40@1 40@0
        8@3 16@2 40@1 32@0 | 24@2 48@1 24@0
        8@3 24@2 48@1 16@0 | 8@4 32@2 24@1 32@0
        8@3 32@2 56@1 | 8@4 8@3 24@2 40@1 16@0
        8@4 8@3 40@2 32@1 8@0 | 8@3 56@2 32@1
        8@4 16@3 40@2 32@1 | 16@3 64@2 16@1
        8@4 32@3 56@2 | 8@5 8@4 24@3 40@2 16@1
        8@5 16@4 40@3 32@2 | 16@4 64@3 16@2
    """,
    128: """
        8@3 8@2 24@1 88@0 | 8@2 48@1 72@0
        8@3 16@2 40@1 64@0 | 16@2 64@1 48@0
        32@2 64@1 32@0 | 8@4 32@2 32@1 56@0
        8@3 32@2 72@1 16@0 | 8@4 8@3 32@2 40@1 40@0
        8@3 48@2 72@1 | 8@4 16@3 32@2 48@1 24@0
        16@3 64@2 48@1 | 8@4 24@3 40@2 40@1 16@0
        24@3 80@2 24@1 | 16@4 16@3 56@2 32@1 8@0
        8@4 48@3 72@2 | 8@5 8@4 40@3 56@2 16@1
        8@5 24@4 56@3 40@2 | 24@4 80@3 24@2
    """,
    256: """
        16@3 16@2 48@1 176@0 | 32@2 64@1 160@0
        16@3 32@2 80@1 128@0 | 32@2 128@1 96@0
        16@3 48@2 112@1 80@0 | 16@4 64@2 64@1 112@0
        16@4 16@3 64@2 80@1 80@0 | 16@3 64@2 144@1 32@0
        16@4 16@3 96@2 80@1 48@0 | 16@3 96@2 144@1
        16@4 48@3 80@2 80@1 32@0 | 32@3 128@2 96@1
        64@3 128@2 64@1 | 32@4 32@3 112@2 64@1 16@0
        16@5 16@4 80@3 112@2 32@1 | 16@4 96@3 144@2
        16@5 48@4 112@3 80@2 | 48@4 160@3 48@2
    """,
}
HEAD_DIMS = tuple(KEYS)

# formats of one class, by name: levels and type of the parameters; "4" and "8" are steps of the
# progressive ladder
UNIFORM_KEYS = {"4": (16, "e4m3"), "6": (64, "fp16"), "8": (256, "fp16")}
UNIFORM_VALUES = {
    "1.6": (3, "e4m3"),
    "2": (4, "e4m3"),
    "3": (8, "e4m3"),
    "4": (16, "e4m3"),
    "4h": (16, "fp16"),
    "5": (32, "fp16"),
    "6": (64, "fp16"),
    "8": (256, "fp16"),
}
# mean code bits of the lines of KEYS and VALUES; a line's first cut is named by them and a, its
# second one by them and b
KEY_BITS = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 4.5, 5.0)
VALUE_BITS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
LADDER = ("4/4", "8/8", "16/16")  # key/value
# key/value: the pairs that the search picks from, at all head_dims, bits rising. `python
# benchmarks/catalogue_pairs.py` chose them: those that the layers of real models take most, the
# smallest ones, and steps of the ladder.
_PAIRS = """
    0.75a/0.5a 0.75b/0.5a 1.5a/0.75a 1.75a/0.5a 0.75b/1.6 2a/0.5a 1.25a/1.5a 1.5b/1.5a 2.5a/0.75a 1.5b/2b 2a/1.5a
    1.5a/2 1.75a/2a 1.75b/2a 2.5a/1.25a 1.75a/2 1.5a/2.5a 2.5a/1.75a 2.5a/2a 2.75a/1.75a 2a/2.5a 2b/2.5a 2.5a/2
    2.25a/2.5a 2.5b/2.5a 3.5a/1.5a 2.75b/2.5a 3a/2.5a 3.5a/2.5a 4.5a/1.5a 4a/2a 3a/3 3.5b/3a 4a/2.5a 3.5a/3 3.5b/3
    4.5a/2 4.5a/2.5a 4a/3 4.5a/3 5a/3 4.5a/4 5a/4 6/3 6/4 6/5 8/5 8/6 8/8 16/16
"""
PAIRS = tuple(_PAIRS.split())


def _cut(text: str) -> Format:
    """Channels@bits of each class → the mixed format."""
    classes = [tuple(map(int, part.split("@"))) for part in text.split()]
    return Format(
        tuple((channels, 2**bits if bits else 0) for channels, bits in classes), "scale", "e4m3"
    )


def _named(
    cuts: str, bits: tuple[float, ...], others: dict[str, tuple], head_dim: int
) -> dict[str, Format]:
    found: dict[str, Format] = {}
    for mean, line in zip(bits, cuts.strip().splitlines(), strict=True):
        found |= {
            f"{mean:g}{letter}": _cut(text)
            for letter, text in zip("ab", line.split("|"), strict=True)
        }
    found |= {name: uniform(head_dim, levels, dtype) for name, (levels, dtype) in others.items()}
    return dict(
        sorted([*found.items(), ("16", raw16(head_dim))], key=lambda item: item[1].payload_bits)
    )


@cache
def named_keys(head_dim: int) -> dict[str, Format]:
    """Formats of keys by name, payload rising, 16 bits last; empty for a head_dim that the
    catalogue does not have."""
    return _named(KEYS[head_dim], KEY_BITS, UNIFORM_KEYS, head_dim) if head_dim in KEYS else {}


@cache
def named_values(head_dim: int) -> dict[str, Format]:
    """Formats of values, as `named_keys`."""
    return (
        _named(VALUES[head_dim], VALUE_BITS, UNIFORM_VALUES, head_dim) if head_dim in VALUES else {}
    )


def key_formats(head_dim: int) -> tuple[Format, ...]:
    """Those of `named_keys`, in their order."""
    return tuple(named_keys(head_dim).values())


def value_formats(head_dim: int) -> tuple[Format, ...]:
    """Those of `named_values`, in their order."""
    return tuple(named_values(head_dim).values())


@cache
def pairs(head_dim: int) -> tuple[tuple[Format, Format], ...]:
    """The catalogue's pairs of a key format and a value format; empty for a head_dim that it does
    not have."""
    keys, values = named_keys(head_dim), named_values(head_dim)
    if not keys:
        return ()
    return tuple((keys[key], values[value]) for key, value in (pair.split("/") for pair in PAIRS))


def code_bits(fmt: Format) -> float:
    """Mean bits per channel of a mixed format, codes alone."""
    return sum(p.channels * p.width for p in fmt.planes) / fmt.head_dim


def mixed_between(formats: tuple[Format, ...], least: float, most: float) -> tuple[Format, ...]:
    """Those of the catalogue's mixed formats whose mean code bits are at least `least`, rounded
    down to whole classes of 8 channels, and `most` at the most."""
    return tuple(
        f
        for f in formats
        if f.kind.symmetric
        and int(least * f.head_dim) // 8 * 8 / f.head_dim - 1e-9 <= code_bits(f) <= most + 1e-9
    )
