"""Formats: sizes, rules, JSON round trip, and the constants of the Gaussian quantiser."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import ndtr

from kvfold.errors import KvfoldError
from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.kernels.kinds.levels import GAUSSIAN_MSE, GAUSSIAN_STEP, PLANE_WIDTHS, RAW
from kvfold.kernels.quantizer import decode, encode

FORMAT_MD = Path(__file__).parents[2] / "exports" / "FORMAT.md"
CODED = sorted(set(PLANE_WIDTHS) - {0, RAW})
DTYPES = st.sampled_from(("e4m3", "fp16"))


@st.composite
def any_format(draw) -> Format:
    """Any valid format of up to 128 channels."""
    kind = draw(st.sampled_from(("none", "scale", "scale_min")))
    if kind == "none":
        return Format(((8 * draw(st.integers(1, 16)), RAW),), "none", draw(DTYPES))
    if kind == "scale_min":
        levels = draw(st.sampled_from(CODED))
        head_dim = 16 * draw(st.integers(1, 8)) if levels == 3 else 8 * draw(st.integers(1, 16))
        group = draw(
            st.sampled_from([g for g in range(0, head_dim + 1) if g == 0 or head_dim % g == 0])
        )
        return Format(((head_dim, levels),), "scale_min", draw(DTYPES), group)
    if draw(st.integers(0, 4)) == 0:
        return Format(((16 * draw(st.integers(1, 8)), 3),), "scale", draw(DTYPES))
    mixed = st.sampled_from(sorted(set(PLANE_WIDTHS) - {3, RAW}))
    classes = draw(
        st.lists(st.tuples(st.integers(1, 4).map(lambda n: 8 * n), mixed), min_size=1, max_size=4)
    )
    if all(n == 0 for _, n in classes):
        classes.append((8, 4))
    return Format(tuple(classes), "scale", draw(DTYPES))


def param_nbytes(fmt: Format) -> int:
    """Bytes of one token's parameters."""
    groups = fmt.head_dim // fmt.group_size if fmt.group_size else 1
    return {"none": 0, "scale": 1, "scale_min": 2 * groups}[fmt.params] * (
        1 if fmt.param_dtype == "e4m3" else 2
    )


@given(any_format(), st.integers(0, 9), st.integers(0, 2**31))
@settings(deadline=None, max_examples=examples(150))
def test_nbytes_is_the_length_of_what_encode_writes(fmt, rows, seed):
    tokens = 8 * rows
    x = torch.randn(2, tokens, fmt.head_dim, generator=torch.Generator().manual_seed(seed))
    packed = encode(x, fmt)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, fmt.nbytes(tokens))
    decoded = decode(packed, fmt, tokens)
    assert decoded.shape == x.shape
    assert bool(decoded.isfinite().all())


@given(any_format(), st.integers(0, 9))
@settings(deadline=None, max_examples=examples(150))
def test_nbytes_by_counting_bits(fmt, rows):
    if fmt.classes[0][1] == 3:  # words of 16 bits by column: bytes in pairs, then what is left over
        whole, left = divmod(fmt.head_dim // 2, 5)
        count = whole + 1 if left > 2 else whole
        words = count // 2 * rows + (math.ceil(rows / 2) if count % 2 else 0)
        words += math.ceil(rows / 4) if left in (1, 2) else 0
        codes = 32 * words
    else:
        codes = rows * sum(
            channels * (levels - 1).bit_length() for channels, levels in fmt.classes if levels
        )
    assert fmt.nbytes(8 * rows) == codes + 8 * rows * param_nbytes(fmt)
    assert fmt.payload_bits == 8 * fmt.nbytes(32) / (32 * fmt.head_dim)
    if fmt.classes[0][1] != 3:  # the same in pages of any size
        assert fmt.nbytes(8 * rows) * 8 == pytest.approx(
            8 * rows * fmt.head_dim * fmt.payload_bits, abs=1e-6
        )


@pytest.mark.parametrize(
    ("head_dim", "bits"), [(16, 2), (32, 1.75), (64, 1.625), (80, 1.6), (96, 5 / 3), (128, 1.625)]
)
def test_bits_of_a_ternary_code(head_dim, bits):
    """What is left over takes four or eight bits a row and column, and four rows share a word:
    nothing is empty at
    32."""
    fmt = uniform(head_dim, 3)
    assert fmt.payload_bits == pytest.approx(bits + 16 / head_dim)
    assert fmt.nbytes(64) == 2 * fmt.nbytes(32)


@given(any_format())
@settings(deadline=None, max_examples=examples(150))
def test_dict_round_trip(fmt):
    data = fmt.to_dict()
    assert sorted(data) == ["classes", "group_size", "param_dtype", "params"]
    assert all(type(n) is int for pair in data["classes"] for n in pair)
    assert Format.from_dict(data) == fmt


def test_payload_bits_of_known_formats():
    assert raw16(64).payload_bits == 16.0
    assert (
        uniform(128, 4).payload_bits == 2.125
    )  # 32 bytes of codes, scale and minimum of 1 byte each
    assert uniform(128, 4, "fp16", 32).payload_bits == 3.0  # four pairs of 2-byte parameters
    assert uniform(128, 3).payload_bits == 1.625 + 2 / 16
    # 8@4 bits, 24@2 bits, 32@1 bit, 64 not stored, one scale byte
    assert Format(((8, 16), (24, 4), (32, 2), (64, 0))).payload_bits == 8 * (4 + 6 + 4 + 1) / 128


def test_planes_of_a_format_from_the_low_bits_up():
    fmt = Format(((16, 8), (24, 2), (8, 0), (8, 64), (8, 256)), "scale")
    assert [tuple(p) for p in fmt.planes] == [
        (0, 16, 2, 0),
        (0, 16, 1, 2),
        (16, 24, 1, 0),
        (48, 8, 4, 0),
        (48, 8, 2, 4),
        (56, 8, 4, 0),
        (56, 8, 4, 4),
    ]
    assert [p.nbytes(24) for p in fmt.planes] == [24 * n for n in (4, 2, 3, 4, 2, 4, 4)]
    assert fmt.head_dim == 64
    assert [tuple(p) for p in uniform(48, 3).planes] == [(0, 48, 0, 0)]
    assert [tuple(p) for p in raw16(24).planes] == [(0, 24, 16, 0)]


def test_the_parts_of_a_format_start_at_even_bytes():
    for levels in CODED:
        fmt = Format(((16, levels),), "scale")
        assert all(p.nbytes(8) % 2 == 0 for p in fmt.planes)


def test_uniform_of_one_group_is_the_same_format_however_it_is_asked_for():
    assert uniform(64, 4, "e4m3", 64) == uniform(64, 4)
    assert (uniform(64, 4).num_groups, uniform(64, 4, "e4m3", 16).num_groups) == (1, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ((12, 4),)}, "12 channels"),
        ({"classes": ((0, 4),)}, "0 channels"),
        ({"classes": ((-8, 4),)}, "-8 channels"),
        ({"classes": ((8, 5),)}, "5 levels"),
        ({"classes": ((8, 1),)}, "1 levels"),
        ({"classes": ()}, "no channel"),
        ({"classes": ((8, 0), (16, 0))}, "no channel"),
        ({"classes": ((8, 4),), "params": "none"}, "A 16-bit format is one class"),
        ({"classes": ((8, RAW), (8, 2)), "params": "none"}, "A 16-bit format is one class"),
        ({"classes": ((8, RAW), (8, 0)), "params": "none"}, "A 16-bit format is one class"),
        ({"classes": ((8, RAW), (8, 2))}, "A 16-bit format is one class"),
        ({"classes": ((8, RAW),)}, "A 16-bit format is one class"),
        ({"classes": ((16, 3), (16, 2))}, "A ternary format is one class of a multiple of 16"),
        ({"classes": ((16, 0), (16, 3))}, "A ternary format is one class of a multiple of 16"),
        ({"classes": ((24, 3),)}, "A ternary format is one class of a multiple of 16"),
        (
            {"classes": ((24, 3),), "params": "scale_min"},
            "A ternary format is one class of a multiple of 16",
        ),
        ({"classes": ((8, 4), (8, 4)), "params": "scale_min"}, "exactly one class"),
        ({"classes": ((8, RAW),), "params": "scale_min"}, "A 16-bit format is one class"),
        ({"classes": ((16, 4),), "params": "scale", "group_size": 8}, "group_size=8"),
        ({"classes": ((16, RAW),), "params": "none", "group_size": 8}, "group_size=8"),
        (
            {"classes": ((24, 4),), "params": "scale_min", "group_size": 16},
            "does not divide head_dim=24",
        ),
        (
            {"classes": ((24, 4),), "params": "scale_min", "group_size": 48},
            "does not divide head_dim=24",
        ),
    ],
)
def test_parts_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(KvfoldError, match=message) as caught:
        Format(**arguments)
    assert "\n" not in str(caught.value)


def gaussian_mse(step: float, levels: int) -> float:
    """Exact E[(x − Q(x))²] for x ~ N(0, 1) and reconstruction points step·(c − (levels − 1)/2),
    nearest point taken."""
    points = (np.arange(levels) - (levels - 1) / 2) * step
    inner = (points[1:] + points[:-1]) / 2
    density = np.concatenate(([0.0], np.exp(-(inner**2) / 2) / np.sqrt(2 * np.pi), [0.0]))
    mass = np.diff(np.concatenate(([0.0], ndtr(inner), [1.0])))
    first = -np.diff(density)  # ∫ x φ over each cell
    second = mass - np.diff(np.concatenate(([0.0], inner, [0.0])) * density)  # ∫ x² φ
    return float((second - 2 * points * first + points**2 * mass).sum())


@pytest.mark.parametrize("levels", CODED)
def test_constants_are_the_best_uniform_quantiser_of_a_gaussian(levels):
    best = minimize_scalar(
        lambda step: gaussian_mse(step, levels),
        bounds=(1e-3, 3),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert pytest.approx(best.x, rel=1e-3) == GAUSSIAN_STEP[levels]
    assert pytest.approx(best.fun, rel=1e-3) == GAUSSIAN_MSE[levels]


def test_the_written_format_states_the_same_steps():
    rows = [
        line.split("|")[1:-1]
        for line in FORMAT_MD.read_text(encoding="utf-8").splitlines()
        if line.count("|") == 5
    ]
    steps = {int(row[0]): row[3].strip() for row in rows if row[0].strip().isdigit()}
    assert set(steps) == set(PLANE_WIDTHS)
    assert {n: float(step) for n, step in steps.items() if step != "–"} == GAUSSIAN_STEP


def test_constants_of_classes_that_are_not_coded():
    assert GAUSSIAN_MSE[0] == 1.0  # all of the variance is lost
    assert GAUSSIAN_MSE[RAW] == 0.0
    assert set(GAUSSIAN_STEP) == set(CODED)
    assert set(GAUSSIAN_MSE) == set(PLANE_WIDTHS)
