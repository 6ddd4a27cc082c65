"""Formats: sizes, rules, JSON round trip, and the constants of the Gaussian quantiser."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import ndtr

from kvfold.errors import KvfoldError
from kvfold.kernels.formats import GAUSSIAN_MSE, GAUSSIAN_STEP, PLANE_WIDTHS, RAW, Format, raw16, uniform
from kvfold.kernels.quantizer import decode, encode

FORMAT_MD = Path(__file__).parents[1] / "exports" / "FORMAT.md"
CODED = sorted(set(PLANE_WIDTHS) - {0, RAW})
DTYPES = st.sampled_from(("e4m3", "fp16"))


@st.composite
def any_format(draw) -> Format:
    """Any valid format of up to 128 channels."""
    if draw(st.booleans()):
        head_dim = 8 * draw(st.integers(1, 16))
        group = draw(st.sampled_from([g for g in range(0, head_dim + 1) if g == 0 or head_dim % g == 0]))
        return Format(((head_dim, draw(st.sampled_from(CODED))),), "scale_min", draw(DTYPES), group)
    params = draw(st.sampled_from(("none", "scale")))
    levels = st.sampled_from((0, RAW) if params == "none" else sorted(PLANE_WIDTHS))
    classes = draw(st.lists(st.tuples(st.integers(1, 4).map(lambda n: 8 * n), levels), min_size=1, max_size=4))
    if all(n == 0 for _, n in classes):
        classes.append((8, RAW))
    return Format(tuple(classes), params, draw(DTYPES))


@given(any_format(), st.integers(1, 70), st.integers(0, 2**31))
@settings(deadline=None, max_examples=150)
def test_nbytes_is_the_length_of_what_encode_writes(fmt, tokens, seed):
    x = torch.randn(2, tokens, fmt.head_dim, generator=torch.Generator().manual_seed(seed))
    packed = encode(x, fmt)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, fmt.nbytes(tokens))
    decoded = decode(packed, fmt, tokens)
    assert decoded.shape == x.shape
    assert bool(decoded.isfinite().all())


@given(any_format(), st.integers(0, 70))
@settings(deadline=None, max_examples=150)
def test_nbytes_by_counting_bits(fmt, tokens):
    row = 0
    for channels, levels in fmt.classes:
        row += math.ceil(channels / 5) if levels == 3 else channels * (levels - 1).bit_length() // 8 if levels else 0
    groups = fmt.head_dim // fmt.group_size if fmt.group_size else 1
    params = {"none": 0, "scale": 1, "scale_min": 2 * groups}[fmt.params] * (1 if fmt.param_dtype == "e4m3" else 2)
    assert fmt.nbytes(tokens) == tokens * (row + params)
    assert fmt.payload_bits == 8 * (row + params) / fmt.head_dim


@given(any_format())
@settings(deadline=None, max_examples=150)
def test_dict_round_trip(fmt):
    data = fmt.to_dict()
    assert sorted(data) == ["classes", "group_size", "param_dtype", "params"]
    assert all(type(n) is int for pair in data["classes"] for n in pair)
    assert Format.from_dict(data) == fmt


def test_payload_bits_of_known_formats():
    assert raw16(64).payload_bits == 16.0
    assert uniform(128, 4).payload_bits == 2.125  # 32 bytes of codes, scale and minimum of 1 byte each
    assert uniform(128, 4, "fp16", 32).payload_bits == 3.0  # four pairs of 2-byte parameters
    assert uniform(128, 3).payload_bits == 8 * 28 / 128
    # 8@4 bits, 24@2 bits, 32@1 bit, 64 not stored, one scale byte
    assert Format(((8, 16), (24, 4), (32, 2), (64, 0))).payload_bits == 8 * (4 + 6 + 4 + 1) / 128


def test_planes_of_a_format_from_the_low_bits_up():
    fmt = Format(((16, 8), (24, 3), (8, 64), (8, RAW)), "scale")
    assert [tuple(p) for p in fmt.planes] == [
        (0, 16, 2, 0, 4),
        (0, 16, 1, 2, 2),
        (16, 24, 0, 0, 5),
        (40, 8, 4, 0, 4),
        (40, 8, 2, 4, 2),
        (48, 8, 16, 0, 16),
    ]
    assert fmt.head_dim == 56


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
        ({"classes": ((8, 4),), "params": "none"}, "only hold 16-bit"),
        ({"classes": ((8, RAW), (8, 2)), "params": "none"}, "only hold 16-bit"),
        ({"classes": ((8, 4), (8, 4)), "params": "scale_min"}, "exactly one class"),
        ({"classes": ((8, RAW),), "params": "scale_min"}, "exactly one class"),
        ({"classes": ((16, 4),), "params": "scale", "group_size": 8}, "group_size=8"),
        ({"classes": ((16, RAW),), "params": "none", "group_size": 8}, "group_size=8"),
        ({"classes": ((24, 4),), "params": "scale_min", "group_size": 16}, "does not divide head_dim=24"),
        ({"classes": ((24, 4),), "params": "scale_min", "group_size": 48}, "does not divide head_dim=24"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(KvfoldError, match=message) as caught:
        Format(**arguments)
    assert "\n" not in str(caught.value)


def gaussian_mse(step: float, levels: int) -> float:
    """Exact E[(x − Q(x))²] for x ~ N(0, 1) and reconstruction points step·(c − (levels − 1)/2), nearest point taken."""
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
        lambda step: gaussian_mse(step, levels), bounds=(1e-3, 3), method="bounded", options={"xatol": 1e-9}
    )
    assert pytest.approx(best.x, rel=1e-3) == GAUSSIAN_STEP[levels]
    assert pytest.approx(best.fun, rel=1e-3) == GAUSSIAN_MSE[levels]


def test_the_written_format_states_the_same_steps():
    rows = [
        line.split("|")[1:-1] for line in FORMAT_MD.read_text(encoding="utf-8").splitlines() if line.count("|") == 5
    ]
    steps = {int(row[0]): row[3].strip() for row in rows if row[0].strip().isdigit()}
    assert set(steps) == set(PLANE_WIDTHS)
    assert {n: float(step) for n, step in steps.items() if step != "–"} == GAUSSIAN_STEP


def test_constants_of_classes_that_are_not_coded():
    assert GAUSSIAN_MSE[0] == 1.0  # all of the variance is lost
    assert GAUSSIAN_MSE[RAW] == 0.0
    assert set(GAUSSIAN_STEP) == set(CODED)
    assert set(GAUSSIAN_MSE) == set(PLANE_WIDTHS)
