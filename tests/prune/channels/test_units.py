"""Units: what is tied, what stays, and arrays that follow a view."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from secateur.prune.channels.channels import pools
from secateur.prune.channels.units import Units, along, reshape

# Shapes of one tensor, each as a product of the same factors in order.
FACTORS = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def grouped(factors: list[int], cuts: list[bool]) -> tuple[int, ...]:
    """The factors, with a new dimension wherever there is a cut."""
    shape = [factors[0]]
    for factor, cut in zip(factors[1:], cuts, strict=True):
        if cut:
            shape.append(factor)
        else:
            shape[-1] *= factor
    return tuple(shape)


@given(st.data(), FACTORS)
def test_an_array_follows_a_view_as_the_whole_tensor_of_numbers_does(
    data: st.DataObject, factors: list[int]
) -> None:
    cuts = st.lists(st.booleans(), min_size=len(factors) - 1, max_size=len(factors) - 1)
    old, new = (grouped(factors, data.draw(cuts)) for _ in range(2))
    dim = data.draw(st.integers(0, len(old) - 1))
    ids = along(np.arange(old[dim]), len(old), dim)
    whole = np.broadcast_to(ids, old).reshape(new)
    assert np.array_equal(np.broadcast_to(reshape(ids, old, new), new), whole)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=10))
def test_what_is_tied_is_one_whatever_the_order(pairs: list[tuple[int, int]]) -> None:
    found = []
    for order in (pairs, pairs[::-1]):
        units = Units()
        ids = units.new(8)
        for a, b in order:
            units.tie(ids[[a]], ids[[b]])
        found.append(units.roots(ids).tolist())
    assert found[0] == found[1]
    assert all(found[0][a] == found[0][b] for a, b in pairs)
    assert len(set(found[0])) >= 8 - len(pairs)


def test_heads_that_are_tied_within_are_one_dimension() -> None:
    units = Units()
    ids = units.new(6).reshape(1, 3, 2)
    units.tie_along(ids, [2])
    (settled,) = units.settle([ids], "here")
    assert settled.shape == (1, 3, 1)
    assert len(np.unique(units.roots(ids))) == 3


def test_what_is_one_unit_altogether_stays_and_says_where() -> None:
    units = Units()
    ids = units.new(4)
    units.tie(ids, ids[:1])
    assert units.settle([ids], "the place") == []
    reason = units.frozen()[int(units.roots(ids)[0])]
    assert reason == "all its channels depend on one another in the place"


def test_the_first_reason_counts_and_ties_pass_it_on() -> None:
    units = Units()
    a, b = units.new(2), units.new(2)
    units.freeze(b[:1], "first")
    units.freeze(b, "second")
    units.tie(a, b)
    reasons = [units.frozen()[int(root)] for root in units.roots(a)]
    assert reasons == ["first", "second"]


def test_names_that_share_a_unit_are_in_one_pool() -> None:
    ids = {"a": [1, 2], "b": [3], "c": [4, 2], "d": [5, 4]}
    found = pools({name: np.array(units) for name, units in ids.items()})
    assert [sorted(pool) for pool in found] == [["b"], ["a", "c", "d"]]
