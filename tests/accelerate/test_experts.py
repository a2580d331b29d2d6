"""Experts are judged as the whole that runs them, and stay in stacks where that is no faster."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.accelerate.report import AccelerateReport
from secateur.accelerate.verb import _accelerate
from secateur.core.undo import Undo
from secateur.formats.experts import SparseExperts
from secateur.formats.kernels.timing import Calls, Timing
from tests.model.test_experts import FIRST, mixture

FORMATS = ("block:4x8", "csr")
NAMES = [f"{FIRST}.{stack}.{i}" for stack in ("gate_up_proj", "down_proj") for i in range(4)]


class Clock:
    """Matrices are faster packed; experts take what is prescribed at each number of tokens."""

    def __init__(self, packed: Mapping[int, float], fails: bool = False) -> None:
        self.packed, self.fails = packed, fails
        self.asked: list[tuple[str, ...]] = []
        self.seen: list[Any] = []

    def __call__(self, variants: Mapping[str, Calls], device: torch.device) -> dict[str, Timing]:
        results = {name: [call() for call in calls] for name, calls in variants.items()}
        self.asked.append(tuple(variants))
        if "packed" not in variants:
            times = {name: 100.0 if name.startswith("dense") else 50.0 for name in variants}
        elif self.fails:
            raise RuntimeError("out of order\nand more")
        else:
            self.seen.append(results)
            (tokens,) = {len(y) for found in results.values() for y in found}  # type: ignore[arg-type]
            times = {"dense": 100.0, "grouped_mm": 90.0, "packed": self.packed[tokens]}
        return {name: Timing(times[name], times[name], times[name], 20) for name in variants}


def run(clock: Clock, tokens: Any = (1, 16)) -> tuple[nn.Module, AccelerateReport]:
    model = mixture()
    sc.prune_(model, sc.plan(model, {FIRST + ".*": "block:4x8@0.5"}))
    return model, _accelerate(Undo(), model, tokens, FORMATS, NAMES, False, clock)


def test_experts_that_gain_run_packed_and_the_report_says_what_was_measured() -> None:
    clock = Clock({1: 45.0, 16: 90.0})
    model, report = run(clock)
    assert isinstance(model.get_submodule(FIRST), SparseExperts)
    assert {row.layer for row in report.changed} == set(NAMES)
    told = (
        "faster than dense at every number of tokens; its experts, run one after another, take "
        "45.0 us packed and 90.0 dense at 1 token, 90.0 us packed and 90.0 dense at 16 tokens"
    )
    assert {row.reason for row in report.layers} == {told}
    assert clock.asked.count(("dense", "grouped_mm", "packed")) == 2


@pytest.mark.parametrize(
    ("packed", "stays"),
    [
        ({1: 90.0 / 1.04, 16: 90.0 / 1.04}, True),  # no gain worth a change
        ({1: 45.0, 16: 90.0 / 0.96}, True),  # a loss at one number of tokens
        ({1: 90.0 / 1.06, 16: 90.0 / 0.98}, False),
    ],
)
def test_the_thresholds_are_those_of_layers(packed: dict[int, float], stays: bool) -> None:
    model, report = run(Clock(packed))
    assert isinstance(model.get_submodule(FIRST), SparseExperts) != stays
    assert bool(report.changed) != stays
    if stays:
        told = "its experts, run one after another, take "
        assert all(row.reason.startswith(told) for row in report.layers)
        assert model.get_parameter(f"{FIRST}.down_proj").dim() == 3


def test_what_cannot_be_measured_stays_dense() -> None:
    _, report = run(Clock({}, fails=True))
    assert not report.changed
    (reason,) = {row.reason for row in report.layers}
    assert reason == "its experts could not be measured: out of order"


def test_packed_and_dense_are_asked_the_same_and_give_the_same() -> None:
    clock = Clock({1: 45.0, 16: 45.0})
    run(clock)
    for results in clock.seen:
        for one, grouped, packed in zip(*results.values(), strict=True):
            torch.testing.assert_close(packed, one, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(grouped, one, atol=1e-6, rtol=1e-4)
        assert not torch.equal(results["packed"][0], results["packed"][-1])  # routed anew


def test_a_call_runs_the_experts_that_its_tokens_choose() -> None:
    """2 of 4 at one token; at n tokens one of them is missed by all with chance 2^-n."""
    _, report = run(Clock({1: 45.0, 2: 45.0}), tokens=(1, 2))
    for row in report.layers:
        assert row.chosen == (0.5, 0.75)
        assert row.us == (25.0, 37.5) and row.dense_us == (50.0, 75.0)
    assert "a call takes 0.200 ms instead of 0.400 at 1 token (2.00x)" in report.gain


def test_like_experts_are_measured_once() -> None:
    clock = Clock({1: 45.0})
    model = mixture()
    sc.prune_(model, sc.plan(model, {"*.experts.*": "block:4x8@0.5"}))
    _accelerate(Undo(), model, (1,), FORMATS, None, False, clock)
    assert sum(isinstance(m, SparseExperts) for m in model.modules()) == 2
    assert clock.asked.count(("dense", "grouped_mm", "packed")) == 1
