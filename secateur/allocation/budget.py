"""The best patterns under a budget: each layer's sensitivity weighed against its cost.

One pattern for each layer, or dense, such that the sum of the increases of the loss is least and
the costs add up to no more than the budget: a multiple-choice knapsack, solved to a millionth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.allocation.choices import (
    DENSE_CHOICE,
    parse_choice,
    patterns_by_grid,
    patterns_of,
)
from secateur.allocation.sensitivity import Sensitivity
from secateur.core.shown import Shown, Table
from secateur.patterns import Grid, Pattern

FRONT_POINTS = 9  # budgets, evenly spaced from the cheapest choice of all layers to dense


@dataclass(frozen=True)
class Costs:
    """What each layer costs in each choice, `"dense"` among them: `of[layer][choice]`, in `unit`.

    `secateur.allocation.costs` makes them in parameters, bytes and measured milliseconds; any other
    cost that adds up over layers will do. A layer cannot choose a pattern that has no entry.
    """

    unit: str
    of: Mapping[str, Mapping[str, float]]

    @property
    def dense(self) -> float:
        """What all layers cost dense."""
        return sum(cost[DENSE_CHOICE] for cost in self.of.values())

    def total(self, choices: Mapping[str, str]) -> float:
        """What these choices cost together, one for each layer."""
        return sum(self.of[layer][choice] for layer, choice in choices.items())


@dataclass(frozen=True)
class Point:
    """One allocation: each layer's choice, what they cost, and the predicted loss increase.

    `increase` is the sum of the layers' separate increases; pruned together they add more.
    """

    choices: Mapping[str, str]
    cost: float
    increase: float

    @property
    def patterns(self) -> dict[str, Pattern]:
        """The patterns of the layers that get zeros, as `sc.plan` takes them."""
        return patterns_of(self.choices)

    @property
    def by_grid(self) -> dict[Grid | None, dict[str, Pattern]]:
        """The same for each grid, for as many passes; `unstructured:0` where one only rounds."""
        return patterns_by_grid(self.choices)


@dataclass(frozen=True)
class Allocation(Shown):
    """The best choices within the budget, and what other budgets would give, cheapest first."""

    best: Point
    budget: float
    dense: float
    unit: str
    front: tuple[Point, ...]

    @property
    def patterns(self) -> dict[str, Pattern]:
        """The patterns of the layers that get zeros, as `sc.plan` takes them."""
        return self.best.patterns

    @property
    def by_grid(self) -> dict[Grid | None, dict[str, Pattern]]:
        """The same for each grid, for as many passes; `unstructured:0` where one only rounds."""
        return self.best.by_grid

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.unit, "of dense", "increase", "layers dense", "")

    def rows(self) -> list[tuple[str, ...]]:
        """The front, the chosen point marked."""
        return [
            (
                figure(point.cost),
                f"{point.cost / self.dense:.1%}" if self.dense else "-",
                f"{point.increase:.4f}",
                str(sum(choice == DENSE_CHOICE for choice in point.choices.values())),
                "<- chosen" if point is self.best else "",
            )
            for point in self.front
        ]

    @property
    def paragraphs(self) -> tuple[str | Table, ...]:
        return (
            Table(self.columns, self.rows()),
            f"within {figure(self.budget)} {self.unit}, of {figure(self.dense)} dense; increases "
            "of the loss are sums over layers pruned one at a time",
        )


def allocate(sensitivity: Sensitivity, costs: Costs, budget: float) -> Allocation:
    """The patterns of all layers with the least increase of the loss within the budget.

    `sc.plan` takes its `patterns`; printed, it shows the Pareto front. The increases that were
    measured are made monotone and assumed to add up over layers, which they do at low sparsity; at
    high sparsity the same pattern for all layers may be better. `evolve` finds what that misses.

    Cost: milliseconds to seconds for hundreds of layers, ten times over for the front.
    Raises:
        ValueError: if no choice keeps to the budget, with the least that can be reached; if a layer
            of the sensitivity has no cost, or scipy is not installed.
    """
    increase = priced(monotone(sensitivity), costs)
    least = require_reachable(increase, costs, budget)
    best = _knapsack(increase, costs, budget)
    points = [
        _knapsack(increase, costs, float(between))
        for between in np.linspace(least, max(least, costs.dense), FRONT_POINTS)
    ]
    return Allocation(best, budget, costs.dense, costs.unit, front_of([best, *points]))


def require_reachable(
    increase: Mapping[str, Mapping[str, float]], costs: Costs, budget: float
) -> float:
    """The cost of the cheapest choice.

    Raises:
        ValueError: if it is above the budget.
    """
    least = sum(min(costs.of[layer][one] for one in found) for layer, found in increase.items())
    if not budget >= least:  # also for NaN
        if least >= costs.dense:
            raise ValueError(
                f"none of these patterns costs less {costs.unit} than dense, which is "
                f"{figure(costs.dense)}: measure other patterns, or give a budget in another unit"
            )
        raise ValueError(
            f"no choice of these patterns keeps to a budget of {figure(budget)} {costs.unit}: the "
            f"least that can be reached is {figure(least)}, dense is {figure(costs.dense)}: raise "
            "the budget, or measure sparser patterns"
        )
    return least


def monotone(sensitivity: Sensitivity) -> dict[str, dict[str, float]]:
    """Each layer's increase by pattern and `"dense"`: never below 0, never falling with sparsity.

    The running maximum over choices of one kind that differ only in sparsity. What a layer seems
    to gain from more zeros is noise in a loss on few tokens, and an allocation would fall for it.
    """
    curves: dict[str, dict[str, float]] = {}
    parsed = {one: parse_choice(one) for one in sensitivity.patterns}
    ascending = sorted(parsed, key=lambda one: parsed[one].sparsity)
    for layer, found in sensitivity.increase.items():
        curve, highest = {DENSE_CHOICE: 0.0}, dict[tuple[str, str], float]()
        for one in ascending:
            if (increase := found[one]) is not None:
                kind = parsed[one].kind
                curve[one] = highest[kind] = max(0.0, increase, highest.get(kind, 0.0))
        curves[layer] = curve
    return curves


def figure(cost: float) -> str:
    """A cost as text, whole from a thousand up and in six digits below: any unit in one column."""
    return f"{cost:,.0f}" if abs(cost) >= 1000 else f"{cost:.6g}"


def priced(
    increase: Mapping[str, Mapping[str, float]], costs: Costs
) -> dict[str, dict[str, float]]:
    """The increases of the choices that have a cost; dense is always among them."""
    for layer in increase:
        if DENSE_CHOICE not in costs.of.get(layer, {}):
            raise ValueError(
                f"allocate needs the cost of {layer} in {DENSE_CHOICE!r}, the costs in "
                f"{costs.unit} have none: make them from this sensitivity, as "
                "secateur.allocation.costs does"
            )
    return {
        layer: {one: value for one, value in found.items() if one in costs.of[layer]}
        for layer, found in increase.items()
    }


def _undominated(increase: Mapping[str, float], cost: Mapping[str, float]) -> list[str]:
    """A layer's choices, cheapest first, except where another is no worse in cost and increase."""
    found: list[str] = []
    for one in sorted(increase, key=lambda choice: (cost[choice], increase[choice])):
        if not found or increase[one] < increase[found[-1]]:
            found.append(one)
    return found


def _knapsack(increase: Mapping[str, Mapping[str, float]], costs: Costs, budget: float) -> Point:
    """The multiple-choice knapsack's solution: a 0/1 variable per choice, one 1 in each layer."""
    optimize, sparse = _scipy()
    pairs = [
        (name, one) for name in increase for one in _undominated(increase[name], costs.of[name])
    ]
    rows = {name: row for row, name in enumerate(increase)}
    gain = np.array([increase[name][one] for name, one in pairs])
    cost = np.array([costs.of[name][one] for name, one in pairs])
    one_each = sparse.csr_array(
        (np.ones(len(pairs)), ([rows[name] for name, _ in pairs], np.arange(len(pairs)))),
        shape=(len(rows), len(pairs)),
    )
    # HiGHS has absolute tolerances, so both sides are scaled to about 1.
    unit = np.abs(cost).max() or 1.0
    found = optimize.milp(
        gain / (gain.max() or 1.0),
        integrality=np.ones(len(pairs)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(cost[None] / unit, -np.inf, budget / unit),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    assert found.x is not None, found.message
    choices = {name: one for (name, one), taken in zip(pairs, found.x, strict=True) if taken > 0.5}
    return Point(
        choices,
        costs.total(choices),
        sum(increase[name][one] for name, one in choices.items()),
    )


def front_of(points: Sequence[Point]) -> tuple[Point, ...]:
    """The Pareto front of the points, cheapest first; the first of `points` is always in it."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, point.increase)):
        if point is points[0] or all(point.increase < other.increase for other in front):
            front.append(point)
    return tuple(front)


def _scipy() -> tuple[Any, Any]:
    """The modules `scipy.optimize` and `scipy.sparse`: scipy is an extra and takes 0.2 s."""
    try:
        from scipy import optimize, sparse
    except ImportError:
        raise ValueError(
            "allocate needs scipy, which is not installed: pip install 'secateur[budget]'"
        ) from None
    return optimize, sparse
