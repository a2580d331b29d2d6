"""Positions of 4:8 weights: a bit for every column, and where entries come from and go."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.formats import four_of_eight
from secateur.formats.four_of_eight import COLUMNS, MASKS, MISFIT


def test_every_group_of_at_most_four_keeps_four_columns() -> None:
    for bits, mask in enumerate(MASKS):
        if bits.bit_count() > 4:
            assert mask == MISFIT
            continue
        assert mask.bit_count() == 4 and mask & bits == bits
        added, free = mask & ~bits, ~bits & 0xFF
        assert added & free == added and free & (1 << added.bit_length()) - 1 == added, "lowest"
    assert len(set(MASKS)) == 70 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.uint8], ids=str)
def test_entries_of_any_type_go_back_to_where_they_came_from(dtype: torch.dtype) -> None:
    dense = torch.tensor([[0, 5, 0, 7, 1, 0, 0, 2] * 2, [0, 0, 0, 0, 0, 3, 0, 0] * 2], dtype=dtype)
    metadata = four_of_eight.metadata_of(dense)
    assert metadata.tolist() == [[0b1001_1010] * 2, [0b0010_0111] * 2]
    kept = four_of_eight.gather(dense, metadata)
    assert kept.tolist() == [[5, 7, 1, 2] * 2, [0, 0, 0, 3] * 2]
    assert torch.equal(four_of_eight.scatter(kept, metadata), dense)


@given(st.sampled_from(sorted({*MASKS} - {MISFIT})))
def test_columns_are_those_of_the_mask(mask: int) -> None:
    assert sum(1 << column for column in COLUMNS[mask]) == mask
    assert list(COLUMNS[mask]) == sorted(COLUMNS[mask])


def test_broken_metadata_is_located() -> None:
    metadata = four_of_eight.metadata_of(torch.zeros(2, 16))
    assert metadata.tolist() == [[0b1111, 0b1111]] * 2
    assert four_of_eight.why_broken(metadata, 16) is None
    metadata[1, 1] = 0b1_1111
    told = "metadata of row 1 columns 8..15 keep 5, not 4"
    assert four_of_eight.why_broken(metadata, 16) == told
