"""Masks and test weights: exact counts, groups within rows, on a device that exists."""

import pytest
import torch

from secateur.compat.torchao import (
    create_block_sparse_tensor,
    create_semi_structured_tensor,
    mask_creator,
)
from secateur.patterns import NM, Block


def test_the_largest_magnitudes_are_kept_and_of_equals_the_first() -> None:
    weight = torch.tensor([[1.0, -5, 2, 3, 1, 1, 1, 1]])
    assert mask_creator(weight).tolist() == [[0, 1, 0, 1, 1, 1, 0, 0]]
    assert mask_creator(weight, N=1, M=8).tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]]
    assert mask_creator(weight.bfloat16()).dtype == torch.bfloat16


def test_groups_do_not_cross_rows() -> None:
    """6 columns: 12 elements are three groups of 4 in memory, of which one lies in two rows."""
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        mask_creator(torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"at least two dimensions, got shape \(8,\)"):
        mask_creator(torch.ones(8))


def test_groups_of_a_convolution_lie_along_its_input_channels() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 8, 3, 3)
    mask = mask_creator(weight)
    assert mask.shape == weight.shape
    assert (mask.unflatten(1, (2, 4)).sum(2) == 2).all()
    kept, dropped = (weight.abs().unflatten(1, (2, 4)) * m for m in (mask.unflatten(1, (2, 4)), 1))
    assert torch.equal(kept.sum(2), dropped.topk(2, dim=2).values.sum(2))


def test_stacked_matrices_are_masked_one_by_one() -> None:
    torch.manual_seed(0)
    weights = torch.randn(3, 4, 8)
    assert torch.equal(mask_creator(weights), torch.stack([mask_creator(w) for w in weights]))


def test_block_sparse_weights_have_the_exact_number_of_blocks() -> None:
    weight = create_block_sparse_tensor(64, 32, 8, 0.75, torch.float16, device="cpu")
    assert weight.dtype == torch.float16
    assert float((weight == 0).float().mean()) == 0.75
    assert Block(8, 8, 0.75).violation(weight != 0) is None
    assert set(weight.unique().tolist()) == {0.0, 1.0}
    default = create_block_sparse_tensor(8, 8, 8, 0.0, torch.float32).device.type
    assert default == ("cuda" if torch.cuda.is_available() else "cpu")


def test_semi_structured_weights_are_one_of_two() -> None:
    weight = create_semi_structured_tensor(16, 32, torch.bfloat16, device="cpu")
    assert weight.dtype == torch.bfloat16
    assert (weight.unflatten(1, (-1, 2)).count_nonzero(-1) == 1).all()
    assert NM(2, 4).violation(weight != 0) is None
    assert 1 <= float(weight[weight != 0].min()) < float(weight.max()) <= 2
    default = create_semi_structured_tensor(2, 2, torch.float32).device.type
    assert default == ("cuda" if torch.cuda.is_available() else "cpu")
