"""SNIP: the derivative of the loss with respect to a factor on each weight."""

import torch
from torch.nn import functional as F

import secateur as sc
from secateur.criteria import snip


def test_worked_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.0]])
    gradient = torch.tensor([[5.0, 1.0, -2.0, 9.0]])
    assert snip(weight, gradient).tolist() == [[5.0, 3.0, 4.0, 0.0]]


def test_is_the_derivative_by_the_mask() -> None:
    """The paper's definition: |dL(c * w) / dc| at c = 1."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(s, generator=generator) for s in ((3, 8), (20, 8)))
    layer = torch.nn.Linear(8, 3, bias=False)
    layer.weight.data.copy_(weight)
    c = torch.ones(3, 8, requires_grad=True)
    F.cross_entropy(x @ (c * weight).T, torch.arange(20) % 3).backward()
    assert c.grad is not None
    model = torch.nn.Sequential(layer)

    def loss(output: torch.Tensor, batch: object) -> torch.Tensor:
        return F.cross_entropy(output, torch.arange(20) % 3)

    sc.prune_(model, "2:4", snip, [x], loss=loss)
    assert torch.equal(layer.weight != 0, sc.NM(2, 4).mask(c.grad.abs()))
