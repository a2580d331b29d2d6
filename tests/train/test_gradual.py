"""Gradual pruning: the schedule's sparsity at every step, and zeros that stay."""

from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.train.schedules import cosine, cubic, linear
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


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, rule: Any, count: int) -> float:
    """Some steps of training; the share of zeros of the first layer after it."""
    with sc.hold(model, optimizer, rule):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(8, model[0].in_features)).square().mean().backward()
            optimizer.step()
    return float((model[0].weight == 0).float().mean())


@pytest.mark.parametrize("every", [1, 2, 4, 5, 7])
@pytest.mark.parametrize(
    ("pattern", "schedule"),
    [
        ("unstructured:0.8", cubic(0.8, 0, 20, initial=0.4)),
        ("unstructured:0.8@layer", linear(0.8, 5, 20)),
        ("2:8", linear(0.75, 0, 20)),
        ("block:10x5@0.8", cosine(0.8, 3, 20)),
    ],
    ids=["cubic", "linear", "nm", "block"],
)
def test_training_that_was_stopped_ends_at_the_plans_sparsity(
    pattern: str, schedule: Any, every: int
) -> None:
    """Held again with a new rule of the same schedule, by another optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48 if pattern == "2:8" else 50, 40), nn.Linear(40, 40))
    plan = sc.plan(model, pattern, layers=["0"])
    halves = []
    for count in (12, 8):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        halves.append(steps(model, optimizer, sc.gradual(plan, schedule, every=every), count))
    assert halves[0] < halves[1]
    sc.check(model, plan)


def test_a_rule_may_be_held_twice_and_goes_on_step_by_step() -> None:
    torch.manual_seed(0)
    schedule = linear(0.8, 0, 20)
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 40))
    plan = sc.plan(model, "unstructured:0.8@layer", layers=["0"])
    rule = sc.gradual(plan, schedule, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for done in (7, 12, 20):
        taken = {7: 7, 12: 5, 20: 8}[done]
        assert steps(model, optimizer, rule, taken) == pytest.approx(schedule(done), abs=1 / 2000)


def test_a_schedule_that_has_not_begun_begins_at_its_own_step() -> None:
    """Although a weight is zero by chance; nothing tells then how many steps had been taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 40))
    model[0].weight.data[3, 4] = 0
    plan = sc.plan(model, "unstructured:0.8@layer", layers=["0"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = sc.gradual(plan, linear(0.8, 10, 20), every=1)
    assert steps(model, optimizer, rule, 10) == pytest.approx(1 / 2000)
    assert steps(model, optimizer, rule, 10) == pytest.approx(1 / 2000)
    assert steps(model, optimizer, rule, 15) == pytest.approx(0.4)


def test_the_plan_is_met_when_the_schedule_ends_also_between_two_choices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 40))
    plan = sc.plan(model, "unstructured:0.8", layers=["0"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = sc.gradual(plan, cubic(0.8, 0, 20), every=14)
    assert steps(model, optimizer, rule, 20) == pytest.approx(0.8)


def test_every_must_be_a_step() -> None:
    plan = sc.plan(nn.Linear(4, 4), "2:4", layers=[nn.Linear])
    with pytest.raises(ValueError, match="every >= 1 step, got 0"):
        sc.gradual(plan, linear(0.5, 0, 10), every=0)


def test_a_step_count_that_runs_backwards_is_refused() -> None:
    model = nn.Sequential(nn.Linear(50, 40))
    rule = sc.gradual(sc.plan(model, "unstructured:0.8"), linear(0.8, 0, 20), every=1)
    mask = torch.ones(40, 50, dtype=torch.bool)
    for step in (1, 2, 7):
        rule("0", model[0].weight, mask, step)
    with pytest.raises(ValueError, match="0 was at step 7 and is now at 5: make a rule for each"):
        rule("0", model[0].weight, mask, 5)
    rule("0", model[0].weight, mask, 1)  # another hold
