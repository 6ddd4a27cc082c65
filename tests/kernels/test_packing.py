"""Bit packing: the layout drawn in kernels/kinds/bits.py and trits.py, byte for byte, and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.kernels.kinds.bits import pack_plane, plane_nbytes, unpack_plane
from kvfold.kernels.kinds.trits import pack_trits, trit_nbytes, unpack_trits

WIDTHS = (1, 2, 4)
TRIT_DIMS = (
    16,
    32,
    48,
    64,
    80,
    96,
    128,
)  # 8, 16, 24, … codes a row and column: 3, 1, 4, 2, 0, 3 and 4 left over

# width (0: ternary), tokens, channels; then token, channel, code → the one byte that isn't zero,
# and what it holds
GOLDEN_CODES = [
    (2, 8, 8, 0, 0, 3, 0, 0x03),  # field 0 of word 0
    (2, 24, 16, 13, 5, 3, 43, 0x03),  # R = 3: field 4 of row 1, word 16 + 5, bit 8
    (2, 32, 64, 31, 63, 2, 511, 0x80),  # the last field of the last word
    (1, 8, 16, 7, 13, 1, 11, 0x80),  # field 7 of channel 5 + 8: bit 15 of word 5
    (1, 32, 8, 9, 2, 1, 12, 0x10),  # R = 4: field 2 of row 1, word 4 + 2, bit 4
    (1, 24, 8, 2, 6, 1, 20, 0x02),  # R = 3: field 0 of row 2, channel 2 + 4: bit 1 of word 8 + 2
    (4, 24, 8, 3, 0, 9, 1, 0x09),  # field 1 is the third of a word
    (4, 24, 8, 6, 7, 5, 14, 0x50),  # field 2 is the second
    (4, 24, 8, 22, 6, 13, 77, 0xD0),  # field 7 of row 1: the last of word (3 + 1)·8 + 6
    (4, 8, 16, 4, 15, 15, 62, 0x0F),  # field 4: the first of the second row of words
    # 16 channels: five codes in byte 0, fields 5 to 7 in byte 1, two bits each
    (0, 8, 16, 0, 3, 2, 6, 171),  # ceil(256 · 2 · 81 / 243)
    (0, 8, 16, 4, 3, 1, 6, 2),  # ceil(256 / 243)
    (0, 8, 16, 6, 3, 2, 7, 0x08),
    (0, 24, 16, 22, 15, 1, 63, 0x10),  # R = 3: field 7 of row 1
    # 32 channels, R = 3: bytes 0 and 1 in 96 bytes, byte 2 in 64, number 15 in 32
    (
        0,
        24,
        32,
        15,
        0,
        1,
        1,
        171 // 2 + 1,
    ),  # field 5 of row 0: number 5, digit 0 of byte 1: ceil(256 · 81 / 243) = 86
    (
        0,
        24,
        32,
        10,
        20,
        1,
        105,
        29,
    ),  # field 3 of row 1 in tile 1: number 11, digit 1 of byte 2: ceil(256 · 27 / 243)
    (0, 24, 32, 11, 20, 1, 136, 29),  # the same of row 2
    (0, 24, 32, 23, 31, 2, 191, 0x02),  # field 7 of row 2: number 15
    # 64 channels, R = 4: six bytes in 384, numbers 30 and 31 in 32
    (0, 32, 64, 31, 57, 1, 403, 0x40),  # field 7 of row 3 in tile 3, column 9
    (0, 32, 64, 25, 57, 2, 402, 0x20),  # field 6 of row 1
    (0, 8, 64, 7, 48, 1, 96, 0x04),  # R = 1: field 7, the other three rows of the word empty
    # 96 channels: ten bytes, numbers 45, 46, 47 in the last
    (0, 8, 96, 5, 80, 1, 129, 0x01),
    # 128 channels, R = 3: twelve bytes in 576, numbers 60 to 63 in a byte of two rows a word
    (0, 24, 128, 23, 113, 2, 610, 0x80),
    # 80 channels: eight bytes, nothing left over
    (0, 8, 80, 7, 79, 2, 127, 3),  # number 39: digit 4 of byte 7: ceil(256 · 2 / 243)
]


def pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    return pack_plane(codes, width) if width else pack_trits(codes)


def unpack(packed: torch.Tensor, width: int, tokens: int, channels: int) -> torch.Tensor:
    return (
        unpack_plane(packed, width, tokens, channels)
        if width
        else unpack_trits(packed, tokens, channels)
    )


def slow_pack(codes: np.ndarray, width: int) -> bytes:
    """The drawing as loops over tokens and channels, for one page [P, n]."""
    tokens, n = codes.shape
    rows = tokens // 8
    words = [0] * (tokens * n * width // 16)
    for token in range(tokens):
        field, row = divmod(token, rows)
        for channel in range(n):
            code = int(codes[token, channel])
            if width == 2:
                words[row * n + channel] |= code << 2 * field
            elif width == 1:
                words[row * (n // 2) + channel % (n // 2)] |= code << 2 * field + (
                    channel >= n // 2
                )
            else:
                line = row if field < 4 else rows + row
                words[line * n + channel] |= code << 4 * [0, 2, 1, 3].index(field % 4)
    return b"".join(word.to_bytes(2, "little") for word in words)


def slow_pack_trits(codes: np.ndarray) -> bytes:
    tokens, n = codes.shape
    rows = tokens // 8
    whole, left = n // 2 // 5, n // 2 % 5
    columns: dict[tuple[int, int], list[int]] = {}  # bytes of row and column
    nibbles = {}
    for row in range(rows):
        for u in range(16):
            numbered = [
                int(codes[f * rows + row, t * 16 + u]) for t in range(n // 16) for f in range(8)
            ]
            values = [
                sum(c * 3 ** (4 - k) for k, c in enumerate(numbered[5 * i : 5 * i + 5]))
                for i in range(whole)
            ]
            rest = sum(c << 2 * j for j, c in enumerate(numbered[5 * whole :]))
            columns[row, u] = [-(-256 * v // 243) for v in values] + [rest] * (left > 2)
            nibbles[row, u] = rest
    data = bytearray()
    count = len(columns[0, 0])
    for k in range(count // 2):
        for row in range(rows):
            for u in range(16):
                data += bytes(columns[row, u][2 * k : 2 * k + 2])
    if count % 2:
        for row in range(0, rows, 2):
            for u in range(16):
                data += bytes(
                    [columns[row, u][-1], columns[row + 1, u][-1] if row + 1 < rows else 0]
                )
    if left in (1, 2):
        for row in range(0, rows, 4):
            for u in range(16):
                word = sum(nibbles[row + i, u] << 4 * i for i in range(4) if row + i < rows)
                data += word.to_bytes(2, "little")
    return bytes(data)


def random_codes(shape: tuple[int, ...], levels: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(levels, size=shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("width", "tokens", "channels", "token", "channel", "code", "place", "byte"), GOLDEN_CODES
)
def test_where_a_single_code_stands(width, tokens, channels, token, channel, code, place, byte):
    codes = torch.zeros(tokens, channels, dtype=torch.uint8)
    codes[token, channel] = code
    packed = pack(codes, width)
    assert {i: b for i, b in enumerate(packed.tolist()) if b} == {place: byte}
    assert torch.equal(unpack(packed, width, tokens, channels), codes)


def test_golden_bytes_of_planes():
    # token t's code of channel j is (j + t) mod 4, in one row: field t of channel 0 is 0, 1, 2, 3,
    # 0, 1, 2, 3
    tokens, channels = (
        torch.arange(8, dtype=torch.uint8)[:, None],
        torch.arange(8, dtype=torch.uint8),
    )
    two = (tokens + channels) % 4
    assert bytes(pack_plane(two, 2).tolist()).hex() == "e4e439394e4e9393" * 2
    # the low bits of those, channels 0 and 4 in a word: 0, 1, 0, 1, … of both: 00 11 00 11
    assert bytes(pack_plane(two & 1, 1).tolist()).hex() == "cccc3333cccc3333"
    # token t's code of channel j is t + j; word 0 of the first row, from the low bits: 0, 2, 1, 3;
    # of the second 4, 6, 5, 7
    four = pack_plane(tokens + channels, 4).tolist()
    assert (
        bytes(four[:16]).hex()
        == "2031" + "3142" + "4253" + "5364" + "6475" + "7586" + "8697" + "97a8"
    )
    assert (
        bytes(four[16:]).hex()
        == "6475" + "7586" + "8697" + "97a8" + "a8b9" + "b9ca" + "cadb" + "dbec"
    )


def test_golden_bytes_of_trits():
    # one row; the codes of column u by field, 2 0 1 1 2 | 2 1 0, and the same with 1 and 2
    # exchanged in odd columns
    even, odd = [2, 0, 1, 1, 2, 2, 1, 0], [1, 0, 2, 2, 1, 1, 2, 0]
    codes = torch.tensor(
        [[odd[f] if u % 2 else even[f] for u in range(16)] for f in range(8)], dtype=torch.uint8
    )
    # 2·81 + 9 + 3 + 2 = 176, ceil(256·176/243) = 186; 2 + 1·4 = 6; 81 + 18 + 6 + 1 = 106,
    # ceil(256·106/243) = 112; 1 + 2·4 = 9
    assert pack_trits(codes).tolist() == [186, 6, 112, 9] * 8
    assert torch.equal(
        unpack_trits(torch.tensor([186, 6, 112, 9] * 8, dtype=torch.uint8), 8, 16), codes
    )


@given(st.sampled_from(WIDTHS), st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_planes_round_trip_and_follow_the_drawing(width, rows, eighths, seed):
    codes = random_codes((2, 8 * rows, 8 * eighths), 2**width, seed)
    packed = pack_plane(torch.from_numpy(codes), width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, plane_nbytes(8 * rows, 8 * eighths, width))
    assert [bytes(page.tolist()) for page in packed] == [slow_pack(page, width) for page in codes]
    assert np.array_equal(unpack_plane(packed, width, 8 * rows, 8 * eighths).numpy(), codes)


@given(st.sampled_from(TRIT_DIMS), st.integers(1, 9), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_trits_round_trip_and_follow_the_drawing(channels, rows, seed):
    codes = random_codes((2, 8 * rows, channels), 3, seed)
    packed = pack_trits(torch.from_numpy(codes))
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, trit_nbytes(8 * rows, channels))
    assert [bytes(page.tolist()) for page in packed] == [slow_pack_trits(page) for page in codes]
    assert np.array_equal(unpack_trits(packed, 8 * rows, channels).numpy(), codes)


def fp16(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words.astype(np.uint16)).view(np.float16).astype(np.float64)


@pytest.mark.parametrize("tokens", [8, 24, 32])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_masked_word_is_the_code_times_a_power_of_four_in_fp16(width, tokens):
    """`word & mask`, seen as fp16, is code·4^(f mod 4)·2^−24: no code is shifted to where its
    neighbour stood."""
    n, rows = 16, tokens // 8
    codes = random_codes((tokens, n), 2**width, seed=tokens)
    fields = codes.reshape(8, rows, n).astype(np.float64)
    words = (
        pack_plane(torch.from_numpy(codes), width)
        .numpy()
        .view("<u2")
        .reshape(-1, n if width > 1 else n // 2)
    )
    for f in range(8):
        g, high = f % 4, f >= 4
        if width == 4:
            row_set = words[high * rows : (high + 1) * rows]
            found = fp16((row_set >> 6 if g % 2 else row_set) & 15 << 2 * g)
        else:
            half = words >> 8 if high else words
            found = fp16(half & (2**width - 1) << 2 * g)
            if width == 1:  # the upper half of the channels stands one bit higher
                found = np.concatenate((found, fp16(half & 2 << 2 * g) / 2), 1)
        assert np.array_equal(found, fields[f] * 4.0**g * 2.0**-24)


@pytest.mark.parametrize("tokens", [8, 24, 32])
@pytest.mark.parametrize("channels", TRIT_DIMS)
def test_digits_of_a_trit_byte_stand_at_bits_8_and_9(channels, tokens):
    rows, whole = tokens // 8, channels // 2 // 5
    codes = random_codes((tokens, channels), 3, seed=channels)
    numbered = (
        codes.reshape(8, rows, channels // 16, 16).transpose(2, 0, 1, 3).reshape(-1, rows, 16)
    )
    words = pack_trits(torch.from_numpy(codes)).numpy().view("<u2")
    for i in range(whole // 2 * 2):
        data = (
            words[i // 2 * rows * 16 :][: rows * 16].reshape(rows, 16).astype(np.int64)
            >> 8 * (i % 2)
            & 255
        )
        for k in range(5):
            assert np.array_equal(
                (data * 3**k & 255) * 3 & 0x300, numbered[5 * i + k].astype(np.int64) << 8
            )


def test_every_trit_byte_decodes_to_its_five_digits():
    values = torch.arange(256).clamp_max(242)
    digits = torch.stack([values // 3 ** (4 - k) % 3 for k in range(5)], -1).to(
        torch.uint8
    )  # [256, 5]
    codes = torch.zeros(16, 8, 16, dtype=torch.uint8)
    codes[:, :5] = digits.view(16, 16, 5).transpose(1, 2)  # page, field, column
    packed = pack_trits(codes)
    low = packed[:, 0::2].flatten().tolist()
    assert low == [-(-256 * int(value) // 243) for value in values]
    assert len(set(low)) == 243
    assert torch.equal(unpack_trits(packed, 8, 16), codes)


@pytest.mark.parametrize(
    ("tokens", "channels", "nbytes"),
    [(8, 16, 32), (32, 16, 128), (24, 32, 192), (32, 32, 224), (32, 64, 416), (8, 64, 128), (40, 64, 544), (8, 80, 128),
     (8, 96, 160), (24, 128, 640), (32, 128, 832), (0, 64, 0)],
)  # fmt: skip
def test_trit_sizes(tokens, channels, nbytes):
    assert trit_nbytes(tokens, channels) == nbytes
    assert pack_trits(torch.zeros(3, tokens, channels, dtype=torch.uint8)).shape == (3, nbytes)


@pytest.mark.parametrize(
    ("tokens", "channels", "empty"),
    [
        (24, 32, [*range(129, 160, 2), *range(161, 192, 2)]),
        (8, 64, range(96, 128)),
        (8, 128, range(193, 224, 2)),
    ],
)
def test_rows_past_the_last_are_zero_and_not_read(tokens, channels, empty):
    codes = torch.full((tokens, channels), 2, dtype=torch.uint8)
    packed = pack_trits(codes)
    mask = torch.zeros_like(packed)
    mask[list(empty)] = 255
    if (tokens, channels) == (24, 32):  # the third of four rows is there, the fourth isn't
        mask[161:192:2] = 0xF0
    if (tokens, channels) == (8, 64):  # one row of four
        mask[96:128:2] = 0xF0
    assert int((packed & mask).sum()) == 0
    assert int(((packed | mask) == 0).sum()) == 0
    assert torch.equal(unpack_trits(packed | mask, tokens, channels), codes)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("lead", [(), (2, 3), (0,), (2, 0)])
def test_plane_sizes_keep_leading_dimensions(width, lead):
    codes = torch.full((*lead, 16, 24), 2**width - 1, dtype=torch.uint8)
    packed = pack_plane(codes, width)
    assert packed.shape == (*lead, 16 * 24 * width // 8)
    assert bool((packed == 255).all())
    assert torch.equal(unpack_plane(packed, width, 16, 24), codes)


@pytest.mark.parametrize("channels", TRIT_DIMS)
@pytest.mark.parametrize("lead", [(), (2, 3), (0,), (2, 0)])
def test_trits_keep_leading_dimensions(channels, lead):
    codes = torch.from_numpy(random_codes((*lead, 24, channels), 3, 1))
    packed = pack_trits(codes)
    assert packed.shape == (*lead, trit_nbytes(24, channels))
    assert torch.equal(unpack_trits(packed, 24, channels), codes)
    if lead == (2, 3):
        assert torch.equal(packed[1, 2], pack_trits(codes[1, 2]))  # pages don't see each other


@pytest.mark.parametrize("width", [0, *WIDTHS])
def test_tensors_that_are_not_contiguous(width):
    codes = torch.from_numpy(random_codes((32, 24, 3), 2**width if width else 3, 2)).permute(
        2, 1, 0
    )  # [3, 24, 32]
    packed = pack(codes, width)
    assert torch.equal(packed, pack(codes.contiguous(), width))
    assert torch.equal(unpack(packed, width, 24, 32), codes)
    assert torch.equal(unpack(packed.mT.contiguous().mT, width, 24, 32), codes)
    odd = torch.cat((torch.zeros(1, dtype=torch.uint8), packed[1]))[
        1:
    ]  # a page that starts at an odd byte
    assert torch.equal(unpack(odd, width, 24, 32), codes[1])
