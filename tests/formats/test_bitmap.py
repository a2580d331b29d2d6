"""The bitmap layout, bit by bit, and what it reports."""

import pytest
import torch

from secateur.formats.bitmap import Bitmap
from tests.formats.weights import changed

BITMAP = Bitmap()
WEIGHT = torch.tensor([[0.0, 3, 0, 0, 0, 0, 0, 4, 5, 0], [0.0, 0, 0, 0, 0, 0, 0, 0, 0, 6]])


def test_bits_count_columns_from_the_low_end() -> None:
    packed = BITMAP.pack(WEIGHT)
    assert packed["values"].tolist() == [3, 4, 5, 6]
    assert packed["bitmask"].tolist() == [[0b10000010, 0b01], [0, 0b10]]


def test_a_full_byte() -> None:
    packed = BITMAP.pack(torch.ones(1, 8))
    assert packed["bitmask"].tolist() == [[255]]


def test_why_not_compares_bytes() -> None:
    half = torch.ones(4, 16)
    half[:, ::2] = 0
    assert BITMAP.why_not(half) is None
    reason = BITMAP.why_not(torch.ones(4, 16))
    assert reason == "bitmap would store 1.03x the bytes of the dense weight: nothing to gain"


def test_density_counts_nonzeros() -> None:
    assert BITMAP.density(WEIGHT) == 0.2


def test_a_bit_without_a_value_is_noticed() -> None:
    packed = BITMAP.pack(WEIGHT)
    packed["bitmask"][1, 0] = 1
    assert BITMAP.why_broken(packed) == "bitmask keeps 5 weights, but 4 values are stored"
    packed["bitmask"][1, 0] = 0
    assert BITMAP.why_broken(packed) is None
    assert BITMAP.why_broken(changed(packed, values=packed["values"][:3])) is not None


def test_an_empty_one_has_the_sizes_of_a_packed_one() -> None:
    packed, empty = BITMAP.pack(WEIGHT), BITMAP.empty((2, 10), 4, torch.float32)
    for key, tensor in packed.tensors.items():
        assert empty.tensors[key].shape == tensor.shape
        assert empty.tensors[key].dtype == tensor.dtype
    with pytest.raises(ValueError, match="at most 20 values, got 21"):
        BITMAP.empty((2, 10), 21, torch.float32)
