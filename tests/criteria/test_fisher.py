"""Fisher: the mean of the samples' squared gradients, not the square of the mean."""

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.criteria import fisher, snip


def test_worked_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0]])
    assert fisher(weight, torch.tensor([[4.0, 2.0, 0.0]])).tolist() == [[2.0, 9.0, 0.0]]


def test_gradients_that_cancel_still_count() -> None:
    """Two samples pull weight 0 in opposite directions: their mean gradient is zero there."""
    x = torch.tensor([[4.0, 1.0], [-4.0, 1.0]])
    for criterion, kept in ((fisher, [[True, False]]), (snip, [[False, True]])):
        layer = nn.Linear(2, 1, bias=False)
        layer.weight.data.fill_(1.0)

        def loss(output: Tensor, batch: object) -> Tensor:
            return output.mean()

        sc.prune_(nn.Sequential(layer), "1:2", criterion, [x], loss=loss)
        assert (layer.weight != 0).tolist() == kept


def test_is_the_second_order_change_of_the_loss_of_a_calibrated_classifier() -> None:
    """For a model that gives the true probabilities, the Fisher matrix is the Hessian."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, 6, generator=generator)
    x = torch.randn(40_000, 6, generator=generator)
    p = (x @ w.T).sigmoid()[:, 0]
    y = (torch.rand(len(x), generator=generator) < p).float()
    squared = ((p - y)[:, None] * x).square().mean(0, keepdim=True)
    hessian = ((p * (1 - p))[:, None] * x.square()).mean(0, keepdim=True)
    torch.testing.assert_close(fisher(w, squared), w.square() * hessian / 2, rtol=0.05, atol=1e-6)
