"""One threshold for all layers: the least within the budget, compared with trying them all."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation import allocate, equalize, monotone
from tests.allocation.test_budget import curves, price, prices, row


@settings(max_examples=50)
@given(st.lists(st.tuples(row, price), min_size=1, max_size=4), st.integers(0, 60).map(float))
def test_it_is_the_least_threshold_that_keeps_to_the_budget(
    layers: list[tuple[tuple[float, ...], tuple[float, ...]]], budget: float
) -> None:
    found, costs = curves(*(one for one, _ in layers)), prices(*(one for _, one in layers))
    increase = monotone(found)

    def cheapest(most: float) -> float:
        return sum(
            min(costs.of[name][one] for one in options if options[one] <= most)
            for name, options in increase.items()
        )

    levels = sorted({value for options in increase.values() for value in options.values()})
    within = [level for level in levels if cheapest(level) <= budget]
    if not within:
        least = cheapest(levels[-1])
        why = rf"can be reached is {least:g}, dense" if least < costs.dense else "costs less ms"
        with pytest.raises(ValueError, match=why):
            equalize(found, costs, budget)
        return
    best = equalize(found, costs, budget)
    assert best.best.cost == cheapest(within[0]) <= budget
    most = max(increase[name][one] for name, one in best.best.choices.items())
    assert most <= within[0] and best.best in best.front
    assert allocate(found, costs, budget).best.increase <= best.best.increase + 1e-9


def test_layers_are_pruned_alike_where_one_is_not_more_sensitive() -> None:
    """Increases 1, 4, 2 and 3, 9, 9 in three patterns; dense costs 10, they 5, 2 and 6."""
    found = curves((1.0, 4.0, 2.0), (3.0, 9.0, 9.0))
    costs = prices((10.0, 5.0, 2.0, 6.0), (10.0, 5.0, 2.0, 6.0))
    chosen = equalize(found, costs, 11.0).best
    assert chosen.choices == {"layer0": "unstructured:0.5", "layer1": "unstructured:0.5"}
    assert (chosen.cost, chosen.increase) == (10.0, 4.0)
    assert equalize(found, costs, 9.0).best.choices["layer0"] == "unstructured:0.8"
