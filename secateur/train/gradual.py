"""Gradual pruning: the sparsity follows a schedule while the network trains."""

from collections.abc import Callable

from torch import Tensor

from secateur.criteria import magnitude
from secateur.model.plan import Plan
from secateur.patterns import Pattern
from secateur.train.hold import Rule
from secateur.train.schedules import Schedule


def gradual(
    plan: Plan,
    schedule: Schedule,
    *,
    every: int = 100,
    criterion: Callable[[Tensor], Tensor] = magnitude,
) -> Rule:
    """A rule for `hold` that chooses the planned layers' masks anew every `every` steps.

    At step t a layer has the sparsity `schedule(t)`, but never more than its plan asks; an N:M
    layer keeps m - floor(sparsity * m) of m. When the schedule ends, the plan is met, whatever
    `every` is. Zeros stay zeros, because held weights cannot grow.

    The schedule, which must not fall, continues from the zeros that a layer already has: training
    that was stopped and is held again with the same schedule meets the plan in the steps left.

    Source: Zhu and Gupta, arXiv:1710.01878, sec. 3.
    Raises:
        ValueError: if `every` is less than 1.
    """
    if every < 1:
        raise ValueError(f"gradual needs every >= 1 step, got {every}")
    taken: dict[str, int] = {}

    def rule(name: str, weight: Tensor, mask: Tensor, step: int) -> Tensor:
        if name not in plan.layers:
            return mask
        pattern = plan.layers[name]

        def at(step: int) -> Pattern:
            return lowered(pattern, schedule(step))

        if step == 1:  # of this `hold`, not of the schedule
            scores = criterion(weight)
            before = _steps_before(int((~mask).sum()), lambda t: int((~at(t).mask(scores)).sum()))
            taken[name] = before and before + every - 1  # the last step before the next choice
        now = step + taken[name]
        if now % every and not at(now - 1) != at(now) == pattern:
            return mask
        return mask & at(now).mask(criterion(weight))

    return rule


# By this step every schedule has reached its end.
LONGEST = 2**31


def _steps_before(zeros: int, asked: Callable[[int], int]) -> int:
    """The last step that asks for at most this many zeros, or 0 if none asks for more than step 0.

    Cost: 2 log2(steps) masks; only one if the layer has no more zeros than step 0 asks for.
    """
    first = asked(0)
    if zeros <= first:
        return 0
    high = 1
    while high < LONGEST and asked(high) <= zeros:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if asked(middle) <= zeros else (low, middle)
    return low if asked(low) > first else 0


def lowered(pattern: Pattern, sparsity: float) -> Pattern:
    """The pattern at this sparsity, or at its own if that is lower."""
    return pattern.at(sparsity) if sparsity < pattern.sparsity else pattern
