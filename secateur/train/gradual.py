"""Gradual pruning: the sparsity follows a schedule while the network trains."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from secateur.criteria import magnitude
from secateur.model.plan import Plan
from secateur.patterns import Pattern
from secateur.train.schedules import Schedule


class Gradual:
    """The rule that `gradual` returns. It remembers where on the schedule each layer is."""

    def __init__(
        self, plan: Plan, schedule: Schedule, every: int, criterion: Callable[[Tensor], Tensor]
    ) -> None:
        self.plan = plan
        self._schedule, self._every, self._criterion = schedule, every, criterion
        self._taken: dict[str, int] = {}  # steps of the schedule before the first of this `hold`
        self._last: dict[str, int] = {}

    def __call__(self, name: str, weight: Tensor, mask: Tensor, step: int) -> Tensor:
        if name not in self.plan.layers:
            return mask
        if 1 < step <= self._last.get(name, 0):
            raise ValueError(
                f"gradual cannot run backwards, {name} was at step {self._last[name]} and is now "
                f"at {step}: make a rule for each training, or load the state of its hold"
            )
        if step == 1:  # of this `hold`, not of the schedule
            self._taken[name] = self._steps_before(name, weight, mask)
        # A layer that was unfrozen later is where the others are.
        taken = self._taken.setdefault(name, max(self._taken.values(), default=0))
        self._last[name] = step
        now, pattern = step + taken, self.plan.layers[name]
        if now % self._every and not self._at(name, now - 1) != self._at(name, now) == pattern:
            return mask
        return mask & self._at(name, now).mask(self._criterion(weight))

    def state_dict(self) -> dict[str, Any]:
        """What `Held.state_dict` keeps of it; None of a layer that no step has met yet.

        It has an entry for each layer from the start: `torch.distributed.checkpoint` loads what the
        state to be loaded into has.
        """
        known = {"taken": self._taken, "last": self._last}
        return {key: {n: own.get(n) for n in self.plan.layers} for key, own in known.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._taken, self._last = (
            {name: step for name, step in state[key].items() if step is not None}
            for key in ("taken", "last")
        )

    def _at(self, name: str, step: int) -> Pattern:
        return lowered(self.plan.layers[name], self._schedule(step))

    def _steps_before(self, name: str, weight: Tensor, mask: Tensor) -> int:
        """The last step before the next choice, for a layer that has zeros already."""
        scores = self._criterion(weight)

        def asked(step: int) -> int:
            return int((~self._at(name, step).mask(scores)).sum())

        before = _steps_before(int((~mask).sum()), asked)
        return before and before + self._every - 1


def gradual(
    plan: Plan,
    schedule: Schedule,
    *,
    every: int = 100,
    criterion: Callable[[Tensor], Tensor] = magnitude,
) -> Gradual:
    """A rule for `hold` that chooses the planned layers' masks anew every `every` steps.

    At step t a layer has the sparsity `schedule(t)`, but never more than its plan asks; an N:M
    layer keeps m - floor(sparsity * m) of m. When the schedule ends, the plan is met, whatever
    `every` is. Zeros stay zeros, because held weights cannot grow.

    Its place on the schedule is in the state of its hold, from which training resumes bit for bit.
    Without that state the schedule, which must not fall, continues from the zeros that a layer
    already has: training that is held again with the same schedule meets the plan in the steps
    left.

    Source: Zhu and Gupta, arXiv:1710.01878, sec. 3.
    Raises:
        ValueError: if `every` is less than 1; in training, if the step count runs backwards.
    """
    if every < 1:
        raise ValueError(f"gradual needs every >= 1 step, got {every}")
    return Gradual(plan, schedule, every, criterion)


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
