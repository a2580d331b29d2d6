"""RigL and SET: transcribed, exact at every move, the same in every process and after a stop."""

import copy
import hashlib
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.allocation import erk
from secateur.train import rigl, sparse_evolution
from secateur.train.dynamic import DropAndGrow, uniform
from tests.models import ConvNet
from tests.train import two_processes
from tests.train.trainers import (
    LOOPS,
    OPTIMIZERS,
    all_of,
    goal,
    in_closures,
    inputs,
    plainly,
)

ROOT = Path(__file__).parents[2]
MAKERS: dict[str, Callable[..., DropAndGrow]] = {"rigl": rigl, "set": sparse_evolution}
PATTERNS = (
    "unstructured:0.8",
    "unstructured:0.8@layer",
    "unstructured:0.5@group4",
    "2:8",
    "3:4",
    "block:4x2@0.6",
    "channels:0.5",
    "channels:0.25@in",
)


def net(pattern: str = "unstructured:0.75@layer") -> tuple[nn.Sequential, sc.Plan]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
    plan = sc.plan(model, pattern, layers=["0"])
    sc.prune_(model, plan, sc.criteria.random)
    return model, plan


def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: goal(model(x), x)


# --- one move -------------------------------------------------------------------------------------


def test_a_move_is_that_of_algorithm_1() -> None:
    """Element by element: the smallest go, the largest gradients come, dropped ones among them."""
    model, plan = net()
    rule = rigl(plan, 40, every=10, fraction=0.5)
    generator = torch.Generator().manual_seed(2)
    weight = model[0].weight.detach()
    gradient = torch.randn(24, 16, generator=generator)
    mask = weight != 0
    moved = rule("0", weight, mask, 10, gradient)

    kept = [(i, j) for i in range(24) for j in range(16) if mask[i, j]]
    count = int(0.25 * (1 + math.cos(math.pi / 4)) * len(kept))
    stays = sorted(kept, key=lambda at: -abs(float(weight[at])))[: len(kept) - count]
    others = [(i, j) for i in range(24) for j in range(16) if (i, j) not in stays]
    grown = sorted(others, key=lambda at: -abs(float(gradient[at])))[:count]
    assert {tuple(at) for at in moved.nonzero().tolist()} == {*stays, *grown}
    assert count == 40 and 0 < len(set(grown) & set(kept)) < count


def test_every_output_of_srigl_has_a_constant_fan_in() -> None:
    """Drops are the smallest of the layer; each row then grows as many as it lacks."""
    model, plan = net("unstructured:0.75")
    weight = model[0].weight.detach().clone()
    weight[3] *= 0.01  # this output loses all that it had
    gradient = torch.rand(24, 16, generator=torch.Generator().manual_seed(2))
    mask = weight != 0
    moved = rigl(plan, 10**9, every=1, fraction=0.2)("0", weight, mask, 1, gradient)
    assert moved.sum(1).tolist() == [4] * 24
    assert sorted(gradient[3][moved[3]]) == sorted(gradient[3].topk(4).values)
    smallest = weight.abs().masked_fill(~mask, torch.inf).flatten().argsort()[:19]
    stays = mask.flatten().index_fill(0, smallest, False).view(24, 16)
    assert bool(moved[stays].all()) and int(stays.sum()) == 96 - 19


def test_blocks_are_dropped_and_grown_whole_by_their_sums() -> None:
    """The smallest single weights are in the block that stays."""
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    plan = sc.plan(model, "block:2x3@0.5")
    sizes = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    slopes = torch.tensor([[0.0, 0.5], [0.7, 0.2]])
    whole = torch.ones(2, 3)
    rule = rigl(plan, 10**9, every=1, fraction=0.5)
    weight = torch.kron(sizes, torch.tensor([[1.0, 1.0, 1.0], [0.1, 0.1, 0.1]]))
    weight[0, :3], weight[1, :3] = 0.6, 0.6
    moved = rule("0", weight, weight != 0, 1, torch.kron(slopes, whole))
    assert torch.equal(moved, torch.kron(torch.tensor([[0, 1], [1, 0]]), whole).bool())


def test_the_fraction_decays_as_half_a_cosine_and_ends() -> None:
    model, plan = net("unstructured:0.5@layer")
    weight = model[0].weight.detach()
    mask = weight != 0
    rule = sparse_evolution(plan, 100, every=10, fraction=0.4)
    for step in range(1, 131):
        gone = mask & ~rule("0", weight, mask, step)
        share = 0.2 * (1 + math.cos(math.pi * step / 100)) if step % 10 == 0 and step < 100 else 0.0
        # Of those dropped about half grow again, by chance.
        assert int(gone.sum()) <= int(share * 192)
        assert (int(gone.sum()) >= int(share * 192) // 4) or share < 0.05
    assert rule("other", weight, mask, 10) is mask


def test_where_no_gradient_is_nothing_moves() -> None:
    model, plan = net()
    rule, weight = rigl(plan, 100, every=1), model[0].weight.detach()
    mask = weight != 0
    assert torch.equal(rule("0", weight, mask, 1, torch.zeros(24, 16)), mask)


def splitmix64(start: int, count: int) -> list[int]:
    """As published, in whole numbers."""
    found = []
    for i in range(1, count + 1):
        z = (start + i * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(z ^ (z >> 31))
    return found


def test_random_numbers_are_splitmix64s() -> None:
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]
    start = int.from_bytes(hashlib.blake2b(b"0/name/7", digest_size=8).digest(), "little")
    expected = [number // 2**40 / 2**24 for number in splitmix64(start, 4096)]
    found = uniform("0/name/7", torch.empty(64, 64, dtype=torch.float64)).flatten()
    assert found.tolist() == expected
    assert abs(float(found.mean()) - 0.5) < 5 / math.sqrt(12 * 4096)
    assert not torch.equal(found, uniform("0/name/8", torch.empty(1, 4096)).flatten())


# --- laws -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(MAKERS)),
    pattern=st.sampled_from(PATTERNS),
    every=st.integers(1, 3),
    fraction=st.floats(0.05, 0.95),
    optimizer=st.sampled_from(["SGD", "AdamW", "Adafactor", "Muon"]),
)
def test_density_is_exact_after_every_step_and_no_weight_outside(
    name: str, pattern: str, every: int, fraction: float, optimizer: str
) -> None:
    model, plan = net(pattern)
    given = OPTIMIZERS[optimizer](model)
    kept = int((model[0].weight != 0).sum())
    held = sc.hold(model, given, MAKERS[name](plan, 8, every=every, fraction=fraction))
    for x in inputs(9):
        before, last = held.masks["0"], held.moves.get("0")
        plainly(loss_of(model), given, held, [x])
        mask, move = held.masks["0"], held.moves.get("0")
        assert int(mask.sum()) == kept
        assert held.came_back() == {}
        sc.check(model, plan)
        changed = int((before & ~mask).sum()), int((mask & ~before).sum())
        assert changed == ((0, 0) if move is last else move[1:])  # type: ignore[index]
        assert move is None or move.dropped == move.grown > 0
        assert held.steps < 8 or mask is before
    held.release()


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(sorted(MAKERS)),
    pattern=st.sampled_from(PATTERNS),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    stop=st.integers(1, 6),
)
def test_a_resumed_run_is_the_uninterrupted_one(
    name: str, pattern: str, optimizer: str, stop: int
) -> None:
    def begun() -> tuple[nn.Sequential, Any, Any]:
        model, plan = net(pattern)
        given = OPTIMIZERS[optimizer](model)
        return model, given, sc.hold(model, given, MAKERS[name](plan, 12, every=2))

    data = inputs(8)
    model, given, held = begun()
    plainly(loss_of(model), given, held, data[:stop])
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(held.state_dict())
    kept = [copy.deepcopy(one.state_dict()) for one in all_of(given)]
    plainly(loss_of(model), given, held, data[stop:])

    again, other, resumed = begun()
    again.load_state_dict(weights)
    for one, saved in zip(all_of(other), kept, strict=True):
        one.load_state_dict(saved)
    resumed.load_state_dict(state, reapply=True)
    plainly(loss_of(again), other, resumed, data[stop:])
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(held.masks["0"], resumed.masks["0"])
    held.release()
    resumed.release()


# --- in a loop ------------------------------------------------------------------------------------


def mask_after(loop: Any, early: bool = False, steps: int = 4, **options: Any) -> tuple[Any, int]:
    model, plan = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **options)
    held = sc.hold(model, optimizer, rigl(plan, 100, every=2))
    if early:
        held.mask_gradients_early()
    loop(loss_of(model), optimizer, held, inputs(steps))
    assert held.moves["0"].grown > 0
    return held.masks["0"], held.steps


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", sorted(LOOPS))
def test_what_grows_does_not_depend_on_when_gradients_are_masked(name: str, early: bool) -> None:
    """Nor on fused updates; and it does depend on all gradients that were accumulated."""
    alone = mask_after(LOOPS[name])[0]
    assert torch.equal(mask_after(LOOPS[name], early)[0], alone)
    assert torch.equal(mask_after(LOOPS[name], early, fused=True)[0], alone)


def test_closures_grow_as_plain_loops_do_and_skipped_steps_move_nothing() -> None:
    plain = mask_after(plainly)
    closed = mask_after(in_closures)
    assert torch.equal(plain[0], closed[0]) and plain[1] == closed[1] == 4
    data = inputs(5)
    model, plan = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    held = sc.hold(model, optimizer, rigl(plan, 100, every=2))
    held.mask_gradients_early()
    LOOPS["scaler"](loss_of(model), optimizer, held, data)  # skips the second
    other, plan = net()
    second = torch.optim.SGD(other.parameters(), lr=0.05)
    expected = sc.hold(other, second, rigl(plan, 100, every=2))
    plainly(loss_of(other), second, expected, [data[0], *data[2:]])
    assert held.steps == expected.steps == 4
    assert torch.equal(held.masks["0"], expected.masks["0"])


def test_accumulated_gradients_are_one_even_if_each_backward_is_masked() -> None:
    """Two halves of a batch against the whole: what was masked is added up, once."""
    found = []
    for halves, early in ((1, False), (2, False), (2, True)):
        model, plan = net()
        model.double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        held = sc.hold(model, optimizer, rigl(plan, 100, every=2))
        if early:
            held.mask_gradients_early()
        for x in inputs(6):
            for part in x.double().chunk(halves):
                (goal(model(part), part) / halves).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(held.masks["0"])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_convolution_and_a_second_optimizer_move_too() -> None:
    torch.manual_seed(0)
    model = ConvNet()
    plan = sc.plan(model, "1:4", layers=["down"])
    sc.prune_(model, plan, sc.criteria.random)
    others = [p for p in model.parameters() if p is not model.down.weight]
    optimizers = [torch.optim.SGD(others, lr=0.1), torch.optim.AdamW([model.down.weight])]
    with sc.hold(model, optimizers, rigl(plan, 10, every=1)) as held:
        for _ in range(3):
            model(torch.randn(1, 4, 8, 8)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert set(held.moves) == {"down"} and held.moves["down"].step == 3
    sc.check(model, plan)


def test_gradients_of_a_step_that_another_optimizer_took_are_forgotten() -> None:
    """They would be added to the next ones where gradients are set to zero in place."""
    found = []
    for set_to_none in (True, False):
        model, plan = net()
        others = [p for p in model.parameters() if p is not model[0].weight]
        ahead, behind = torch.optim.SGD(others, lr=0.1), torch.optim.SGD([model[0].weight], lr=0.1)
        held = sc.hold(model, [ahead, behind], rigl(plan, 100, every=3, fraction=0.5))
        for i, x in enumerate(inputs(4)):
            loss_of(model)(x).backward()
            ahead.step()
            if i:
                behind.step()
            for one in (ahead, behind):
                one.zero_grad(set_to_none)
        assert held.moves["0"].step == 3
        found.append(held.masks["0"])
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW fused", "RMSprop", "Muon"])
def test_a_grown_weight_starts_anew_for_the_optimizer(name: str) -> None:
    """Kept weights have the moments that they would have; grown ones have none."""
    model, plan = net()
    optimizer = OPTIMIZERS[name](model)
    held = sc.hold(model, optimizer, sparse_evolution(plan, 100, every=4, fraction=0.9))
    drops = []
    for x in inputs(8):
        before = held.masks["0"]
        plainly(loss_of(model), optimizer, held, [x])
        grown = held.masks["0"] & ~before
        moments = [
            value
            for one in all_of(optimizer)
            for value in one.state[model[0].weight].values()
            if value.shape == (24, 16)
        ]
        assert moments
        for value in moments:
            assert not bool(value[grown].any())
            assert bool(value[held.masks["0"] & before].any())
        drops.append(int(grown.sum()))
        assert not bool(model[0].weight[grown].any())
    # By the second move some weights come back that had moments when they were dropped.
    assert drops[3] > 0 and drops[7] > 0


class Stacks(nn.Module):
    """Two experts in 3-D parameters, as transformers' modules are known by."""

    has_gate, has_bias = False, False

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.config = SimpleNamespace(_experts_implementation=None)
        self.up_proj = nn.Parameter(torch.randn(2, 16, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (x @ self.up_proj).tanh().sum(0).unflatten(1, (4, 3)).sum(2)
        return out


@pytest.mark.parametrize("is_transposed", [False, True])
def test_experts_of_a_stack_move_and_start_anew_each_in_its_part(
    is_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two experts one is planned; what the optimizer knows of the other stays."""
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", SimpleNamespace())
    torch.manual_seed(0)
    model = nn.Sequential(Stacks(is_transposed))
    plan = sc.plan(model, "unstructured:0.75@layer", layers=["0.up_proj.1"])
    sc.prune_(model, plan, sc.criteria.random)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with sc.hold(model, optimizer, rigl(plan, 100, every=2)) as held:
        for _ in range(4):
            plainly(loss_of(model), optimizer, held, inputs(1))
            weights, moments = model[0].up_proj, optimizer.state[model[0].up_proj]["exp_avg"]
            mask = held.masks["0.up_proj.1"]
            mask = mask.mT if is_transposed else mask
            grown = mask & (weights[1] == 0)
            assert int(mask.sum()) == 48 and not bool(weights[1][~mask].any())
            assert bool(moments[0].all()) and bool(moments[1][mask & ~grown].all())
            assert not bool(moments[1][grown].any())
        assert set(held.moves) == {"0.up_proj.1"} and held.moves["0.up_proj.1"].step == 4
        assert int(grown.sum()) == held.moves["0.up_proj.1"].grown > 0


def test_a_table_whose_gradients_are_sparse_moves_by_its_rows_gradients() -> None:
    """Only rows that were looked up have a gradient, so all that grows is in one of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8, sparse=True))
    plan = sc.plan(model, "unstructured:0.75@layer", layers=["0"])
    sc.prune_(model, plan, sc.criteria.random)
    optimizer = torch.optim.SparseAdam(list(model.parameters()), lr=0.01)
    with sc.hold(model, optimizer, rigl(plan, 100, every=1, fraction=0.2)) as held:
        before = held.masks["0"]
        model(torch.tensor([2, 3, 3])).sub(1).square().sum().backward()
        optimizer.step()
        grown = held.masks["0"] & ~before
    assert set(grown.nonzero()[:, 0].tolist()) <= {2, 3} and int(grown.sum()) > 0
    sc.check(model, plan)


def test_erk_and_uniform_densities_are_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    plan = sc.plan(model, erk(model, "unstructured:0.9@layer"))
    sc.prune_(model, plan, sc.criteria.random)
    counts = [int((model[i].weight != 0).sum()) for i in (0, 2)]
    assert counts[1] / 256 > 0.2 > counts[0] / 1024
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with sc.hold(model, optimizer, rigl(plan, 100, every=1)) as held:
        plainly(loss_of(model), optimizer, held, inputs(5))
    assert [int(held.masks[name].sum()) for name in ("0", "2")] == counts


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_two_processes_agree_with_one_that_sees_both_batches(tmp_path: Path, name: str) -> None:
    """Even if each has a gradient of its own batch, from before they are averaged."""
    code = "import sys; from tests.train.two_processes import move; move(*sys.argv[1:])"
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(r), str(tmp_path), name], cwd=ROOT)
        for r in (0, 1)
    ]
    whole = two_processes.moved(name, [0, 1])
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert len(whole["masks"]) == 3 and not torch.equal(whole["masks"][0], whole["masks"][2])
    for first, second, alone in zip(*(f["masks"] for f in (*found, whole)), strict=True):
        assert torch.equal(first, second) and torch.equal(first, alone)
    for one, two in zip(found[0]["weights"], found[1]["weights"], strict=True):
        assert torch.equal(one, two)


# --- refused --------------------------------------------------------------------------------------


def test_what_they_refuse() -> None:
    model, plan = net()
    with pytest.raises(ValueError, match="rigl needs every >= 1 step and end >= 1, got 0 and 5"):
        rigl(plan, 5, every=0)
    with pytest.raises(ValueError, match=r"sparse_evolution drops a fraction .*\(0, 1\), got 1"):
        sparse_evolution(plan, 5, fraction=1.0)
    model[0].weight.data += 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="0 has 0 zeros of 384, not 288: what drops and grows"):
        sc.hold(model, optimizer, rigl(plan, 5))
    plainly(lambda x: F.mse_loss(model(x), x[:, :4]), optimizer, None, inputs(1))
