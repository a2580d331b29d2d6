"""RIA as in the paper: shares of the row and of the column, times the root of the norm."""

from functools import partial

import pytest
import torch
from torch import Tensor

import secateur as sc
from secateur.criteria import ria


def test_worked_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0], [2.0, 1.0], [-1.0, 0.0]])
    score = ria(weight, torch.tensor([4.0, 9.0]))
    rows = [[1 / 4, 3 / 4], [2 / 3, 1 / 3], [1, 0]]
    columns = [[1 / 4, 3 / 4], [2 / 4, 1 / 4], [1 / 4, 0]]
    expected = (torch.tensor(rows) + torch.tensor(columns)) * torch.tensor([2.0, 3.0])
    torch.testing.assert_close(score, expected)


def test_an_input_with_small_weights_is_not_lost_as_a_whole() -> None:
    """Wanda drops column 0 in every row; RIA keeps the weight that stands out in that column."""
    weight = torch.ones(4, 2)
    weight[:, 0] = torch.tensor([0.4, 0.01, 0.01, 0.01])
    norm, one = torch.ones(2), sc.NM(1, 2)
    assert one.mask(sc.wanda(weight, norm))[:, 0].tolist() == [False] * 4
    assert one.mask(ria(weight, norm))[:, 0].tolist() == [True, False, False, False]


@pytest.mark.parametrize(("power", "kept"), [(0.5, [True, False]), (1.0, [False, True])])
def test_the_power_is_an_option(power: float, kept: list[bool]) -> None:
    weight, norm = torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([1.0, 2.56])
    score: Tensor = partial(ria, power=power)(weight, norm)  # shares 0.75 + 0.5 and 0.25 + 0.5
    assert sc.NM(1, 2).mask(score)[0].tolist() == kept
    torch.testing.assert_close(score[0], torch.tensor([1.25, 0.75 * 2.56**power]))


def test_rows_and_columns_of_zeros_score_zero() -> None:
    weight = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert ria(weight, torch.ones(2)).tolist() == [[0.0, 0.0], [0.0, 2.0]]
