"""What learns masks out of place: dense weights train, the model computes with pruned ones.

Symbols: `W` are the dense weights, `M` the mask of the largest |W|, `a` what the model computes
with, `g` = dL/da its gradient. Each rule says what `a` is and which gradient `W` gets. A supermask
trains scores in the place of W.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from secateur.core.float64 import in_float64
from secateur.patterns import NM, Pattern
from secateur.train.dynamic import uniform


class Learnt(NamedTuple):
    """What a layer trains in its weight's place, the mask, and what a rule keeps as it was."""

    trained: Float[Tensor, "..."]
    mask: Bool[Tensor, "..."]
    fixed: Float[Tensor, "..."] | None


@runtime_checkable
class Learner(Protocol):
    """A rule of `learn_masks_`: plain data, which remembers nothing."""

    def require(self, name: str, pattern: Pattern) -> None:
        """Raise unless it makes sense for a layer with this pattern."""

    def begin(
        self, name: str, weight: Float[Tensor, "out in"], pattern: Pattern
    ) -> tuple[Float[Tensor, "out in"], Float[Tensor, "..."] | None]:
        """What trains in the weight's place, in its dtype, and what stays as it is, if anything."""
        ...

    def weight(self, learnt: Learnt, pattern: Pattern) -> Float[Tensor, "out in"]:
        """What the model computes with, of matrices `[out, in]`: zero where the mask drops."""
        ...

    def gradient(
        self, gradient: Shaped[Tensor, "..."], learnt: Learnt, step: int, scale: Tensor | float
    ) -> Shaped[Tensor, "..."]:
        """The gradient of what is trained, from that of the model's weight, for this step.

        Element by element, in whatever shape. A GradScaler has multiplied it by `scale`.
        """
        ...


@dataclass(frozen=True)
class StraightThrough:
    """The largest weights compute, and the gradient goes to all of them: a = W M, dW = g.

    With a `decay` the pruned weights are pulled towards zero, so that masks settle:
    dW = g + decay (1 - M) W, added at the step, behind unscaling and clipping. This is SR-STE. The
    decay rises in a straight line over the first `ramp` steps, as AST's does.

    Raises:
        ValueError: if the decay or the ramp is negative.
    Source: Zhou et al. 2021, arXiv:2102.04010, equations 6 (straight through) and 9 (SR-STE). The
        ramp: Huang et al. 2025, arXiv:2407.20584.
    """

    decay: float = 0.0
    ramp: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < float("inf") or self.ramp < 0:
            raise ValueError(
                f"StraightThrough needs a finite decay >= 0 and a ramp >= 0 steps, got "
                f"{self.decay:g} and {self.ramp}"
            )

    def require(self, name: str, pattern: Pattern) -> None:
        """Do nothing: any pattern has a mask of the largest weights."""

    def begin(
        self, name: str, weight: Float[Tensor, "out in"], pattern: Pattern
    ) -> tuple[Float[Tensor, "out in"], None]:
        return weight.clone(), None

    def weight(self, learnt: Learnt, pattern: Pattern) -> Float[Tensor, "out in"]:
        return learnt.trained.masked_fill(~learnt.mask, 0)

    def gradient(
        self, gradient: Shaped[Tensor, "..."], learnt: Learnt, step: int, scale: Tensor | float
    ) -> Shaped[Tensor, "..."]:
        if not self.decay:
            return gradient
        decay = self.decay * min(1.0, step / self.ramp) if self.ramp else self.decay
        pull = _wide(learnt.trained).masked_fill(learnt.mask, 0) * (decay * scale)
        return (_wide(gradient) + pull).to(gradient.dtype)


@dataclass(frozen=True)
class SoftThreshold:
    """N:M by a function without jumps: a = beta sign(W) max(|W| - t, 0), dW = g. S-STE.

    t is the largest |W| that a weight's group drops, so that a weight which enters the mask or
    leaves it is zero there. beta makes each layer's first `a` as near to W as it can be,
    <W, S> / ||S||^2, and stays: one that follows W keeps masks from settling.

    Source: Hu, Zhu and Chen 2024, arXiv:2409.09099, section 4, for 2:4; other N:M likewise.
    """

    def require(self, name: str, pattern: Pattern) -> None:
        """Raise unless the pattern is N:M.

        Raises: ValueError with the layer's name.
        """
        if not isinstance(pattern, NM):
            raise ValueError(
                f"{name} is planned {pattern}, SoftThreshold (S-STE) is for N:M alone: plan '2:4', "
                "or use StraightThrough"
            )

    def begin(
        self, name: str, weight: Float[Tensor, "out in"], pattern: Pattern
    ) -> tuple[Float[Tensor, "out in"], Float[Tensor, ""]]:
        """The weight, and beta.

        Raises: ValueError if no weight is larger than what its group drops.
        """
        wide = in_float64(weight)
        soft = _soft(wide, pattern.mask(wide.abs()), pattern)
        norm = soft.square().sum()
        if not float(norm):
            raise ValueError(
                f"{name} has no weight larger than those that {pattern} drops, so SoftThreshold "
                "(S-STE) would leave none: give it random weights, or leave it out of the plan "
                "(ignore=)"
            )
        beta = (wide * soft).sum() / norm
        return weight.clone(), beta.to(weight.device, _wide(weight).dtype)

    def weight(self, learnt: Learnt, pattern: Pattern) -> Float[Tensor, "out in"]:
        trained, mask, beta = learnt
        assert beta is not None
        return (_soft(_wide(trained), mask, pattern) * beta).to(trained.dtype)

    def gradient(
        self, gradient: Shaped[Tensor, "..."], learnt: Learnt, step: int, scale: Tensor | float
    ) -> Shaped[Tensor, "..."]:
        return gradient


@dataclass(frozen=True)
class Supermask:
    """Weights stay as they are, and training learns which to keep: a = W M(|S|), dS = g W sign(S).

    The optimizer trains scores S in the weights' place, with its learning rate, momentum and decay.
    They begin uniform in +-1 / sqrt(in), by the seed and the layer's name.

    Source: Ramanujan et al. 2020, arXiv:1911.13299, section 3 (edge-popup); its code ranks |S|.
    """

    seed: int = 0

    def require(self, name: str, pattern: Pattern) -> None:
        """Do nothing: any pattern has a mask of the largest scores."""

    def begin(
        self, name: str, weight: Float[Tensor, "out in"], pattern: Pattern
    ) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out in"]]:
        bound = weight.shape[1] ** -0.5
        scores = (2 * uniform(f"{self.seed}/{name}", weight) - 1) * bound
        return scores.to(weight.dtype), weight.clone()

    def weight(self, learnt: Learnt, pattern: Pattern) -> Float[Tensor, "out in"]:
        assert learnt.fixed is not None
        return learnt.fixed.masked_fill(~learnt.mask, 0)

    def gradient(
        self, gradient: Shaped[Tensor, "..."], learnt: Learnt, step: int, scale: Tensor | float
    ) -> Shaped[Tensor, "..."]:
        S, _, W = learnt
        assert W is not None
        return (_wide(gradient) * _wide(W) * S.sign()).to(gradient.dtype)


def _soft(
    weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"], pattern: Pattern
) -> Float[Tensor, "out in"]:
    """sign(W) max(|W| - t, 0), without negative zeros."""
    assert isinstance(pattern, NM), "asked for by require"
    size = weight.abs()
    excess = (size - pattern.largest_dropped(size, mask)).clamp_min(0)
    return (weight.sign() * excess).masked_fill(excess == 0, 0)


def _wide(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """The tensor in float32, or in float64 if it is: results are rounded once."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
