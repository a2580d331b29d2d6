"""Gradual pruning: the sparsity follows a schedule while the network trains."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from secateur.criteria import magnitude
from secateur.patterns import NM, Block, Channel, Pattern, Unstructured
from secateur.plan import Plan
from secateur.schedules import Schedule
from secateur.train.hold import Rule


def gradual(
    plan: Plan,
    schedule: Schedule,
    *,
    every: int = 100,
    criterion: Callable[[Tensor], Tensor] = magnitude,
) -> Rule:
    """A rule for `hold`: the planned layers' masks, chosen anew every `every` steps.

    At step t a layer has the sparsity `schedule(t)`, but never more than its plan asks; an N:M
    layer keeps m - floor(sparsity * m) of m. Zeros stay zeros, because held weights cannot grow.

    Source: Zhu and Gupta, arXiv:1710.01878, sec. 3.
    Raises:
        ValueError: if `every` is less than 1.
    """
    if every < 1:
        raise ValueError(f"gradual needs every >= 1 step, got {every}")

    def rule(name: str, weight: Tensor, mask: Tensor, step: int) -> Tensor:
        if name not in plan.layers or step % every:
            return mask
        return mask & at_sparsity(plan.layers[name], schedule(step)).mask(criterion(weight))

    return rule


def at_sparsity(pattern: Pattern, sparsity: float) -> Pattern:
    """The pattern on its way to its own sparsity, of which it never asks more."""
    if isinstance(pattern, NM):
        return replace(pattern, n=max(pattern.n, pattern.m - int(sparsity * pattern.m)))
    if not isinstance(pattern, (Unstructured, Block, Channel)):
        raise ValueError(
            f"gradual cannot lower the sparsity of {pattern}: write a rule of your own"
        )
    return replace(pattern, sparsity=min(sparsity, pattern.sparsity))
