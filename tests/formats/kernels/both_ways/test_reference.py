"""What packs keep: the best masks of tiles by brute force, and two of four along either side."""

from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.formats import two_of_four
from secateur.formats.kernels.both_ways import Selection, empty
from secateur.formats.kernels.both_ways.reference import LARGEST, kept, pack, tile_masks
from secateur.formats.kernels.decode24 import Kind, restore

SHAPES = ((64, 64), (128, 256), (192, 320))


def random_weight(shape: tuple[int, int], seed: int, is_coarse: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight.mul(2).round() if is_coarse else weight


def test_there_are_ninety_masks_of_a_tile() -> None:
    masks = tile_masks().view(90, 4, 4)
    assert (masks.sum(1) == 2).all() and (masks.sum(2) == 2).all()
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 90


@given(st.lists(st.integers(-5, 5), min_size=16, max_size=16))
def test_a_tile_keeps_what_is_worth_most(numbers: list[int]) -> None:
    tile = torch.tensor(numbers, dtype=torch.float32).view(4, 4)
    found, also = kept(tile, Selection.TILES)
    assert torch.equal(found, also)
    rows = [sum(1 << c for c in pair) for pair in combinations(range(4), 2)]
    most = 0.0
    for bits in product(rows, repeat=4):
        mask = torch.tensor([[b >> c & 1 for c in range(4)] for b in bits])
        if (mask.sum(0) == 2).all():
            most = max(most, float((tile.abs() * mask).sum()))
    assert float((tile.abs() * found).sum()) == most
    assert (found.sum(0) == 2).all() and (found.sum(1) == 2).all()


@pytest.mark.parametrize(
    ("tile", "kept_of_it"),
    [
        ([[1, 1, 1, 1]] * 4, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]),
        (
            [[9, 1, 1, 0], [9, 1, 1, 0], [0, 5, 0, 9], [0, 0, 5, 9]],
            [[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]],
        ),
    ],
)
def test_of_equal_tiles_the_first_mask_stays(
    tile: list[list[int]], kept_of_it: list[list[int]]
) -> None:
    found, _ = kept(torch.tensor(tile, dtype=torch.float32), Selection.TILES)
    assert found.int().tolist() == kept_of_it


def test_rows_keep_the_largest_and_columns_what_is_left() -> None:
    weight = torch.tensor([[4.0, -3, 2, 1], [-9, 1, 8, 0], [7, 5, 0, 0], [1, 6, -5, 2]])
    of_rows, of_columns = kept(weight, Selection.ROWS)
    assert of_rows.int().tolist() == [[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0]]
    both = (of_rows & of_columns).int().tolist()
    assert both == [[0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0]]


@pytest.mark.parametrize("selection", Selection, ids=str)
def test_what_is_not_finite_stays(selection: Selection) -> None:
    weight = random_weight((8, 8), 0)
    weight[1, 2], weight[6, 7], weight[5, 1] = torch.nan, torch.inf, -2 * LARGEST
    of_rows, of_columns = kept(weight, selection)
    at = torch.tensor([1, 6, 5]), torch.tensor([2, 7, 1])
    assert of_rows[at].all() and of_columns[at].all()


@pytest.mark.parametrize("selection", Selection, ids=str)
def test_edges_are_filled_up_with_zeros(selection: Selection) -> None:
    weight = random_weight((8, 8), 0)
    weight[5:], weight[:, 6:] = 0, 0
    for found, wanted in zip(kept(weight[:5, :6], selection), kept(weight, selection), strict=True):
        assert torch.equal(found, wanted[:5, :6])


@pytest.mark.parametrize("is_coarse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("selection", Selection, ids=str)
def test_units_are_the_weight_and_its_transpose(
    selection: Selection, dtype: torch.dtype, shape: tuple[int, int], is_coarse: bool
) -> None:
    weight = random_weight(shape, 1, is_coarse)
    units, transposed = pack(weight, dtype, selection)
    assert [part.shape for part in (units, transposed)] == [part.shape for part in empty(weight)]
    of_rows, of_columns = kept(weight, selection)
    forward = weight.to(dtype).masked_fill(~of_rows, 0)
    assert torch.equal(dense(units, shape[1], dtype), forward)
    backward = forward.masked_fill(~of_columns, 0)
    assert torch.equal(dense(transposed, shape[0], dtype), backward.t())


def dense(units: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    values, metadata, _ = restore(Kind.W16, units, False, columns, dtype)
    assert two_of_four.why_broken(metadata, columns) is None
    return two_of_four.scatter(values, metadata)
