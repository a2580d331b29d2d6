"""What is rehearsed, on how much data, and how it is scaled to the rest."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.model.plan import match
from secateur.patterns import Pattern
from secateur.reconstruct import Solution
from secateur.reconstruct.rehearsal import (
    Passes,
    Solved,
    Stage,
    _forwards_to_stages,
    _stand_ins,
    rehearse,
    seconds_of_a_forward,
    seconds_of_a_step,
    slower_in_float32,
    stages_of,
)
from tests.models import Decoder

WIDTH = 32


def stage(outputs: int, inputs: int, tokens: int = 10) -> Stage:
    return Stage("b", ("x",), ((outputs, inputs),), tokens)


def test_what_depends_on_the_input_grows_with_its_cube() -> None:
    solved = Solved(shared=2.0, own=3.0, inputs=10, outputs=20)
    assert solved.scaled_to(stage(20, 10)) == 5.0
    assert solved.scaled_to(stage(20, 20)) == 2 * 8 + 3 * 4
    assert solved.scaled_to(stage(60, 10)) == 2 + 3 * 3


def test_blocks_take_as_long_in_proportion() -> None:
    one = Passes(1.0, 2.0, 3.0, 4.0)
    assert one.times(2.0) == Passes(2.0, 4.0, 6.0, 8.0) and one.plus(one) == one.times(2.0)


def test_each_run_ends_at_its_stage() -> None:
    """The run to the second stage does the first's work, the run to the third the work of both."""
    inside = [stage(30, 10), stage(10, 10), stage(40, 10)]
    assert _forwards_to_stages(inside) == pytest.approx((3 + 4) / 8)


def test_those_with_most_work_stand_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal = importlib.import_module("secateur.reconstruct.rehearsal")
    monkeypatch.setattr(rehearsal, "KINDS", 2)
    kinds = {"a": "small", "b": "wide", "c": "small", "d": "odd", "e": "small", "f": "lone"}
    work = {"a": 4.0, "b": 9.0, "c": 4.0, "d": 5.0, "e": 4.0, "f": 8.0}
    found = _stand_ins(kinds, work, ["b", "c", "d", "e", "f"])
    assert found == {"a": "c", "c": "c", "e": "c", "b": "b", "d": "c", "f": "b"}


class Spy:
    """An algorithm that records the shapes it was given, and prunes by the pattern."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.tokens: list[Tensor] = []

    def __call__(
        self, weight: Tensor, pattern: Pattern, gram: Tensor, memo: Any = None
    ) -> Solution:
        assert gram.shape == (weight.shape[1],) * 2
        self.shapes.append(tuple(weight.shape))
        return Solution(weight, pattern.mask(weight.abs()))


def run(
    model: nn.Module, spy: Spy, pattern: str = "2:4", batches: list[Tensor] | None = None
) -> tuple[list[Passes], float, list[Stage]]:
    plan = sc.plan(model, pattern)
    layers = match(model, plan)
    given = batches or list(torch.randint(20, (4, 4, 16)))
    stages = list(stages_of(model, layers, given[0]))
    passes, seconds = rehearse(model, layers, plan.layers, given, sc.blockwise(spy), stages)
    return passes, seconds, stages


def test_of_equal_blocks_one_is_rehearsed() -> None:
    torch.manual_seed(0)
    spy = Spy()
    passes, _, stages = run(Decoder(width=WIDTH, blocks=3), spy)
    assert len(stages) == 12 and len(passes) == 3 and len(set(passes)) == 1
    # q, k and v twice, the first time to warm up, then o, up and down
    assert spy.shapes == [(32, 32)] * 7 + [(64, 32), (32, 64)]
    assert all(seconds > 0 for seconds in vars(passes[0]).values())


def test_of_a_large_layer_a_part_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal = importlib.import_module("secateur.reconstruct.rehearsal")
    monkeypatch.setattr(rehearsal, "PROBE", {"cpu": 16})
    monkeypatch.setattr(rehearsal, "WARM", 4)
    spy = Spy()
    run(Decoder(width=WIDTH, blocks=2), spy)
    assert spy.shapes == [(4, 4)] * 3 + [(16, 16)] * 6
    spy = Spy()
    run(Decoder(width=WIDTH, blocks=2), spy, "block:32x32@0.5")  # does not fit a part
    assert set(spy.shapes) == {(32, 32), (64, 32), (32, 64)}


def test_layers_are_solved_on_enough_tokens_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least four tokens for each of 64 inputs: four of the eight batches of 64 tokens."""
    rehearsal = importlib.import_module("secateur.reconstruct.rehearsal")
    seen = list[int]()

    def observe(model: Any, layers: Any, batches: Any, *given: Any, **options: Any) -> Any:
        seen.append(len(batches))
        return original(model, layers, batches, *given, **options)

    original = rehearsal.observe
    monkeypatch.setattr(rehearsal, "observe", observe)
    run(Decoder(width=WIDTH, blocks=2), Spy(), batches=list(torch.randint(20, (8, 4, 16))))
    assert seen == [1, 4]
    seen.clear()
    run(Decoder(width=WIDTH, blocks=2), Spy(), batches=list(torch.randint(20, (1, 4, 16))))
    assert seen == [1, 2]  # half-blocks need a batch to hold out: the same one again


def test_without_blocks_the_whole_model_runs_for_each_stage() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    spy = Spy()
    (one,), _, stages = run(model, spy, batches=list(torch.randn(2, 6, 8)))
    assert [s.shapes for s in stages] == [((8, 8),), ((4, 8),)] and spy.shapes == [
        (8, 8),
        (8, 8),
        (4, 8),
    ]
    assert one.forward == one.step == one.look == 0 and one.batch > 0


def test_pieces_of_the_whole_model_are_timed_and_thrown_away() -> None:
    torch.manual_seed(0)
    model = Decoder(width=WIDTH, blocks=2)
    layers = match(model, sc.plan(model, "2:4"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(20, (4, 16))
    assert seconds_of_a_forward(model, ids) > 0 and seconds_of_a_step(model, layers, ids) > 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_only_16_bits_are_slower_in_float32() -> None:
    cpu = torch.device("cpu")
    assert slower_in_float32([stage(8, 8)], torch.float32, cpu) == 1.0
    assert slower_in_float32([stage(8, 8)], torch.bfloat16, cpu) > 0
