"""One threshold for all layers: each is pruned as far as its loss increase stays within it."""

from collections.abc import Mapping

from secateur.allocation.budget import (
    Allocation,
    Costs,
    Point,
    front_of,
    monotone,
    priced,
    require_reachable,
)
from secateur.allocation.sensitivity import Sensitivity


def equalize(sensitivity: Sensitivity, costs: Costs, budget: float) -> Allocation:
    """The cheapest choice of each layer that adds at most T to the loss, for the least T possible.

    T, found by bisection, is the least at which the layers together keep to the budget. No
    increases are added up, so less is assumed of them than in `allocate`: only that equal increases
    mean the same in every layer. FastNAS searches the widths of a network in this way.

    Cost: microseconds. No scipy.
    Raises:
        ValueError: as `allocate`, but for scipy.
    Source: the search of NVIDIA Model Optimizer's FastNAS pruning, on sensitivities.
    """
    increase = priced(monotone(sensitivity), costs)
    require_reachable(increase, costs, budget)
    levels = sorted({value for found in increase.values() for value in found.values()})
    points = [_point_at(increase, costs, level) for level in levels]
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if points[middle].cost <= budget else (middle + 1, high)
    best = points[high]
    return Allocation(best, budget, costs.dense, costs.unit, front_of([best, *points]))


def _point_at(increase: Mapping[str, Mapping[str, float]], costs: Costs, most: float) -> Point:
    """For each layer the cheapest choice that adds at most `most`; ties go to the least added."""
    choices = {
        layer: min(
            (one for one in found if found[one] <= most),
            key=lambda one: (costs.of[layer][one], found[one]),
        )
        for layer, found in increase.items()
    }
    total = sum(increase[layer][one] for layer, one in choices.items())
    return Point(choices, costs.total(choices), total)
