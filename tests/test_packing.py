"""Bit packing: the layout drawn in kernels/packing.py, byte for byte, and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.kernels.packing import pack_plane, pack_trits, trit_nbytes, unpack_plane, unpack_trits

WIDTHS = (1, 2, 4, 8)

# channels in order, then the bytes: field f of byte j is channel f·(n·width/8) + j
GOLDEN_PLANES = {
    1: ([1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0], [0b10010011, 0b00011010]),
    2: (
        [0, 1, 2, 3, 3, 2, 1, 0, 3, 3, 3, 3, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 0, 1, 1, 0, 3, 2],
        [0x9C, 0xDD, 0x1E, 0x5F, 0x63, 0x22, 0xE1, 0xA0],
    ),
    4: ([1, 2, 3, 4, 5, 6, 7, 8], [0x51, 0x62, 0x73, 0x84]),
    8: ([0, 1, 127, 128, 129, 200, 254, 255], [0, 1, 127, 128, 129, 200, 254, 255]),
}


def slow_pack(codes: list[int], width: int) -> list[int]:
    """The drawing as a loop over channels."""
    size = len(codes) * width // 8
    packed = [0] * size
    for channel, code in enumerate(codes):
        packed[channel % size] |= code << (channel // size * width)
    return packed


@pytest.mark.parametrize("width", WIDTHS)
def test_golden_bytes_of_a_plane(width):
    codes, packed = GOLDEN_PLANES[width]
    assert pack_plane(torch.tensor(codes, dtype=torch.uint8), width).tolist() == packed
    assert unpack_plane(torch.tensor(packed, dtype=torch.uint8), width).tolist() == codes


def test_golden_bytes_of_trits():
    # 11 channels, 3 bytes: digits of byte 0 are channels 0, 3, 6, 9; of byte 2 channels 2, 5, 8 and nothing
    codes = [2, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2]
    packed = [-(-256 * (2 * 81 + 1 * 27 + 0 * 9 + 1 * 3) // 243), -(-256 * (2 * 27 + 2 * 3) // 243)]
    packed += [-(-256 * (1 * 81 + 2 * 27 + 1 * 9) // 243)]
    assert packed == [203, 64, 152]
    assert pack_trits(torch.tensor(codes, dtype=torch.uint8)).tolist() == packed
    assert unpack_trits(torch.tensor(packed, dtype=torch.uint8), 11).tolist() == codes


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_planes_round_trip_and_follow_the_drawing(data):
    width = data.draw(st.sampled_from(WIDTHS))
    n = 8 * data.draw(st.integers(1, 20))
    rows = data.draw(st.integers(1, 3))
    codes = data.draw(
        st.lists(st.lists(st.integers(0, 2**width - 1), min_size=n, max_size=n), min_size=rows, max_size=rows)
    )
    packed = pack_plane(torch.tensor(codes, dtype=torch.uint8), width)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [slow_pack(row, width) for row in codes]
    assert unpack_plane(packed, width).tolist() == codes


@given(st.lists(st.integers(0, 2), min_size=1, max_size=130))
@settings(deadline=None, max_examples=100)
def test_trits_round_trip_at_any_length(codes):
    packed = pack_trits(torch.tensor(codes, dtype=torch.uint8))
    assert packed.dtype == torch.uint8
    assert packed.shape == (trit_nbytes(len(codes)),)
    assert unpack_trits(packed, len(codes)).tolist() == codes


def test_every_trit_byte_decodes_to_its_five_digits():
    digits = [[value // 3 ** (4 - k) % 3 for k in range(5)] for value in range(243)]
    codes = torch.tensor(digits, dtype=torch.uint8)
    packed = pack_trits(codes)
    assert packed.flatten().tolist() == [-(-256 * value // 243) for value in range(243)]
    assert len(set(packed.flatten().tolist())) == 243
    assert unpack_trits(packed, 5).tolist() == digits


@pytest.mark.parametrize(
    ("n", "nbytes"), [(1, 1), (4, 1), (5, 1), (6, 2), (8, 2), (16, 4), (64, 13), (128, 26), (130, 26)]
)
def test_trit_sizes(n, nbytes):
    assert trit_nbytes(n) == nbytes
    assert pack_trits(torch.zeros(3, n, dtype=torch.uint8)).shape == (3, nbytes)


@pytest.mark.parametrize("width", WIDTHS)
def test_plane_sizes_keep_leading_dimensions(width):
    codes = torch.full((2, 3, 24), 2**width - 1, dtype=torch.uint8)
    packed = pack_plane(codes, width)
    assert packed.shape == (2, 3, 24 * width // 8)
    assert bool((packed == 255).all())
    assert torch.equal(unpack_plane(packed, width), codes)


def test_tensors_that_are_not_contiguous():
    codes = torch.arange(48, dtype=torch.uint8).remainder(3).view(16, 3).T  # [3, 16]
    assert torch.equal(unpack_trits(pack_trits(codes), 16), codes)
    assert torch.equal(unpack_plane(pack_plane(codes, 2), 2), codes)
    packed = pack_plane(codes, 2).T.contiguous().T
    assert torch.equal(unpack_plane(packed, 2), codes)
