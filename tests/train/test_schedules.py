"""Schedules: the ends, the shapes at the middle, monotone between."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.train.schedules import constant, cosine, cubic, linear

RAMPS = [linear, cubic, cosine]


@pytest.mark.parametrize("ramp", RAMPS)
def test_starts_and_ends_where_asked(ramp) -> None:
    sparsity = ramp(0.8, 10, 30, 0.2)
    assert [sparsity(t) for t in (0, 10, 30, 31, 10_000)] == [0.2, 0.2, 0.8, 0.8, 0.8]


@pytest.mark.parametrize(
    ("ramp", "middle"),
    [(linear, 0.4), (cubic, 0.7), (cosine, 0.4)],
    ids=["linear", "cubic", "cosine"],
)
def test_value_at_the_middle(ramp, middle: float) -> None:
    assert ramp(0.8, 0, 20)(10) == pytest.approx(middle)


def test_cubic_gives_the_published_sequence() -> None:
    """s_f (1 - (1 - t / n)^3) for s_f = 0.8 and n = 10."""
    expected = [0, 0.2168, 0.3904, 0.5256, 0.6272, 0.7, 0.7488, 0.7784, 0.7936, 0.7992, 0.8]
    assert [round(cubic(0.8, 0, 10)(t), 4) for t in range(11)] == expected


@pytest.mark.parametrize("ramp", RAMPS)
@given(final=st.floats(0, 0.99), initial=st.floats(0, 0.99), end=st.integers(0, 50))
def test_moves_one_way_only(ramp, final: float, initial: float, end: int) -> None:
    values = [ramp(final, 0, end, initial)(t) for t in range(end + 2)]
    steps = [b - a for a, b in itertools.pairwise(values)]
    sign = math.copysign(1, final - initial)
    assert all(step * sign >= -1e-12 for step in steps)
    assert values[-1] == final


def test_constant_begins_at_its_step() -> None:
    assert [constant(0.5, begin=3)(t) for t in (0, 2, 3, 9)] == [0.0, 0.0, 0.5, 0.5]


def test_refuses_what_is_no_sparsity_and_no_interval() -> None:
    with pytest.raises(ValueError, match=r"final sparsity must be in \[0, 1\), got 50"):
        linear(50.0, 0, 10)
    with pytest.raises(ValueError, match="0 <= begin <= end, got 10 and 5"):
        cubic(0.5, 10, 5)
