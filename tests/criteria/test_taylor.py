"""Taylor: the squared first-order change of the loss."""

import torch

import secateur as sc
from secateur.criteria import snip, taylor


def test_worked_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0]])
    gradient = torch.tensor([[5.0, 1.0, -2.0]])
    assert taylor(weight, gradient).tolist() == [[25.0, 9.0, 16.0]]


def test_single_weights_come_in_snips_order_and_blocks_do_not() -> None:
    """One block of changes (3, 0), one of (2, 2): SNIP says 3 < 4, Taylor says 9 > 8."""
    weight, gradient = torch.tensor([[3.0, 1.0, 2.0, -2.0]]), torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    one, other = snip(weight, gradient), taylor(weight, gradient)
    assert torch.equal(sc.NM(2, 4).mask(one), sc.NM(2, 4).mask(other))
    block = sc.Block(1, 2, 0.5)
    assert block.mask(one).tolist() == [[False, False, True, True]]
    assert block.mask(other).tolist() == [[True, True, False, False]]
