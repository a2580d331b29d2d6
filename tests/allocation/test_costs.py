"""Costs: exact counts of parameters and bytes, and the same times that `accelerate_` decides by."""

import copy
from collections.abc import Callable, Mapping
from itertools import product

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.accelerate.report import AccelerateReport
from secateur.accelerate.verb import Timing
from secateur.allocation import Sensitivity, allocate, costs, monotone
from secateur.formats.kernels.timing import Calls

pytestmark = pytest.mark.usefixtures("no_cpu_kernels")

PATTERNS = ("2:4", "unstructured:0.9", "block:64x64@0.75")


def model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Linear(128, 256),
            nn.Linear(256, 128),
            nn.Linear(128, 6),
        )


def sensed(found: nn.Module) -> Sensitivity:
    """The magnitude lost: pruning more costs more."""

    def energy(one: nn.Module) -> float:
        return -sum(float(p.detach().square().sum()) for p in one.parameters())

    return sc.sensitivity(found, PATTERNS, energy)


def timer(microseconds: Mapping[str, float], asked: list[str]) -> object:
    """A timer that gives each candidate the time of the first word that its name begins with."""

    def compare(variants: Mapping[str, Calls], device: torch.device) -> dict[str, Timing]:
        asked.extend(variants)
        times = {
            name: next(us for start, us in microseconds.items() if name.startswith(start))
            for name in variants
        }
        return {name: Timing(us, us, us, 20) for name, us in times.items()}

    return compare


def test_parameters_are_counted() -> None:
    table = costs.parameters(sensed(model()))
    assert table.unit == "parameters"
    # 90 % of a row of 256 are 230 zeros, of a row of 128 115; 6 rows hold no block
    half, whole = 128 * 128.0, 128 * 256.0
    assert table.of == {
        "0": {"dense": whole, "2:4": half, PATTERNS[1]: 128 * 26, PATTERNS[2]: whole / 4},
        "2": {"dense": whole, "2:4": half, PATTERNS[1]: 256 * 13, PATTERNS[2]: whole / 4},
        "3": {"dense": whole, "2:4": half, PATTERNS[1]: 128 * 26, PATTERNS[2]: whole / 4},
        "4": {"dense": 768, "2:4": 384, PATTERNS[1]: 6 * 13},
    }
    assert table.dense == 3 * whole + 768


def test_bytes_are_those_of_the_smallest_format() -> None:
    found = model()
    table = costs.nbytes(found, sensed(found))
    weight = found[0].weight.detach()

    def stored(pattern: str, format: str) -> int:
        pruned = copy.deepcopy(found)
        sc.prune_(pruned, sc.plan(pruned, pattern, layers=["0"]))
        sc.pack_(pruned, format, ["0"])
        return pruned[0].packed.nbytes

    assert table.of["0"]["dense"] == weight.nbytes
    # in float32 2:4 keeps half the bytes and two bits for each kept weight
    assert table.of["0"]["2:4"] == stored("2:4", "semi24") == weight.nbytes * 17 / 32
    assert table.of["0"][PATTERNS[1]] == stored(PATTERNS[1], "bitmap")
    assert table.of["0"][PATTERNS[2]] == stored(PATTERNS[2], "block:64x64")
    half = costs.nbytes(copy.deepcopy(found).bfloat16(), sensed(found), ["semi24"])
    assert half.of["0"]["2:4"] == weight.nbytes / 2 * 9 / 16
    assert half.of["0"][PATTERNS[1]] == half.of["0"]["dense"] == weight.nbytes / 2


def test_bytes_of_choices_on_a_grid_are_those_of_its_formats() -> None:
    found = model().bfloat16()
    names = ("2:4+int4", "dense+int4", "unstructured:0.75+int4", "4:8+int4", "dense+int8")
    curves = sc.sensitivity(found, names, lambda one: float(one[0].weight.norm()))
    of = costs.nbytes(found, curves).of["0"]
    weights, scales = 128 * 256, 128 * 2 * 2  # two groups of 128 inputs a row, 16 bits each
    assert of["dense"] == 2 * weights
    half = weights // 4 + weights // 8 + scales  # and a bitmap saves what rounds to zero
    assert half - 16 <= of["2:4+int4"] <= half and half - 16 <= of["4:8+int4"] <= half
    assert of["dense+int4"] == weights // 2 + scales
    assert of["dense+int8"] == weights + 2 * 128
    # a quarter of the weights has a code, unless it rounds to zero
    assert weights // 8 + weights // 16 < of["unstructured:0.75+int4"] <= weights // 4 + scales


def test_a_choice_on_a_grid_that_nothing_runs_takes_the_time_of_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = list[str]()
    times = {"dense": 100.0, "block": 40.0, "csr": 70.0}
    monkeypatch.setattr("secateur.accelerate.verb.compare", timer(times, asked))
    found = model()
    names = ("block:64x64@0.75", "block:64x64@0.75+int4", "dense+int4")
    curves = sc.sensitivity(found, names, lambda one: float(one[0].weight.norm()))
    table = costs.milliseconds(found, curves, (4,))
    assert table.of["0"] == pytest.approx(
        {"dense": 0.1, "block:64x64@0.75": 0.04, "block:64x64@0.75+int4": 0.1, "dense+int4": 0.1}
    )


def test_milliseconds_are_what_accelerate_then_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    times = {"dense": 100.0, "block": 40.0, "csr": 70.0}
    monkeypatch.setattr("secateur.accelerate.verb.compare", timer(times, asked))
    found = model()
    curves = sensed(found)
    table = costs.milliseconds(found, curves, (4, 16))
    # two numbers of tokens; nothing here multiplies 2:4, and 6 x 128 holds no block
    expected = {"dense": 0.2, "2:4": 0.2, PATTERNS[1]: 0.14, PATTERNS[2]: 0.08}
    for name in ("0", "2", "3"):
        assert table.of[name] == pytest.approx(expected)
    assert table.of["4"] == pytest.approx({"dense": 0.2, "2:4": 0.2, PATTERNS[1]: 0.14})
    assert (table.unit, table.dense) == ("ms", pytest.approx(0.8))
    assert {name: type(module) for name, module in found.named_children()}["0"] is nn.Linear

    asked.clear()
    best = allocate(curves, table, 0.45)
    sc.prune_(found, sc.plan(found, best.patterns))
    report = sc.accelerate_(found, (4, 16))
    assert asked == []  # similar layers have been measured
    runs = sum(
        dict(one.microseconds)[one.fastest_sparse]
        for layer in report.sparse
        for one in layer.measured
    )
    dense = [name for name, one in best.best.choices.items() if one == "dense"]
    assert (runs + 200 * len(dense)) / 1e3 == pytest.approx(best.best.cost)
    assert best.best.cost <= 0.45

    costs.milliseconds(model(), curves, (4, 16), remeasure=True)
    assert asked != []


Whole = Callable[[Mapping[str, str]], float]


def measured_together(monkeypatch: pytest.MonkeyPatch, whole: Whole) -> tuple[object, Sensitivity]:
    """A model and its curves on a machine where layers together take `whole(choices)` ms."""
    times = {"dense": 100.0, "block": 40.0, "csr": 70.0}
    monkeypatch.setattr("secateur.accelerate.verb.compare", timer(times, []))
    monkeypatch.setattr(
        "secateur.allocation.costs._milliseconds_together",
        lambda linears, choices, *rest: whole(choices),
    )
    found = model()
    return found, sensed(found)


@pytest.mark.parametrize("budget", [0.3, 0.35, 0.42, 0.5, 0.52, 2.0])
def test_a_budget_of_milliseconds_holds_for_layers_together(
    monkeypatch: pytest.MonkeyPatch, budget: float
) -> None:
    """Together they take 1.3 times their sum: the choice is the best that fits, and costs that."""
    found, curves = measured_together(monkeypatch, lambda choices: 1.3 * table.total(choices))
    table = costs.milliseconds(found, curves, (4,))
    best = costs.allocate_milliseconds(found, curves, budget, (4,)).best
    assert best.cost == pytest.approx(1.3 * table.total(best.choices))
    assert best.cost <= budget
    increase = monotone(curves)
    every = [
        dict(zip(table.of, some, strict=True)) for some in product(*map(list, table.of.values()))
    ]
    least = min(
        sum(increase[layer][one] for layer, one in choices.items())
        for choices in every
        if 1.3 * table.total(choices) <= budget
    )
    assert best.increase == pytest.approx(least)


def test_a_budget_that_layers_alone_would_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together sparse layers take half as long again, dense ones do not: a plan by sums is late."""

    def whole(choices: Mapping[str, str]) -> float:
        sparse = (table.of[layer][one] for layer, one in choices.items() if one != "dense")
        return table.total(choices) + 0.5 * sum(sparse)

    found, curves = measured_together(monkeypatch, whole)
    table = costs.milliseconds(found, curves, (4,))
    assert whole(allocate(curves, table, 0.3).best.choices) > 0.3
    kept = costs.allocate_milliseconds(found, curves, 0.3, (4,))
    assert kept.best.cost == pytest.approx(whole(kept.best.choices))
    assert kept.best.cost <= 0.3
    assert kept.dense == pytest.approx(0.4)
    assert kept.best in kept.front
    assert "<- chosen" in str(kept)


def test_a_budget_of_milliseconds_that_nothing_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    found, curves = measured_together(monkeypatch, lambda choices: 1.3 * table.total(choices))
    table = costs.milliseconds(found, curves, (4,))
    with pytest.raises(
        ValueError, match=r"budget of 0.1 ms: the least that can be reached is 0.19"
    ):
        costs.allocate_milliseconds(found, curves, 0.1, (4,))
    found, curves = measured_together(
        monkeypatch, lambda choices: 0.4 if set(choices.values()) == {"dense"} else 0.3001
    )
    with pytest.raises(
        ValueError, match=r"take 0.3 ms at most: the least of \d tried is 0.3001, den"
    ):
        costs.allocate_milliseconds(found, curves, 0.3, (4,))


def test_layers_together_are_copies_that_were_pruned_and_accelerated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They run one after another, on rows of their widths; the model keeps its own layers."""
    times = {"dense": 100.0, "block": 40.0, "csr": 70.0}
    monkeypatch.setattr("secateur.accelerate.verb.compare", timer(times, []))
    outputs = list[list[tuple[int, ...]]]()

    def compare(variants: Mapping[str, Calls], device: torch.device) -> dict[str, Timing]:
        (call,) = variants["layers"]
        outputs.append([tuple(one.shape) for one in call()])  # type: ignore[attr-defined]
        us = 2e3 if len(outputs) <= 4 else 0.97e3  # all dense at first, and in the first try
        return {"layers": Timing(us, us, us, 20)}

    monkeypatch.setattr("secateur.allocation.costs.compare", compare)
    accelerated = list[list[float]]()

    def spy(copies: nn.ModuleList, *rest: object, **named: object) -> AccelerateReport:
        accelerated.append([float((one.weight == 0).double().mean()) for one in copies])
        return sc.accelerate_(copies, *rest, **named)  # type: ignore[arg-type]

    found = model()
    curves = sensed(found)
    table = costs.milliseconds(found, curves, (4, 16))
    monkeypatch.setattr("secateur.allocation.costs.accelerate_", spy)
    monkeypatch.setattr("secateur.allocation.costs.milliseconds", lambda *rest, **named: table)
    before = copy.deepcopy(found.state_dict())
    best = costs.allocate_milliseconds(found, curves, 1.95, (4, 16)).best
    assert best.cost == pytest.approx(1.94)
    shapes = [[(count, width) for width in (128, 256, 128, 6)] for count in (4, 16)]
    assert outputs == shapes * 3
    of = costs.parameters(curves).of
    zeros = [1 - of[layer][one] / of[layer]["dense"] for layer, one in best.choices.items()]
    pruned = [share for group in accelerated for share in group]
    # a copy for each pruned layer: here all of them fit
    assert sorted(pruned) == pytest.approx(sorted(share for share in zeros if share))
    assert pruned
    assert all(type(one) is nn.Linear for one in found if not isinstance(one, nn.ReLU))
    assert all(tensor.equal(before[name]) for name, tensor in found.state_dict().items())


def test_costs_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.accelerate.verb.compare", timer({"": 1.0}, []))
    found = model()
    curves = sensed(found)
    with pytest.raises(ValueError, match=r"needs a pattern that a format can store, Linear\(in_f"):
        costs.milliseconds(found, curves, (1,), ["block:128x128"])
    with pytest.raises(ValueError, match=r"unknown format 'semi42'"):
        costs.nbytes(found, curves, ["semi42"])
    with pytest.raises(ValueError, match=r"needs numbers of tokens from 1 upwards"):
        costs.milliseconds(found, curves, (0,))
    with pytest.raises(ValueError, match=r"no layer is named '0'"):
        costs.nbytes(nn.ModuleDict({"a": nn.Linear(256, 128)}), curves)


def test_what_no_format_packs_costs_the_same_in_any_pattern(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("secateur.accelerate.verb.compare", timer({"": 1.0}, []))
    found = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Linear(256, 128), nn.LSTM(8, 4, bias=False))
    curves = sc.sensitivity(found, ["2:4", "unstructured:0.9"], lambda _: 0.0)
    with pytest.warns(UserWarning, match=r"3 of 4 sensed layers, first 0, .* saves no bytes there"):
        table = costs.nbytes(found, curves)
    for name, size in (("0", 32), ("2.weight_ih_l0", 128), ("2.weight_hh_l0", 64)):
        assert table.of[name] == dict.fromkeys(("dense", "2:4", "unstructured:0.9"), 4.0 * size)
    assert table.of["1"]["2:4"] < table.of["1"]["dense"] == 4 * 128 * 256
    with pytest.warns(UserWarning, match="saves no ms there"):
        timed = costs.milliseconds(found, curves, (1,))
    assert timed.of["0"] == dict.fromkeys(("dense", "2:4", "unstructured:0.9"), 0.0)
    assert timed.of["1"]["dense"] == 1e-3
    recurrent = nn.Sequential(nn.LSTM(8, 4, bias=False))
    curves = sc.sensitivity(recurrent, ["2:4"], lambda _: 0.0)
    with pytest.raises(ValueError, match=r"no sensed layer is of a kind that a format packs, fir"):
        costs.nbytes(recurrent, curves)
