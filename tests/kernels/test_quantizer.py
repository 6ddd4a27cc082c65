"""The reference quantiser: exact codes, error bounds, hard inputs, golden bytes, and an independent
slow decoder."""

import itertools
import struct

import numpy as np
import pytest
import torch

from kvfold.kernels.formats import Format, raw16, uniform
from kvfold.kernels.kinds.levels import GAUSSIAN_MSE, GAUSSIAN_STEP, PLANE_WIDTHS, RAW
from kvfold.kernels.kinds.symmetric import FACTORS
from kvfold.kernels.quantizer import decode, encode, round_trip, to_float16

SCALE = [
    Format(((64, n),), "scale", t) for n in (2, 3, 4, 8, 16, 32, 64, 256) for t in ("e4m3", "fp16")
]
MIXED = [
    Format(((8, 16), (8, 8), (8, 2), (8, 0), (8, 4))),
    Format(((8, 64), (16, 32), (24, 2), (16, 0)), "scale", "fp16"),
    Format(((8, 0), (8, 256), (32, 4))),
]
SCALE_MIN = [uniform(64, n, t, g) for n, t, g in ((2, "fp16", 0), (3, "e4m3", 16), (4, "e4m3", 0), (8, "fp16", 8),
                                                  (16, "e4m3", 32), (32, "fp16", 0), (64, "fp16", 64),
                                                  (256, "fp16", 16))]  # fmt: skip
TERNARY = [uniform(n, 3) for n in (16, 32, 80, 96, 128)]  # every number of codes left over
ALL = [*SCALE, *MIXED, *SCALE_MIN, *TERNARY, raw16(24)]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def slow_code(plane: bytes, width: int | str, tokens: int, n: int, token: int, channel: int) -> int:
    """One code of a plane of n channels, read from the written layout alone."""
    rows = tokens // 8
    field, row = divmod(token, rows)

    def word(i: int) -> int:
        return plane[2 * i] + 256 * plane[2 * i + 1]

    if width == 1:
        return word(row * (n // 2) + channel % (n // 2)) >> 2 * field + channel // (n // 2) & 1
    if width == 2:
        return word(row * n + channel) >> 2 * field & 3
    if width == 4:
        return word((field // 4 * rows + row) * n + channel) >> (0, 8, 4, 12)[field % 4] & 15
    tile, column = divmod(channel, 16)
    (i, digit), (whole, left) = divmod(8 * tile + field, 5), divmod(n // 2, 5)
    count = whole + (left > 2)
    if i == count:  # four bits, behind all bytes
        start = 16 * (count // 2 * rows + count % 2 * ((rows + 1) // 2))
        return word(start + row // 4 * 16 + column) >> 4 * (row % 4) + 2 * digit & 3
    if i < count // 2 * 2:
        byte = word((i // 2 * rows + row) * 16 + column) >> 8 * (i % 2) & 255
    else:
        byte = word((count // 2 * rows + row // 2) * 16 + column) >> 8 * (row % 2) & 255
    if i == whole:
        return byte >> 2 * digit & 3
    return byte * 243 // 256 // 3 ** (4 - digit) % 3  # floor undoes the ceiling of the packed byte


def slow_decode(data: bytes, fmt: Format, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, steps and lowest points, float32 [tokens, head_dim], byte by byte from the written
    layout alone."""
    dim, rows = fmt.head_dim, tokens // 8
    codes, values = np.zeros((tokens, dim), int), np.zeros((tokens, dim), np.float32)
    steps, lowest, at, start = np.zeros_like(values), np.zeros_like(values), 0, 0
    for channels, levels in fmt.classes:
        shift = 0
        for width in {
            0: [],
            3: ["trit"],
            8: [2, 1],
            32: [4, 1],
            64: [4, 2],
            256: [4, 4],
            RAW: ["f2"],
        }.get(levels, [max(levels - 1, 1).bit_length()]):
            for t, c in itertools.product(range(tokens), range(channels)):
                if width == "f2":
                    values[t, c] = struct.unpack_from("<e", data, 2 * (t * channels + c))[0]
                else:
                    codes[t, start + c] |= (
                        slow_code(data[at:], width, tokens, channels, t, c) << shift
                    )
            if width == "trit":
                count, left = (
                    (channels // 2 + 2) // 5,
                    channels // 2 % 5,
                )  # three or four left over take a byte too
                at += 32 * (
                    count // 2 * rows + count % 2 * -(-rows // 2) + (left in (1, 2)) * -(-rows // 4)
                )
            else:
                at += 2 * tokens * channels if width == "f2" else tokens * channels * width // 8
                shift += width if isinstance(width, int) else 0
        start += channels
    size = 1 if fmt.param_dtype == "e4m3" else 2
    group = fmt.group_size or dim
    count = {"none": 0, "scale": 1, "scale_min": 2 * dim // group}[fmt.params]
    for t in range(tokens):
        place = (
            t % rows * 8 + t // rows
        )  # in the order of words: the eight tokens of row 0, of row 1, …
        row = [data[at + size * (i * tokens + place) :][:size] for i in range(count)]
        params = np.array(
            [e4m3(b[0]) if size == 1 else struct.unpack("<e", b)[0] for b in row], np.float32
        )
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
    assert at + size * count * tokens == len(data)
    return values, steps, lowest


@pytest.mark.parametrize("tokens", [8, 24, 32])
@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_decode_is_the_slow_decoder_and_every_value_takes_the_nearest_point(fmt, tokens):
    size = torch.tensor([0.05, 1.0, 3.0, 0.4, 9.0]).repeat(7)[:tokens]
    x = gaussian(2, tokens, fmt.head_dim, seed=3) * size[:, None]
    packed = encode(x, fmt)
    decoded = decode(packed, fmt, tokens)
    levels = np.repeat([n for _, n in fmt.classes], [n for n, _ in fmt.classes])
    coded = np.isin(levels, [0, RAW], invert=True)
    for i in range(2):
        values, steps, lowest = slow_decode(bytes(packed[i].tolist()), fmt, tokens)
        assert np.array_equal(decoded[i].numpy(), values)
        original = x[i].numpy()
        inside = np.clip(
            original, lowest, lowest + (levels - 1) * steps
        )  # what lies outside goes to the end point
        assert (np.abs(inside - values) <= steps * (0.5 + 1e-4) + 1e-6)[:, coded].all()
        assert (values[:, levels == 0] == 0).all()
        assert np.array_equal(
            values[:, levels == RAW], original[:, levels == RAW].astype(np.float16)
        )


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_round_trip_at_any_length_and_no_token_sees_another(fmt):
    x = gaussian(2, 40, fmt.head_dim, seed=4)
    whole = decode(encode(x, fmt), fmt, 40)
    for tokens in (1, 7, 8, 37, 40):
        assert torch.equal(round_trip(x[:, :tokens], fmt), whole[:, :tokens])
    assert torch.equal(round_trip(x.flip(1), fmt), whole.flip(1))
    assert round_trip(x[:, :0], fmt).shape == (2, 0, fmt.head_dim)
    assert round_trip(x[:0], fmt).shape == (0, 40, fmt.head_dim)


@pytest.mark.parametrize("fmt", ALL, ids=str)
@pytest.mark.parametrize("tokens", [8, 24, 32])
def test_parameters_stand_in_the_order_of_words(fmt, tokens):
    if fmt.params == "none":
        assert encode(gaussian(tokens, fmt.head_dim), fmt).shape == (2 * tokens * fmt.head_dim,)
        return
    rows, groups, e4m3_type = tokens // 8, fmt.num_groups, fmt.param_dtype == "e4m3"
    x = gaussian(tokens, fmt.head_dim, seed=6) * 4.0 ** (torch.arange(tokens) % 5 - 2)[:, None]
    data = encode(x, fmt)[-tokens * fmt.num_params * fmt.param_nbytes :]
    stored = (
        data.clone()
        .view(torch.float8_e4m3fn if e4m3_type else torch.float16)
        .float()
        .view(fmt.num_params, tokens)
    )
    order = [f * rows + r for r in range(rows) for f in range(8)]
    if fmt.params == "scale":
        scales = tried_scales(x, fmt)[:, order]
        assert bool((stored == scales).any(0).all())
        return
    low, high = x.unflatten(-1, (groups, -1)).aminmax(dim=-1)  # [tokens, groups]
    pair = torch.stack((low, (high - low) / (fmt.classes[0][1] - 1)), -1)
    expected = pair.flatten(1).T  # minimum and scale of group 0, of group 1, …
    rounded = expected[:, order].to(torch.float8_e4m3fn if e4m3_type else torch.float16).float()
    assert torch.equal(stored, rounded)


def tried_scales(x, fmt) -> torch.Tensor:
    """Of tokens [n, head_dim], the scales that symmetric codes may have: [len(FACTORS), n]."""
    coded = torch.tensor([n > 0 for channels, n in fmt.classes for _ in range(channels)])
    dtype = torch.float8_e4m3fn if fmt.param_dtype == "e4m3" else torch.float16
    root = x[:, coded].square().mean(-1).sqrt().to(dtype).float()
    return torch.stack([(root * factor).to(dtype).float() for factor in FACTORS])


def hard_tokens(dim: int) -> torch.Tensor:
    """Gaussian tokens, and some of which one channel or a few stand far off, or most are small."""
    x = gaussian(64, dim, seed=11)
    x[8:24, 3] *= 12
    x[24:40, :3] += 5
    x[40:48, dim // 2 :] *= 0.02
    return x


@pytest.mark.parametrize("fmt", [*SCALE, *MIXED], ids=str)
def test_the_scale_is_the_one_of_the_least_cost(fmt):
    """The definition in float64, where sums are of whole numbers in the product."""
    x = hard_tokens(fmt.head_dim)
    each = [n for channels, n in fmt.classes for _ in range(channels)]
    levels = torch.tensor(each).double()
    weight = torch.tensor([1 / GAUSSIAN_MSE[n] if n else 0.0 for n in each]).double()
    step = torch.tensor([GAUSSIAN_STEP.get(n, 1.0) for n in each]).double()

    def cost(back):
        d, y = back - x.double(), x.double()
        along = (weight * d * y).sum(-1).square() / (weight * y * y).sum(-1)
        return (weight * d * d).sum(-1) + 4 * along

    costs = []
    for scale in tried_scales(x, fmt).double():
        u = (x / (scale[:, None] * step) + levels / 2).floor()
        code = torch.minimum(u.clamp_min(0), (levels - 1).clamp_min(0))
        points = (code - (levels - 1) / 2) * step * scale[:, None]
        costs.append(cost(torch.where(levels > 0, points, 0)))
    least = torch.stack(costs).amin(0)
    got = cost(round_trip(x, fmt).double())
    slack = len(each) / 16  # one unit of the whole numbers a channel
    assert bool((got <= 1.01 * least + 2 * slack).all())
    assert bool((got < 0.8 * costs[0]).any())  # than with the root mean square itself


@pytest.mark.parametrize("levels", [2, 3, 4, 8])
def test_codes_shrink_little(levels):
    """What many tokens have in common comes back nearly whole; the best scale for one token alone
    would take off the quantiser's whole error, GAUSSIAN_MSE."""
    x = gaussian(400, 512, seed=9)
    back = round_trip(x, Format(((512, levels),), "scale", "fp16"))
    assert abs(float((x * back).sum() / (x * x).sum()) - 1) < 0.6 * GAUSSIAN_MSE[levels]


@pytest.mark.parametrize(
    ("levels", "dtype"),
    [*((n, "e4m3") for n in (3, 4, 8, 16, 32, 64, 256)), *((n, "fp16") for n in (3, 16, 64, 256))],
)
def test_scale_grid_points_round_trip_exactly(levels, dtype):
    fmt = Format(((400, levels),), "scale", dtype)
    step = torch.tensor(GAUSSIAN_STEP[levels])

    def grid(codes: torch.Tensor) -> torch.Tensor:
        return (codes - (levels - 1) / 2) * step

    # the encoder finds a grid again only if its own rms is stored as the scale that made it: change
    # codes until it is
    generator = torch.Generator().manual_seed(levels)
    codes = (gaussian(400, seed=levels) / step + levels / 2).floor().clamp(0, levels - 1)
    for _ in range(500):
        other = codes.clone()
        other[torch.randint(400, (1,), generator=generator)] = torch.randint(
            levels, (1,), generator=generator
        ).float()
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


def test_golden_bytes_of_a_page_of_two_rows():
    """16 tokens, so token 2f + r is field f of row r; codes (j + f) mod 4 in row 0, 3 − (j + f) mod
    4 in row 1."""
    fmt = uniform(8, 4, "fp16")
    t, j = torch.arange(16)[:, None], torch.arange(8)
    codes = (j + t // 2) % 4
    codes = torch.where(t % 2 == 0, codes, 3 - codes)
    x = t + torch.where(t % 2 == 0, 1.0, 0.5) * codes  # minimum t; scale 1 in row 0, 1/2 in row 1
    golden = bytes.fromhex(
        # row 0: fields of channel 0 are 0, 1, 2, 3, 0, 1, 2, 3
        "e4e4 3939 4e4e 9393 e4e4 3939 4e4e 9393 "
        "1b1b c6c6 b1b1 6c6c 1b1b c6c6 b1b1 6c6c "  # row 1: 3, 2, 1, 0, …
        "0000 0040 0044 0046 0048 0049 004a 004b "  # minima 0, 2, 4, …, 14
        "003c 0042 0045 0047 8048 8049 804a 804b "  # 1, 3, 5, …, 15
        "003c 003c 003c 003c 003c 003c 003c 003c "  # scales of the even tokens
        "0038 0038 0038 0038 0038 0038 0038 0038 "  # and of the odd ones
    )
    assert fmt.nbytes(16) == len(golden) == 96
    assert bytes(encode(x, fmt).tolist()).hex(" ", 2) == golden.hex(" ", 2)
    assert torch.equal(decode(torch.tensor(list(golden), dtype=torch.uint8), fmt, 16), x)


def test_golden_bytes_of_a_page_of_mixed_classes():
    fmt = Format(((8, 16), (8, 8), (8, 0), (8, 2)))
    x = (torch.arange(256) * 37 % 41 - 20).view(8, 32) / 10
    golden = bytes.fromhex(
        "b29d ac8c 8b7a 7a69 6958 5846 4735 26c3 "  # 16 levels: fields 0, 2, 1, 3 of each channel
        "5836 4725 26d4 d5c3 c4b2 b3ac ac8b 9b7a "  # 16 levels: fields 4, 6, 5, 7
        "b2c1 61b0 2d6c 1a5b c6db c186 b0a6 ac69 "  # 8 levels, low two bits
        "7a95 7a85 5ea1 57a8 "  # 8 levels, high bit: channels 8 and 12 in a word, and so on
        "857a a15e a857 aa57 "  # 2 levels: channels 24 and 28 in a word, and so on
        "3936 383a 3a39 3838 "  # scales, e4m3
    )
    assert fmt.nbytes(8) == len(golden) == 8 * (4 + 3 + 1 + 1)
    assert bytes(encode(x, fmt).tolist()).hex(" ", 2) == golden.hex(" ", 2)
    assert np.array_equal(
        decode(torch.tensor(list(golden), dtype=torch.uint8), fmt, 8),
        slow_decode(golden, fmt, 8)[0],
    )


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
    assert to_float16(torch.tensor([1e9, -1e9, 65504.0, 0.1])).tolist() == [
        65504,
        -65504,
        65504,
        0.0999755859375,
    ]
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = bits[bits.isfinite()][: 63488 // 16 * 16].view(-1, 16)
    assert torch.equal(round_trip(finite, raw16(16)), finite.float())


@pytest.mark.parametrize("fmt", [uniform(16, 4, "fp16"), uniform(16, 16, "fp16", 8)], ids=str)
def test_clip_narrows_the_range_of_each_head(fmt):
    x = gaussian(3, 24, 16)  # heads, tokens, channels
    clip = torch.tensor([0.5, 1.0, 0.75])
    packed = encode(x, fmt, clip[:, None, None])
    grouped = x.unflatten(-1, (fmt.num_groups, -1))
    low, high = grouped.amin(-1) * clip[:, None, None], grouped.amax(-1) * clip[:, None, None]
    for head in range(3):
        _, steps, lowest = slow_decode(bytes(packed[head].tolist()), fmt, 24)
        group = 16 // fmt.num_groups
        assert np.array_equal(lowest[:, ::group], low[head].half().float())
        assert np.array_equal(
            steps[:, ::group], ((high - low)[head] / (fmt.classes[0][1] - 1)).half().float()
        )
    assert torch.equal(packed[1], encode(x[1], fmt))


# error over GAUSSIAN_MSE of tokens of 512 channels, by levels
OF_THE_BEST_STEPS = {
    2: 1.41,
    3: 1.14,
    4: 1.10,
    8: 1.015,
    16: 0.976,
    32: 0.923,
    64: 0.846,
    256: 0.684,
}


@pytest.mark.parametrize(
    "fmt", [f for f in SCALE if f.classes[0][1] < 64 or f.param_dtype == "fp16"], ids=str
)
def test_error_on_gaussian_channels_is_about_that_of_the_best_step(fmt):
    """Less where a scale of its own spares a token's largest channels, more where codes shrink
    less than the best step makes them."""
    wide = Format(
        ((512, fmt.classes[0][1]),), "scale", fmt.param_dtype
    )  # so wide that a token's rms is near 1
    x = gaussian(400, 512, seed=9)
    error = float((round_trip(x, wide) - x).square().mean())
    levels = fmt.classes[0][1]
    assert error / GAUSSIAN_MSE[levels] == pytest.approx(OF_THE_BEST_STEPS[levels], rel=0.06)


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_layout_of_the_input_does_not_matter(fmt):
    x = (
        gaussian(fmt.head_dim, 24, 2).permute(2, 1, 0).half()
    )  # [2, 24, head_dim], channels not adjacent
    packed = encode(x, fmt)
    assert torch.equal(packed, encode(x.float().contiguous(), fmt))
    assert torch.equal(packed[0], encode(x[0], fmt))  # pages do not see each other
    assert torch.equal(
        decode(packed, fmt, 24)[1], decode(torch.stack((packed[1], packed[0])), fmt, 24)[0]
    )
    assert torch.equal(decode(packed.T.contiguous().T, fmt, 24), decode(packed, fmt, 24))


@pytest.mark.parametrize("lead", [1, 2, 3])
@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_a_page_at_any_address(fmt, lead):
    packed = encode(gaussian(8, fmt.head_dim), fmt)
    data = torch.cat((torch.zeros(lead, dtype=torch.uint8), packed))[lead:]
    before = data.clone()
    assert torch.equal(decode(data, fmt, 8), decode(packed, fmt, 8))
    assert torch.equal(data, before)  # decoding writes nothing into the page


def test_small_rows_with_a_float16_scale():
    fmt = Format(((128, 16),), "scale", "fp16")
    x = gaussian(100, 128) * 2.0**-12
    error = float((round_trip(x, fmt) - x).square().mean()) * 2.0**24
    assert error == pytest.approx(GAUSSIAN_MSE[16], rel=0.15)


def test_every_number_of_levels_is_tried_above():
    assert {n for fmt in ALL for _, n in fmt.classes} == set(PLANE_WIDTHS)
