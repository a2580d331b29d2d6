"""Wanda as in the paper: |W| times the norm, compared within an output."""

import torch

import secateur as sc


def test_worked_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5], [4.0, 1.0, -1.0, 2.0]])
    input_norm = torch.tensor([10.0, 4.0, 1.0, 8.0])
    score = sc.wanda(weight, input_norm)
    assert score.tolist() == [[10.0, 12.0, 2.0, 4.0], [40.0, 4.0, 1.0, 16.0]]
    kept = sc.NM(2, 4).mask(score)
    assert kept.tolist() == [[True, True, False, False], [True, False, False, True]]


def test_the_norm_has_a_square_root() -> None:
    """torchao's Wanda used the squared norm: with W = [1, 3] and x = [10, 4] it kept W_0."""
    weight, x = torch.tensor([[1.0, 3.0]]), torch.tensor([[10.0, 4.0]])
    score = sc.wanda(weight, x.square().sum(0).sqrt())
    assert sc.NM(1, 2).mask(score).tolist() == [[False, True]]


def test_each_output_row_loses_the_same_number() -> None:
    """torchao compared across the whole layer, so that a small row could lose everything."""
    torch.manual_seed(0)
    weight = torch.randn(6, 32) * torch.tensor([1, 1, 1, 1, 1, 1e-3])[:, None]
    mask = sc.Unstructured(0.5).mask(sc.wanda(weight, torch.rand(32) + 0.5))
    assert (~mask).sum(1).tolist() == [16] * 6


def test_pruning_twice_does_not_drift() -> None:
    """torchao's Wanda went 0.50, 0.71, 0.83, 0.89 when stepped again with fresh statistics."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16))
    plan = sc.plan(model, "unstructured:0.5")
    for _ in range(4):
        report = sc.prune_(model, plan, sc.wanda, [torch.randn(50, 32)])
        assert report.layers[0].sparsity == 0.5
