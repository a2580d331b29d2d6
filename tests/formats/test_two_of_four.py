"""Positions of 2:4 weights: nibbles, bytes of two, and where entries come from and go."""

import pytest
import torch

from secateur.formats import two_of_four
from secateur.formats.two_of_four import NIBBLES


def test_every_group_of_at_most_two_has_two_ascending_positions() -> None:
    for code, nibble in enumerate(NIBBLES):
        nonzero = {column for column in range(4) if code >> column & 1}
        if len(nonzero) <= 2:
            first, second = nibble & 3, nibble >> 2
            assert first < second and nonzero <= {first, second}


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_nibbles_are_joined_in_twos(count: int) -> None:
    nibbles = torch.arange(1, 2 * count + 1, dtype=torch.uint8).reshape(2, count) % 16
    joined = two_of_four.pack_nibbles(nibbles)
    assert joined.shape == (2, (count + 1) // 2)
    second = int(nibbles[0, 1]) if count > 1 else 0
    assert int(joined[0, 0]) == int(nibbles[0, 0]) + 16 * second
    assert torch.equal(two_of_four.unpack_nibbles(joined, count), nibbles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.uint8], ids=str)
def test_entries_of_any_type_go_back_to_where_they_came_from(dtype: torch.dtype) -> None:
    dense = torch.tensor([[0, 5, 0, 7, 1, 2, 0, 0], [0, 0, 0, 3, 0, 0, 0, 0]], dtype=dtype)
    metadata = two_of_four.metadata_of(dense)
    kept = two_of_four.gather(dense, metadata)
    assert kept.tolist() == [[5, 7, 1, 2], [0, 3, 0, 0]]
    assert torch.equal(two_of_four.scatter(kept, metadata), dense)


def test_broken_metadata_is_located() -> None:
    metadata = two_of_four.metadata_of(torch.zeros(2, 16))
    assert two_of_four.why_broken(metadata, 16) is None
    metadata[1, 1] = 0b0100 | 0b0101 << 4  # group 3 names column 1 twice
    assert two_of_four.why_broken(metadata, 16) == (
        "metadata of row 1 columns 12..15 are not two ascending"
    )
