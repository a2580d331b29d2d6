"""Zeros and kept weights under every trainer: as if the forward had W * M."""

from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from tests.train.trainers import (
    LOOPS,
    OPTIMIZERS,
    SAM,
    goal,
    in_closures,
    inputs,
    net,
    plainly,
    scaled,
    sparse,
    trained,
)


def expect_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(two)
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("drive", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_is_that_of_a_model_whose_forward_has_the_mask(make, drive) -> None:
    expect_equal(trained(make, drive, held=True), trained(make, drive, held=False))


@pytest.mark.slow
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_thousand_steps_later_it_still_is(make) -> None:
    expect_equal(
        trained(make, plainly, held=True, steps=1000),
        trained(make, plainly, held=False, steps=1000),
    )


def test_lbfgs_searches_among_the_kept_weights() -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")

    expect_equal(
        trained(make, in_closures, held=True, steps=2),
        trained(make, in_closures, held=False, steps=2),
    )


def by_hand(loss: Any, optimizer: Any, held: Any, data: list[torch.Tensor]) -> None:
    """The two steps of SAM as its users call them, without `step`."""
    for x in data:
        for step in (optimizer.first_step, optimizer.second_step):
            loss(x).backward()
            if held is not None:
                held.mask_gradients_()
            step()


def by_itself(loss: Any, optimizer: Any, held: Any, data: list[torch.Tensor]) -> None:
    """As by hand, with gradients masked at each backward."""
    if held is not None:
        held.mask_gradients_early()
    by_hand(loss, optimizer, None, data)


@pytest.mark.parametrize(
    "drive", [by_hand, by_itself, in_closures], ids=["by hand", "early", "closure"]
)
def test_sam_holds_through_the_optimizer_inside_it(drive) -> None:
    def make(model: nn.Module) -> SAM:
        return SAM(model.parameters())

    def one_backward_before(loss: Any, optimizer: Any, held: Any, data: list[torch.Tensor]) -> None:
        for x in data:
            loss(x).backward()

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                value = loss(x)
                value.backward()
                return value

            optimizer.step(closure)

    drive = one_backward_before if drive is in_closures else drive
    expect_equal(trained(make, drive, held=True), trained(make, drive, held=False))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_is_not_counted(fused: bool) -> None:
    model = net()
    sparse(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    seen: list[int] = []

    def rule(name: str, weight: Any, mask: torch.Tensor, step: int) -> torch.Tensor:
        seen.append(step)
        return mask

    held = sc.hold(model, optimizer, rule)
    scaled(lambda x: goal(model(x), x), optimizer, held, inputs(4))
    assert held.steps == 3
    assert sorted(set(seen)) == [1, 2, 3]


def test_weights_that_are_unfrozen_later_are_held_from_then_on() -> None:
    model = net()
    masks = sparse(model)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=0.01)
    with sc.hold(model, optimizer) as held:
        held.mask_gradients_early()
        plainly(lambda x: goal(model(x), x), optimizer, held, inputs(2))
        assert list(held.masks) == ["head"]
        optimizer.add_param_group({"params": [*model.conv.parameters(), *model.cell.parameters()]})
        model.added = nn.Linear(4, 4)
        sc.prune_(model.added, "2:4")
        optimizer.add_param_group({"params": model.added.parameters()})
        plainly(lambda x: goal(model.added(model(x)), x), optimizer, held, inputs(2))
        assert held.steps == 4
        optimizer.zero_grad()
        model(inputs(1)[0]).sum().backward()
        assert not model.conv.weight.grad[~masks["conv.weight"]].any()
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()
        assert (model.get_parameter(name)[mask] != 0).all()
    assert sc.check(model.added, "2:4") == {"": 0.5}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.MultiheadAttention])
def test_weights_by_other_names_are_held(kind) -> None:
    torch.manual_seed(0)
    model = kind(8, 8)
    masks = sparse(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with sc.hold(model, optimizer):
        for x in torch.randn(3, 5, 2, 8):
            out = model(x, x, x)[0] if kind is nn.MultiheadAttention else model(x)[0]
            out.square().mean().backward()
            optimizer.step()
    for name, mask in masks.items():
        now = model.get_parameter(name)
        assert not now[~mask].any()
        assert not torch.equal(now[mask], before[name][mask])


def test_sparse_gradients_are_masked_where_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(10, 8, sparse=True)
    masks = sparse(model)["weight"]
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    with sc.hold(model, optimizer) as held:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor([1, 2, 2, 7])).square().sum().backward()
            held.mask_gradients_()
            assert not model.weight.grad.to_dense()[~masks].any()
            assert model.weight.grad.to_dense()[masks][masks[:1].sum() :].any()
            optimizer.step()
    assert not model.weight[~masks].any()


def test_accelerate_hands_on_to_the_optimizer_that_is_held() -> None:
    accelerate = pytest.importorskip("accelerate", reason="the wrapper is accelerate's")

    def run(masked: bool) -> dict[str, torch.Tensor]:
        model = net()
        masks = sparse(model)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model, optimizer = accelerator.prepare(model, optimizer)
        if masked:
            for name, mask in masks.items():
                model.get_parameter(name).register_hook(lambda g, mask=mask: g * mask)
        else:
            held = sc.hold(model, optimizer)
        for x in inputs(6):
            with accelerator.accumulate(model):
                accelerator.backward(goal(model(x), x))
                optimizer.step()
                optimizer.zero_grad()
        assert masked or held.steps == 3
        return {name: p.detach() for name, p in model.named_parameters()}

    expect_equal(run(False), run(True))


def test_optimizers_of_plain_tensors_are_let_alone() -> None:
    model = net()
    sparse(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sc.hold(model, optimizer) as held:
        other = torch.zeros(3, requires_grad=True)
        other.grad = torch.ones(3)
        torch.optim.SGD([other], lr=0.5).step()
        assert other.tolist() == [-0.5] * 3 and held.steps == 0
        optimizer.add_param_group({"params": [other]})
        optimizer.step()
        assert held.steps == 1
