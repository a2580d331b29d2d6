"""The 2:4 layout, byte by byte, and its errors."""

import pytest
import torch

from secateur.formats.semi24 import Semi24

# PTX ISA, sparse mma: lower index in the low two bits.
PTX = {
    (0, 1): 0b0100,
    (0, 2): 0b1000,
    (0, 3): 0b1100,
    (1, 2): 0b1001,
    (1, 3): 0b1101,
    (2, 3): 0b1110,
}

SEMI24 = Semi24()


@pytest.mark.parametrize(("kept", "nibble"), PTX.items())
def test_metadata_is_that_of_sparse_mma(kept: tuple[int, int], nibble: int) -> None:
    weight = torch.zeros(1, 8)
    weight[0, list(kept)] = torch.tensor([5.0, 7.0])
    packed = SEMI24.pack(weight)
    assert packed["values"].tolist() == [[5.0, 7.0, 0.0, 0.0]]
    assert packed["metadata"].tolist() == [[nibble | PTX[0, 1] << 4]]


@pytest.mark.parametrize(
    ("column", "positions", "values"),
    [
        (0, (0, 1), [9.0, 0.0]),
        (1, (0, 1), [0.0, 9.0]),
        (2, (0, 2), [0.0, 9.0]),
        (3, (0, 3), [0.0, 9.0]),
    ],
)
def test_a_single_nonzero_is_paired_with_a_zero(
    column: int, positions: tuple[int, int], values: list[float]
) -> None:
    weight = torch.zeros(1, 4)
    weight[0, column] = 9.0
    packed = SEMI24.pack(weight)
    assert packed["metadata"].tolist() == [[PTX[positions]]]
    assert packed["values"].tolist() == [values]


def test_negative_zeros_are_not_kept() -> None:
    weight = torch.tensor([[-0.0, 3.0, -0.0, 4.0]])
    packed = SEMI24.pack(weight)
    assert packed["values"].tolist() == [[3.0, 4.0]]
    assert packed["metadata"].tolist() == [[PTX[1, 3]]]


def test_an_odd_number_of_groups_ends_on_half_a_byte() -> None:
    packed = SEMI24.pack(torch.tensor([[1.0, 0, 0, 2], [0, 0, 1, 2]]).repeat(1, 3))
    first, second = PTX[0, 3], PTX[2, 3]
    assert packed["metadata"].tolist() == [[first * 17, first], [second * 17, second]]
    assert torch.equal(
        SEMI24.unpack(packed), torch.tensor([[1.0, 0, 0, 2], [0, 0, 1, 2]]).repeat(1, 3)
    )


def test_four_bytes_read_as_a_word_list_eight_groups() -> None:
    kept = list(PTX)
    weight = torch.zeros(1, 32)
    for group in range(8):
        weight[0, [4 * group + column for column in kept[group % 6]]] = 1.0
    word = int(SEMI24.pack(weight)["metadata"].view(torch.int32)[0, 0]) & 0xFFFFFFFF
    assert [(word >> 4 * group) & 15 for group in range(8)] == [PTX[kept[g % 6]] for g in range(8)]


def test_a_third_nonzero_is_located() -> None:
    weight = torch.zeros(3, 16)
    weight[1, 8:11] = 1.0
    message = (
        r"pack needs a 2:4 weight, row 1, columns 8\.\.11 keeps 3: run prune_ with NM\(2, 4\) first"
    )
    with pytest.raises(ValueError, match=message):
        SEMI24.pack(weight)
    weight[1, 11] = 1.0
    assert SEMI24.why_not(weight) == (
        "semi24 needs at most 2 nonzeros in every 4 consecutive inputs, row 1 columns 8..11 keep 4"
    )


def test_a_ragged_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of 4, got \(3, 6\): leave this layer dense"):
        SEMI24.pack(torch.zeros(3, 6))
    assert SEMI24.why_not(torch.zeros(3, 6)) == (
        "semi24 needs in_features that is a multiple of 4, got (3, 6)"
    )
    assert SEMI24.why_not(torch.zeros(3, 8)) is None


def test_broken_metadata_is_located() -> None:
    packed = SEMI24.pack(torch.zeros(2, 16))
    packed["metadata"][1, 1] = PTX[0, 1] | 0b0101 << 4  # group 3 names column 1 twice
    assert SEMI24.why_broken(packed) == "metadata of row 1 columns 12..15 are not two ascending"


def test_an_empty_one_has_the_sizes_of_a_packed_one() -> None:
    packed = SEMI24.pack(torch.zeros(3, 12, dtype=torch.bfloat16))
    empty = SEMI24.empty((3, 12), 3, torch.bfloat16)
    assert (
        empty["values"].shape == packed["values"].shape and empty["values"].dtype == torch.bfloat16
    )
    assert empty["metadata"].shape == packed["metadata"].shape
    with pytest.raises(ValueError, match="3 rows of a multiple of 4 inputs, got 2 x 12"):
        SEMI24.empty((3, 12), 2, torch.bfloat16)


def test_density_is_half() -> None:
    assert SEMI24.density(torch.zeros(4, 8)) == 0.5
