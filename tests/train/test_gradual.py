"""Gradual pruning: the schedule's sparsity at every step, and zeros that stay."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.schedules import cubic, linear
from tests.models import ConvNet


def test_sparsity_follows_the_schedule_and_zeros_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 40))
    plan = sc.plan(model, "unstructured:0.8@layer", layers=["0"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = cubic(0.8, begin=0, end=20)
    sc.hold(model, optimizer, sc.gradual(plan, schedule, every=5))
    before = torch.zeros(40, 50, dtype=torch.bool)
    for step in range(1, 31):
        optimizer.zero_grad()
        model(torch.randn(8, 50)).square().mean().backward()
        optimizer.step()
        zeros = model[0].weight == 0
        assert (zeros | ~before).all()
        expected = schedule(min(step // 5 * 5, 20))
        assert float(zeros.float().mean()) == pytest.approx(expected, abs=1 / 2000)
        before = zeros
    assert not (model[1].weight == 0).any()
    sc.check(model, plan)


def test_an_nm_layer_keeps_fewer_and_fewer_of_m() -> None:
    model = ConvNet()
    plan = sc.plan(model, "2:8", layers=["down"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sc.hold(model, optimizer, sc.gradual(plan, linear(0.75, 0, 6), every=1))
    kept = []
    for _ in range(8):
        model(torch.randn(1, 4, 8, 8)).sum().backward()
        optimizer.step()
        kept.append(round(8 * float((model.down.weight != 0).float().mean())))
    assert kept == [7, 6, 5, 4, 3, 2, 2, 2]
    sc.check(model, plan)


def test_every_must_be_a_step() -> None:
    plan = sc.plan(nn.Linear(4, 4), "2:4", layers=[nn.Linear])
    with pytest.raises(ValueError, match="every >= 1 step, got 0"):
        sc.gradual(plan, linear(0.5, 0, 10), every=0)
