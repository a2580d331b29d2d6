"""Magnitude in L1 and L2, by elements and by blocks."""

import torch

import secateur as sc
from secateur.criteria import magnitude_l2


def test_l1_and_l2_disagree_about_a_block() -> None:
    """One block of (3, 0), one of (2, 2): L1 says 3 < 4, L2 says 9 > 8."""
    weight = torch.tensor([[3.0, 0.0, 2.0, -2.0]])
    block = sc.Block(1, 2, 0.5)
    assert block.mask(sc.magnitude(weight)).tolist() == [[False, False, True, True]]
    assert block.mask(magnitude_l2(weight)).tolist() == [[True, True, False, False]]


def test_l2_of_half_precision_does_not_underflow() -> None:
    weight = torch.tensor([[1e-4, 2e-4]], dtype=torch.float16)
    assert sc.NM(1, 2).mask(magnitude_l2(weight)).tolist() == [[False, True]]
