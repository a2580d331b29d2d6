"""The knapsack: equal to trying everything, within the budget, and honest where nothing fits."""

import itertools
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import secateur as sc
from secateur.allocation import Allocation, Costs, Sensitivity, allocate, monotone

PATTERNS = ("unstructured:0.5", "unstructured:0.8", "2:4")


def sensitivity(
    increase: dict[str, dict[str, float | None]], patterns: tuple[str, ...] = PATTERNS
) -> Sensitivity:
    return Sensitivity(
        "magnitude", 1.0, patterns, dict.fromkeys(increase, (8, 8)), increase, {}, {}
    )


def curves(*rows: tuple[float | None, ...]) -> Sensitivity:
    return sensitivity(
        {f"layer{i}": dict(zip(PATTERNS, row, strict=True)) for i, row in enumerate(rows)}
    )


def prices(*rows: tuple[float, ...]) -> Costs:
    """Dense first, then the patterns."""
    of = {
        f"layer{i}": dict(zip(("dense", *PATTERNS), row, strict=True)) for i, row in enumerate(rows)
    }
    return Costs("ms", of)


row = st.tuples(*[st.integers(0, 20).map(float)] * 3)
price = st.tuples(*[st.integers(0, 20).map(float)] * 4)


@settings(max_examples=20)
@given(st.lists(st.tuples(row, price), min_size=1, max_size=4), st.integers(0, 60).map(float))
def test_it_is_as_good_as_the_best_of_all_choices(
    layers: list[tuple[tuple[float, ...], tuple[float, ...]]], budget: float
) -> None:
    found = curves(*(one for one, _ in layers))
    costs = prices(*(one for _, one in layers))
    increase = monotone(found)
    possible = [
        (sum(increase[n][c] for n, c in choices.items()), costs.total(choices))
        for picked in itertools.product(("dense", *PATTERNS), repeat=len(layers))
        for choices in [dict(zip(increase, picked, strict=True))]
    ]
    within = [loss for loss, cost in possible if cost <= budget]
    if not within:
        least = min(cost for _, cost in possible)
        why = rf"can be reached is {least:g}, dense is" if least < costs.dense else "costs less ms"
        with pytest.raises(ValueError, match=why):
            allocate(found, costs, budget)
        return
    best = allocate(found, costs, budget)
    assert best.best.increase == pytest.approx(min(within), abs=1e-4)
    assert best.best.cost == costs.total(best.best.choices) <= budget
    assert best.best in best.front
    for cheaper, dearer in itertools.pairwise(best.front):
        assert cheaper.cost <= dearer.cost
        assert cheaper.increase >= dearer.increase or best.best in (cheaper, dearer)


EVERY_KIND = (
    *("2:4", "4:8", "block:64x64@0.8", "unstructured:0.5"),
    *("dense+int4", "2:4+int4", "unstructured:0.5+int4"),
)
figures = st.tuples(*[st.integers(0, 20).map(float)] * (2 * len(EVERY_KIND)))


@settings(max_examples=30)
@given(st.lists(figures, min_size=1, max_size=6), st.floats(0.3, 1.5))
def test_a_mixture_keeps_to_the_budget_and_is_no_worse_than_one_choice_for_all(
    layers: list[tuple[float, ...]], share: float
) -> None:
    names = [f"layer{i}" for i in range(len(layers))]
    increase = {
        name: dict(zip(EVERY_KIND, of, strict=False))
        for name, of in zip(names, layers, strict=True)
    }
    of = {
        name: {"dense": 16.0, **dict(zip(EVERY_KIND, found[len(EVERY_KIND) :], strict=True))}
        for name, found in zip(names, layers, strict=True)
    }
    curves, costs = sensitivity(increase, EVERY_KIND), Costs("ms", of)
    budget = share * costs.dense
    uniform = [dict.fromkeys(names, one) for one in ("dense", *EVERY_KIND)]
    within = [choices for choices in uniform if costs.total(choices) <= budget]
    if not within:
        return
    best = allocate(curves, costs, budget).best
    assert costs.total(best.choices) == best.cost <= budget
    known = monotone(curves)
    for choices in within:
        lost = sum(known[name][one] for name, one in choices.items())
        assert best.increase <= lost + 1e-4


def test_a_mixture_is_made_in_a_pass_for_each_grid() -> None:
    names = ("dense+int4", "2:4", "2:4+int4")
    increase = {f"layer{i}": dict(zip(names, (0.1, 1.0, 1.2), strict=True)) for i in range(3)}
    cost = {"dense": 16.0, "dense+int4": 8.0, "2:4": 9.0, "2:4+int4": 3.0}
    found = allocate(sensitivity(increase, names), Costs("ms", dict.fromkeys(increase, cost)), 19.0)
    assert sorted(found.best.choices.values()) == ["2:4+int4", "dense+int4", "dense+int4"]
    (grid,) = found.by_grid
    assert grid == sc.Int4()
    assert sorted(map(str, found.by_grid[grid].values())) == ["2:4", *2 * ["unstructured:0"]]
    assert list(map(str, found.patterns.values())) == ["2:4"]


def test_the_choices_are_a_mapping_that_plan_takes() -> None:
    # layer1 suffers most: it is the dense one where the budget has room for one
    costs = prices((10.0, 5.0, 2.0, 4.0), (10.0, 5.0, 2.0, 4.0), (10.0, 5.0, 2.0, 4.0))
    found = allocate(curves((1.0, 2.0, 3.0), (5.0, 9.0, 8.0), (1.0, 2.0, 3.0)), costs, 20.0)
    assert found.best.choices["layer1"] == "dense"
    assert {n: str(p) for n, p in found.patterns.items()} == {
        "layer0": "unstructured:0.5",
        "layer2": "unstructured:0.5",
    }
    assert (found.best.cost, found.best.increase) == (20, 2)


def test_the_k_most_sensitive_layers_stay_dense() -> None:
    found = curves((0.0, 0.0, 0.3), (0.0, 0.0, 0.1), (0.0, 0.0, 0.9), (0.0, 0.0, 0.2))
    costs = Costs("dense layers", {name: {"dense": 1.0, "2:4": 0.0} for name in found.increase})
    for k, dense in ((0, set()), (1, {2}), (2, {2, 0}), (3, {2, 0, 3})):
        best = allocate(found, costs, float(k)).best
        assert {n for n, c in best.choices.items() if c == "dense"} == {f"layer{i}" for i in dense}


def test_a_pattern_that_is_no_cheaper_than_dense_is_never_chosen() -> None:
    found = allocate(
        curves((0.0, 0.1, 0.1), (0.1, 0.1, 0.1)),
        prices((5.0, 6.0, 5.0, 7.0), (5.0, 5.0, 9.0, 3.0)),
        8.0,
    )
    assert found.best.choices == {"layer0": "dense", "layer1": "2:4"}


def test_curves_are_made_monotone_kind_by_kind() -> None:
    patterns = ("unstructured:0.8", "unstructured:0.5", "2:4", "1:4", "unstructured:0.7@layer")
    increase = dict(zip(patterns, (0.2, 0.3, 0.25, None, -0.1), strict=True))
    assert monotone(sensitivity({"layer": increase}, patterns))["layer"] == {
        "dense": 0,
        "unstructured:0.5": 0.3,
        "unstructured:0.8": 0.3,
        "2:4": 0.25,
        "unstructured:0.7@layer": 0,
    }


def test_a_budget_that_no_choice_meets_says_the_best_reachable() -> None:
    with pytest.raises(
        ValueError,
        match=r"keeps to a budget of 3\.5 ms: the least that can be reached is 4, dense is 20: rai",
    ):
        allocate(
            curves((1.0, 2.0, 3.0), (1.0, 2.0, 3.0)),
            prices((10.0, 5.0, 2.0, 4.0), (10.0, 5.0, 2.0, 4.0)),
            3.5,
        )
    with pytest.raises(ValueError, match="keeps to a budget of nan"):
        allocate(curves((1.0, 2.0, 3.0)), prices((10.0, 5.0, 2.0, 4.0)), float("nan"))


def test_layers_without_a_cost_are_refused() -> None:
    with pytest.raises(ValueError, match=r"needs the cost of layer1 in 'dense', the costs in ms"):
        allocate(curves((1.0, 2.0, 3.0), (1.0, 2.0, 3.0)), prices((10.0, 5.0, 2.0, 4.0)), 10.0)


def test_it_prints_the_front() -> None:
    found = allocate(
        curves((1.0, 2.0, 3.0), (5.0, 9.0, 8.0)),
        prices((10.0, 5.0, 2.0, 4.0), (10.0, 5.0, 2.0, 4.0)),
        16.0,
    )
    assert isinstance(found, Allocation)
    text = str(found)
    assert "ms  of dense  increase  layers dense" in text
    assert "15     75.0%    1.0000             1  <- chosen" in text
    assert "within 16 ms, of 20 dense" in text
    assert text.count("<- chosen") == 1


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=r"allocate needs scipy, .* pip install 'secateur\[bud"):
        allocate(curves((1.0, 2.0, 3.0)), prices((10.0, 5.0, 2.0, 4.0)), 10.0)


def test_a_budget_below_what_no_pattern_goes_below_says_so() -> None:
    curves = Sensitivity("magnitude", 1.0, ("2:4",), {"a": (4, 4)}, {"a": {"2:4": 0.1}}, {}, {})
    costs = Costs("ms", {"a": {"dense": 2.0, "2:4": 2.0}})
    with pytest.raises(ValueError, match=r"none of these patterns costs less ms than dense, which"):
        allocate(curves, costs, 1.0)
