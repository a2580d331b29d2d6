"""Movement pruning held to its definition by autograd, and to the zeros it promises."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.train import movement, soft_movement
from secateur.train.schedules import constant, cubic, linear
from tests.inside import KINDS, problem
from tests.models import ConvNet
from tests.train.trainers import Drive, in_closures, inputs, plainly, scaled

PLAN = {"0": "unstructured:0.5@layer"}


class Straight(torch.autograd.Function):
    """The mask of scores; its gradient passes to the scores as it is."""

    @staticmethod
    def forward(ctx: object, scores: Tensor, threshold: float) -> Tensor:
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 6, generator=generator), torch.randn(32, 4, generator=generator)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4))


def transcribed(
    steps: int, threshold_of: object, rate: float, penalty: float
) -> tuple[Tensor, Tensor, Tensor]:
    """W, S and the mask after so many steps of plain gradient descent on both, by autograd."""
    x, y = data()
    net = model()
    W, bias = (p.detach().clone().requires_grad_() for p in net[0].parameters())
    S, mask = torch.zeros_like(W).requires_grad_(), torch.ones_like(W)
    for step in range(1, steps + 1):
        M = mask + (S - S.detach())  # the mask chosen before, straight through to the scores
        loss = (nn.functional.linear(x, W * M, bias) - y).square().mean()
        loss = loss + penalty * S.sigmoid().mean()
        for p, lr in ((W, 0.1), (bias, 0.1), (S, rate)):
            (grad,) = torch.autograd.grad(loss, p, retain_graph=True)
            p.grad = lr * grad
        with torch.no_grad():
            for p in (W, bias, S):
                p -= p.grad
        mask = threshold_of(S.detach(), step).to(W.dtype)  # type: ignore[operator]
    return W.detach(), S.detach(), mask


def trained(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weights_and_scores_are_those_of_the_definition(momentum: float) -> None:
    """Of plain descent; with momentum, the zeros all the same."""
    schedule, net = linear(0.5, 0, 12), model()
    plan = sc.plan(net, PLAN)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=momentum)
    moving = movement(net, plan, optimizer, schedule)
    trained(net, optimizer, 20)
    weight = net[0].weight.detach()
    assert int((weight == 0).sum()) == 12
    sc.check(net, plan)
    if momentum:
        return

    def top(scores: Tensor, step: int) -> Tensor:
        return sc.Unstructured(schedule(step), scope="layer").mask(scores)

    W, S, mask = transcribed(20, top, 1.0, 0.0)
    assert torch.allclose(moving.scores["0"], S, atol=1e-5)
    assert torch.equal(moving.masks["0"], mask.bool())
    assert torch.allclose(weight, W * mask, atol=1e-5)
    hidden = moving.state_dict()["hidden"]["0"]
    assert torch.allclose(hidden, W * (1 - mask), atol=1e-5) and bool(hidden.any())


def test_the_soft_form_is_that_of_the_definition() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    plan = sc.plan(net, PLAN)
    with soft_movement(net, plan, optimizer, penalty=2.0, rate=0.5, threshold=-0.05) as moving:
        trained(net, optimizer, 20)
    W, S, mask = transcribed(20, lambda scores, step: scores > -0.05, 0.5, 2.0)
    assert 0 < int(mask.sum()) < mask.numel()
    assert torch.allclose(moving.scores["0"], S, atol=1e-5)
    assert torch.equal(moving.masks["0"], mask.bool())
    assert torch.allclose(net[0].weight.detach(), W * mask, atol=1e-5)
    trained(net, optimizer, 1)
    assert moving.steps == 20 and bool((net[0].weight != 0).all()), "the block has ended"


def test_a_dropped_weight_comes_back_as_it_was() -> None:
    """Two weights: the score of the dropped one overtakes, and its value has not decayed."""
    net = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0]]))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.5)
    moving = movement(net, sc.plan(net, PLAN), optimizer, constant(0.5))
    kept = []
    for slopes in ([-1.0, 1.0], [0.0, 0.0], [9.0, -9.0]):
        net[0].weight.grad = torch.tensor([slopes])
        optimizer.step()
        kept.append(net[0].weight.detach().clone())
    assert [weight.tolist() for weight in kept] == [[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 2.0]]]
    assert moving.scores["0"].tolist() == [[1.0 - 9.0, -2.0 + 18.0]]


def test_a_convolution_and_an_nm_pattern() -> None:
    net = ConvNet()
    plan = sc.plan(net, "2:8", layers=["down"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with movement(net, plan, optimizer, linear(0.75, 0, 6)):
        for _ in range(8):
            optimizer.zero_grad()
            net(torch.randn(1, 4, 8, 8)).sum().backward()
            optimizer.step()
    sc.check(net, plan)


def test_masks_are_chosen_every_so_many_steps() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    movement(net, sc.plan(net, PLAN), optimizer, cubic(0.5, 0, 6), every=3)
    zeros = []
    for _ in range(7):
        trained(net, optimizer, 1)
        zeros.append(int((net[0].weight == 0).sum()))
    assert zeros == [0, 0, 11, 11, 11, 12, 12]  # 24 cubic(3) = 10.5, half up


def test_a_run_goes_on_from_its_state() -> None:
    schedule, whole = linear(0.5, 0, 8), model()
    first = torch.optim.SGD(whole.parameters(), lr=0.1)
    moving = movement(whole, sc.plan(whole, PLAN), first, schedule)
    trained(whole, first, 5)
    again = copy.deepcopy(whole)
    second = torch.optim.SGD(again.parameters(), lr=0.1)
    resumed = movement(again, sc.plan(again, PLAN), second, schedule)
    resumed.load_state_dict(moving.state_dict())
    for net, optimizer in ((whole, first), (again, second)):
        trained(net, optimizer, 5)
    assert torch.equal(whole[0].weight, again[0].weight) and resumed.steps == 10
    state = moving.state_dict()
    state["scores"] = {"0": torch.zeros(1, 1)}
    with pytest.raises(ValueError, match="scores of this state are of other layers than 0"):
        resumed.load_state_dict(state)
    assert resumed.steps == 10


def test_what_it_refuses() -> None:
    net = model()
    plan = sc.plan(net, PLAN)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="every >= 1 step, got 0"):
        movement(net, plan, optimizer, constant(0.5), every=0)
    with pytest.raises(ValueError, match="penalty >= 0 and a rate > 0, got -1 and 1"):
        soft_movement(net, plan, optimizer, penalty=-1.0, rate=1.0)
    elsewhere = torch.optim.SGD(model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the optimizer does not update 0: make it from"):
        movement(net, plan, elsewhere, constant(0.5))
    trained(net, optimizer, 1)
    assert bool((net[0].weight != 0).all())


# --- under other trainers ------------------------------------------------------------------------


class Twice(torch.optim.AdamW):
    """Calls each closure twice, as line searches do; torch's hooks are around both `step`s."""

    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        closure()
        return super().step(closure)


def learnt(
    drive: Drive, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any
) -> tuple[Tensor, Tensor, int]:
    """The weight and the scores after four steps, and how many of them counted."""
    net = model()
    optimizer = kind(net.parameters(), lr=0.01, **options)
    moving = movement(net, sc.plan(net, PLAN), optimizer, linear(0.5, 0, 4))
    x, y = data()
    drive(lambda _: (net(x) - y).square().mean(), optimizer, None, inputs(4))
    return net[0].weight.detach(), moving.scores["0"], moving.steps


def test_it_learns_once_a_step_also_from_a_backward_inside_it() -> None:
    plain = learnt(plainly)
    assert bool(plain[1].any())
    for found in (learnt(in_closures), learnt(in_closures, Twice)):
        assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])
        assert found[2] == 4


def test_a_scaler_changes_no_scores_and_a_skipped_step_teaches_nothing() -> None:
    by_optimizer, fused = learnt(scaled), learnt(scaled, fused=True)
    assert by_optimizer[2] == fused[2] == 3
    assert bool(fused[1].isfinite().all())
    assert torch.allclose(by_optimizer[1], fused[1], atol=1e-6)
    assert torch.allclose(by_optimizer[0], fused[0], atol=1e-6)


def test_a_frozen_layer_and_one_that_is_held_are_refused() -> None:
    net = model()
    plan, optimizer = sc.plan(net, PLAN), torch.optim.SGD(net.parameters(), lr=0.1)
    net[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0 is frozen \(requires_grad=False\).*: unfreeze it"):
        movement(net, plan, optimizer, constant(0.5))
    net[0].weight.requires_grad_()
    with (
        movement(net, plan, optimizer, constant(0.5)),
        pytest.raises(
            ValueError, match="0.weight is held already: call release.. of what movement"
        ),
    ):
        movement(net, plan, optimizer, constant(0.5))


@pytest.mark.parametrize("name", ["in_proj_weight.k", "in_proj_weight.q"])
def test_a_matrix_inside_a_parameter_moves_as_one_alone(name: str) -> None:
    """One third of attention's parameter learns its mask as it does by the definition, by hand."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    own = {"q": slice(0, 8), "k": slice(8, 16)}[name[-1]]
    x = torch.randn(4, 5, 8)
    plan = {name: "unstructured:0.5@layer"}
    optimizer = torch.optim.SGD(attention.parameters(), lr=0.1, momentum=0.9)
    scores = torch.zeros(8, 8)
    mask = torch.ones(8, 8, dtype=torch.bool)
    hidden = torch.zeros(8, 8)
    with movement(attention, sc.plan(attention, plan), optimizer, constant(0.5)) as moving:
        for _ in range(4):
            optimizer.zero_grad()
            attention(x, x, x, need_weights=False)[0].square().mean().backward()
            now = attention.in_proj_weight[own].detach()
            W = torch.where(mask, now, hidden)
            scores -= attention.in_proj_weight.grad[own] * W
            optimizer.step()
            mask = sc.Unstructured(0.5, scope="layer").mask(scores)
            hidden = moving._hidden[name].clone()
            assert torch.equal(attention.in_proj_weight[own] != 0, mask)
            torch.testing.assert_close(moving.scores[name], scores)
    assert int((attention.in_proj_weight == 0).sum()) == 32
    others = [i for i in range(24) if not own.start <= i < own.stop]
    assert not (attention.in_proj_weight[others] == 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_matrix_moves_to_its_pattern(kind: str) -> None:
    model, batches = problem(kind, 3)
    plan = sc.plan(model, "2:4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with movement(model, plan, optimizer, constant(0.5)):
        for x in batches:
            optimizer.zero_grad()
            found = model(x)
            tensor = found if isinstance(found, Tensor) else found[0]  # logits, or hidden states
            tensor.square().mean().backward()
            optimizer.step()
    assert sc.check(model, plan) == dict.fromkeys(plan.layers, 0.5)
