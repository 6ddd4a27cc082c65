"""The reference quantiser: exact codes, error bounds, hard inputs, golden bytes, and an independent slow decoder."""

import struct

import numpy as np
import pytest
import torch

from kvfold.kernels.formats import GAUSSIAN_MSE, GAUSSIAN_STEP, PLANE_WIDTHS, RAW, Format, raw16, uniform
from kvfold.kernels.quantizer import decode, encode, round_trip, to_float16

SCALE = [Format(((64, n),), "scale", t) for n in (2, 3, 4, 8, 16, 32, 64, 256) for t in ("e4m3", "fp16")]
MIXED = [
    Format(((8, 16), (8, 8), (8, 3), (8, 0), (8, RAW))),
    Format(((8, 64), (16, 32), (24, 2), (16, 0)), "scale", "fp16"),
    Format(((8, RAW), (8, 256), (32, 4))),
]
SCALE_MIN = [uniform(64, n, t, g) for n, t, g in ((2, "fp16", 0), (3, "e4m3", 16), (4, "e4m3", 0), (8, "fp16", 8),
                                                  (16, "e4m3", 32), (32, "fp16", 0), (64, "fp16", 64), (256, "fp16", 16))]  # fmt: skip
ALL = [*SCALE, *MIXED, *SCALE_MIN, raw16(24)]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def slow_decode(data: bytes, fmt: Format, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, steps and lowest points, float32 [tokens, head_dim], byte by byte from the written layout alone."""
    dim = fmt.head_dim
    codes, values = np.zeros((tokens, dim), int), np.zeros((tokens, dim), np.float32)
    steps, lowest, at, start = np.zeros_like(values), np.zeros_like(values), 0, 0
    for channels, levels in fmt.classes:
        shift = 0
        for width in {0: [], 3: ["trit"], 8: [2, 1], 32: [4, 1], 64: [4, 2], 256: [8], RAW: ["f2"]}.get(
            levels, [max(levels - 1, 1).bit_length()]
        ):
            size = -(-channels // 5) if width == "trit" else 2 * channels if width == "f2" else channels * width // 8
            for t in range(tokens):
                row = data[at : at + size]
                at += size
                for c in range(channels):
                    if width == "trit":
                        digits = row[c % size] * 243 // 256  # floor undoes the ceiling of the packed byte
                        codes[t, start + c] = digits // 3 ** (4 - c // size) % 3
                    elif width == "f2":
                        values[t, start + c] = struct.unpack_from("<e", row, 2 * c)[0]
                    else:
                        codes[t, start + c] |= (row[c % size] >> c // size * width & (1 << width) - 1) << shift
            shift += width if isinstance(width, int) else 0
        start += channels
    size = 1 if fmt.param_dtype == "e4m3" else 2
    group = fmt.group_size or dim
    for t in range(tokens):
        count = {"none": 0, "scale": 1, "scale_min": 2 * dim // group}[fmt.params]
        row = [data[at + size * i : at + size * (i + 1)] for i in range(count)]
        at += size * count
        params = np.array([e4m3(b[0]) if size == 1 else struct.unpack("<e", b)[0] for b in row], np.float32)
        levels = np.repeat([n for _, n in fmt.classes], [n for n, _ in fmt.classes])
        for c, n in enumerate(levels):
            if n in (0, RAW):
                continue
            if fmt.params == "scale":
                steps[t, c] = params[0] * np.float32(GAUSSIAN_STEP[n])
                lowest[t, c] = -np.float32((n - 1) / 2) * steps[t, c]
                values[t, c] = np.float32(codes[t, c] - (n - 1) / 2) * steps[t, c]
            else:
                lowest[t, c], steps[t, c] = params[2 * (c // group)], params[2 * (c // group) + 1]
                values[t, c] = np.float32(codes[t, c]) * steps[t, c] + lowest[t, c]
    assert at == len(data)
    return values, steps, lowest


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_decode_is_the_slow_decoder_and_every_value_takes_the_nearest_point(fmt):
    tokens = 5
    x = gaussian(2, tokens, fmt.head_dim, seed=3) * torch.tensor([0.05, 1.0, 3.0, 0.4, 9.0])[:, None]
    packed = encode(x, fmt)
    decoded = decode(packed, fmt, tokens)
    levels = np.repeat([n for _, n in fmt.classes], [n for n, _ in fmt.classes])
    coded = np.isin(levels, [0, RAW], invert=True)
    for i in range(2):
        values, steps, lowest = slow_decode(bytes(packed[i].tolist()), fmt, tokens)
        assert np.array_equal(decoded[i].numpy(), values)
        original = x[i].numpy()
        inside = np.clip(original, lowest, lowest + (levels - 1) * steps)  # what lies outside goes to the end point
        assert (np.abs(inside - values) <= steps * (0.5 + 1e-4) + 1e-6)[:, coded].all()
        assert (values[:, levels == 0] == 0).all()
        assert np.array_equal(values[:, levels == RAW], original[:, levels == RAW].astype(np.float16))


@pytest.mark.parametrize(
    ("levels", "dtype"), [*((n, "e4m3") for n in (3, 4, 8, 16, 32, 64, 256)), *((n, "fp16") for n in (3, 16, 64, 256))]
)
def test_scale_grid_points_round_trip_exactly(levels, dtype):
    fmt = Format(((400, levels),), "scale", dtype)
    step = torch.tensor(GAUSSIAN_STEP[levels])

    def grid(codes: torch.Tensor) -> torch.Tensor:
        return (codes - (levels - 1) / 2) * step

    # the encoder finds a grid again only if its own rms is stored as the scale that made it: change codes until it is
    generator = torch.Generator().manual_seed(levels)
    codes = (gaussian(400, seed=levels) / step + levels / 2).floor().clamp(0, levels - 1)
    for _ in range(500):
        other = codes.clone()
        other[torch.randint(400, (1,), generator=generator)] = torch.randint(levels, (1,), generator=generator).float()
        codes = min(codes, other, key=lambda c: abs(float(grid(c).square().mean()) - 1))
    x = torch.stack([grid(codes) * 2.0**e for e in (-3, 0, 4)])
    assert torch.equal(round_trip(x, fmt), x)


@pytest.mark.parametrize("fmt", SCALE_MIN, ids=str)
def test_scale_min_grid_points_round_trip_exactly(fmt):
    levels = fmt.classes[0][1]
    shape = (7, fmt.num_groups, fmt.head_dim // fmt.num_groups)
    codes = torch.randint(levels, shape, generator=torch.Generator().manual_seed(5)).float()
    codes[..., 0], codes[..., -1] = 0, levels - 1  # the ends of the range set minimum and scale
    scale = 2.0 ** torch.randint(-4, 2, shape[:2], generator=torch.Generator().manual_seed(6))
    minimum = torch.randint(-15, 16, shape[:2], generator=torch.Generator().manual_seed(7)) / 8
    x = (minimum[..., None] + scale[..., None] * codes).flatten(-2)
    assert torch.equal(round_trip(x, fmt), x)


def test_golden_bytes_of_a_block_of_mixed_classes():
    fmt = Format(((8, 16), (8, 8), (8, 3), (8, 0), (8, RAW)))
    x = (torch.arange(80) * 37 % 41 - 20).view(2, 40) / 10
    golden = bytes.fromhex(
        "93 8c 7b 6a a4 93 8c 7b "  # 16 levels, two tokens
        "16 19 67 16 "  # 8 levels, low two bits
        "f8 f0 "  # 8 levels, high bit
        "5c 6f 79 5c "  # ternary
        "66 3e cd 3c 66 3a 66 36 00 00 66 b6 66 ba cd bc "  # float16, token 0
        "00 40 66 3e cd 3c 66 3a 66 36 00 00 66 b6 66 ba "  # float16, token 1
        "3a 3a "  # scales, e4m3: 1.25 and 1.25
    )
    assert fmt.nbytes(2) == len(golden) == 2 * (4 + 3 + 2 + 16 + 1)
    assert bytes(encode(x, fmt).tolist()).hex(" ") == golden.hex(" ")
    assert np.array_equal(decode(torch.tensor(list(golden), dtype=torch.uint8), fmt, 2), slow_decode(golden, fmt, 2)[0])


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_rows_of_zeros_stay_zero(fmt):
    x = gaussian(4, fmt.head_dim)
    x[1] = 0
    assert bool((round_trip(x, fmt)[1] == 0).all())


@pytest.mark.parametrize("fmt", SCALE_MIN, ids=str)
def test_constant_rows_keep_their_rounded_value(fmt):
    x = torch.tensor([0.3, -7.0, 1.0])[:, None].expand(-1, fmt.head_dim)
    stored = x.to(torch.float8_e4m3fn if fmt.param_dtype == "e4m3" else torch.float16).float()
    assert torch.equal(round_trip(x, fmt), stored)


@pytest.mark.parametrize("fmt", ALL, ids=str)
@pytest.mark.parametrize("size", [65504.0, 1e30])
def test_huge_values_saturate_and_keep_their_sign(fmt, size):
    x = gaussian(4, fmt.head_dim).sign() * size
    decoded = round_trip(x, fmt)
    assert bool(decoded.isfinite().all())
    assert bool((decoded.abs() <= 1.6 * 256 * 65504).all())
    if fmt.params != "scale_min":
        stored = torch.tensor([n > 0 for channels, n in fmt.classes for _ in range(channels)])
        zero = torch.tensor([n == 3 for channels, n in fmt.classes for _ in range(channels)])
        assert torch.equal(decoded.sign()[:, stored & ~zero], x.sign()[:, stored & ~zero])


def test_float16_saturates_and_raw_channels_are_exact():
    assert to_float16(torch.tensor([1e9, -1e9, 65504.0, 0.1])).tolist() == [65504, -65504, 65504, 0.0999755859375]
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = bits[bits.isfinite()][: 63488 // 16 * 16].view(-1, 16)
    assert torch.equal(round_trip(finite, raw16(16)), finite.float())


@pytest.mark.parametrize("fmt", [uniform(16, 4, "fp16"), uniform(16, 16, "fp16", 8)], ids=str)
def test_clip_narrows_the_range_of_each_head(fmt):
    x = gaussian(3, 6, 16)  # heads, tokens, channels
    clip = torch.tensor([0.5, 1.0, 0.75])
    packed = encode(x, fmt, clip[:, None, None])
    grouped = x.unflatten(-1, (fmt.num_groups, -1))
    low, high = grouped.amin(-1) * clip[:, None, None], grouped.amax(-1) * clip[:, None, None]
    for head in range(3):
        _, steps, lowest = slow_decode(bytes(packed[head].tolist()), fmt, 6)
        group = 16 // fmt.num_groups
        assert np.array_equal(lowest[:, ::group], low[head].half().float())
        assert np.array_equal(steps[:, ::group], ((high - low)[head] / (fmt.classes[0][1] - 1)).half().float())
    assert torch.equal(packed[1], encode(x[1], fmt))


@pytest.mark.parametrize("fmt", [f for f in SCALE if f.classes[0][1] < 64 or f.param_dtype == "fp16"], ids=str)
def test_error_on_gaussian_channels_is_the_one_that_the_search_predicts(fmt):
    wide = Format(((512, fmt.classes[0][1]),), "scale", fmt.param_dtype)  # so wide that a token's rms is near 1
    x = gaussian(400, 512, seed=9)
    error = float((round_trip(x, wide) - x).square().mean())
    assert error == pytest.approx(GAUSSIAN_MSE[fmt.classes[0][1]], rel=0.15)


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_layout_of_the_input_does_not_matter(fmt):
    x = gaussian(fmt.head_dim, 3, 2).permute(2, 1, 0).half()  # [2, 3, head_dim], channels not adjacent
    packed = encode(x, fmt)
    assert torch.equal(packed, encode(x.float().contiguous(), fmt))
    assert torch.equal(packed[0], encode(x[0], fmt))  # blocks do not see each other
    assert torch.equal(decode(packed, fmt, 3)[1], decode(torch.stack((packed[1], packed[0])), fmt, 3)[0])


@pytest.mark.parametrize(
    ("fmt", "tokens", "lead"),
    [
        (Format(((8, 2),), "scale_min", "fp16"), 3, 0),  # parameters behind 3 bytes of codes
        (Format(((8, 2), (8, RAW))), 1, 0),  # raw channels behind 1 byte
        (raw16(8), 2, 1),  # the block itself starts at an odd byte
    ],
)
def test_a_single_block_with_float16_at_an_odd_address(fmt, tokens, lead):
    x = gaussian(tokens, fmt.head_dim)
    data = torch.cat((torch.zeros(lead, dtype=torch.uint8), encode(x, fmt)))[lead:]
    values, _, _ = slow_decode(bytes(data.tolist()), fmt, tokens)
    assert np.array_equal(decode(data, fmt, tokens).numpy(), values)


def test_small_rows_with_a_float16_scale():
    fmt = Format(((128, 16),), "scale", "fp16")
    x = gaussian(100, 128) * 2.0**-12
    error = float((round_trip(x, fmt) - x).square().mean()) * 2.0**24
    assert error == pytest.approx(GAUSSIAN_MSE[16], rel=0.15)


def test_every_number_of_levels_is_tried_above():
    assert {n for fmt in ALL for _, n in fmt.classes} == set(PLANE_WIDTHS)
