"""Schedules: the sparsity at each step of training, as a function `step -> sparsity`."""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(final: float, begin: int = 0) -> Schedule:
    """0 before step `begin`, `final` from then on."""
    return _ramp(final, begin, begin, 0.0, lambda t: t)


def linear(final: float, begin: int, end: int, initial: float = 0.0) -> Schedule:
    """A straight line from `initial` at step `begin` to `final` at step `end`."""
    return _ramp(final, begin, end, initial, lambda t: t)


def cubic(final: float, begin: int, end: int, initial: float = 0.0) -> Schedule:
    """s_f + (s_i - s_f) (1 - t)^3: fast while the network has much to spare, then ever slower.

    Source: Zhu and Gupta, arXiv:1710.01878, eq. 1.
    """
    return _ramp(final, begin, end, initial, lambda t: 1 - (1 - t) ** 3)


def cosine(final: float, begin: int, end: int, initial: float = 0.0) -> Schedule:
    """Half a cosine from `initial` to `final`: slow at both ends."""
    return _ramp(final, begin, end, initial, lambda t: (1 - math.cos(math.pi * t)) / 2)


def _ramp(
    final: float, begin: int, end: int, initial: float, shape: Callable[[float], float]
) -> Schedule:
    for name, value in (("initial", initial), ("final", final)):
        if not 0 <= value < 1:
            raise ValueError(f"a schedule's {name} sparsity must be in [0, 1), got {value:g}")
    if not 0 <= begin <= end:
        raise ValueError(f"a schedule needs 0 <= begin <= end, got {begin} and {end}")

    def sparsity(step: int) -> float:
        if step >= end:
            return final
        if step <= begin:
            return initial
        return initial + (final - initial) * shape((step - begin) / (end - begin))

    return sparsity
