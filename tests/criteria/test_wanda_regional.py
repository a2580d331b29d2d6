"""The score of Wanda++: Wanda's, plus alpha times the regional gradient."""

from functools import partial

import torch

import secateur as sc
from secateur.criteria import wanda_regional


def test_worked_by_hand() -> None:
    weight, norm = torch.tensor([[1.0, -3.0], [2.0, 1.0]]), torch.tensor([10.0, 4.0])
    gradient = torch.tensor([[0.5, 0.0], [0.25, 1.0]])
    score = wanda_regional(weight, norm, gradient)
    assert score.tolist() == [[60.0, 12.0], [70.0, 104.0]]


def test_without_gradients_it_is_wanda() -> None:
    weight, norm = torch.randn(4, 8), torch.rand(8)
    assert torch.equal(wanda_regional(weight, norm, torch.zeros(4, 8)), sc.wanda(weight, norm))
    no_alpha = partial(wanda_regional, alpha=0.0)
    assert torch.equal(no_alpha(weight, norm, torch.rand(4, 8)), sc.wanda(weight, norm))
