"""Dynamic sparse training: the smallest kept weights are dropped, and as many others grow.

A model that was never dense learns which of its weights to have. Every so many steps a layer drops
a fraction of what it keeps and fills its pattern again: where the loss falls fastest (RigL) or at
random (SET). The fraction decays as half a cosine, so that the masks settle.
"""

import hashlib
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.criteria import magnitude
from secateur.model.plan import Plan
from secateur.patterns import Pattern, keep_top, takes_any_sparsity

# Weights that stay come before all that might grow, whose scores are at most 1.
STAYS = 2.0


class DropAndGrow:
    """The rule that `rigl` and `sparse_evolution` return; the step is all that it depends on."""

    def __init__(self, plan: Plan, end: int, every: int, fraction: float, seed: int | None) -> None:
        self.plan = plan
        self._end, self._every, self._fraction, self._seed = end, every, fraction, seed

    def require(self, name: str, mask: Bool[Tensor, "out in"]) -> None:
        """Raise unless the layer has the zeros that its plan asks for.

        Raises: ValueError with what is missing.
        """
        pattern = self.plan.layers.get(name)
        if pattern is not None and (found := pattern.violation(mask)):
            raise ValueError(
                f"{name} {found}: what drops and grows begins from the plan's zeros, run "
                "prune_(model, plan, random) before hold"
            )

    def needs_gradient(self, name: str, step: int) -> bool:
        """Whether this step's gradient says which weights of the layer grow after it."""
        return self._seed is None and name in self.plan.layers and self._dropped(step) > 0

    def __call__(
        self,
        name: str,
        weight: Float[Tensor, "out in"],
        mask: Bool[Tensor, "out in"],
        step: int,
        gradient: Float[Tensor, "out in"] | None = None,
    ) -> Bool[Tensor, "out in"]:
        if name not in self.plan.layers or not (dropped := self._dropped(step)):
            return mask
        pattern = self.plan.layers[name]
        if self._seed is not None:
            growth = uniform(f"{self._seed}/{name}/{step}", weight)
        else:
            assert gradient is not None, "asked for by needs_gradient"
            # A step that a GradScaler skipped may have left infinite ones.
            growth = gradient.abs().float().nan_to_num(0.0, 0.0, 0.0)
            if not (largest := growth.max()):
                return mask
            growth = growth / largest
        stays = _without_smallest(pattern, magnitude(weight.float()), mask, dropped)
        return pattern.mask(growth.masked_fill(stays, STAYS))

    def _dropped(self, step: int) -> float:
        """The fraction of its kept weights that a layer drops after this step.

        Source: Evci et al., arXiv:1911.11134, section 3, f_decay.
        """
        if step % self._every or step >= self._end:
            return 0.0
        return self._fraction / 2 * (1 + math.cos(math.pi * step / self._end))


def rigl(plan: Plan, end: int, *, every: int = 100, fraction: float = 0.3) -> DropAndGrow:
    """A rule for `hold` that drops by magnitude and grows where the loss's gradient is largest.

    Every `every` steps, before step `end`, a planned layer drops the smallest of its kept weights,
    `fraction / 2 (1 + cos(pi step / end))` of them, and its pattern is filled again with those
    whose gradient is largest; what was dropped just now may be among them. Single weights are
    dropped anywhere in the layer, blocks and channels as a whole. So each plan has its method:
    "unstructured:0.9@layer" is RigL, "unstructured:0.9" SRigL, whose outputs have a constant
    fan-in, and an N:M plan keeps n of m. Outputs are never ablated, as SRigL may do: the plan
    would not hold.

    The model needs the plan's zeros before, as by `prune_(model, plan, random)`. The gradient is
    that of the step just taken, all that backwards added up for it; the original takes no step
    where it moves. A grown weight starts at zero, and so does what the optimizer knows of it.
    Three quarters of the training is a usual `end`.

    Cost: at a step that moves, the gradients of planned layers in float32; with several processes,
    one sum over them.
    Raises:
        ValueError: if `every` or `end` is less than 1, or `fraction` not in (0, 1); by `hold`, if
            a layer lacks its plan's zeros.
    Source: Evci et al. 2020, arXiv:1911.11134, algorithm 1; Lasby et al. 2023, arXiv:2305.02299,
        section 3.
    """
    _require(end, every, fraction, "rigl")
    return DropAndGrow(plan, end, every, fraction, None)


def sparse_evolution(
    plan: Plan, end: int, *, every: int = 100, fraction: float = 0.3, seed: int = 0
) -> DropAndGrow:
    """A rule for `hold` that drops by magnitude and grows at random: SET.

    As `rigl`, which needs no more and is usually better, but no gradient is looked at. What grows
    follows from the seed, the layer's name and the step, so that all processes agree. The original
    drops the same fraction all the way.

    Raises:
        ValueError: as `rigl`.
    Source: Mocanu et al. 2018, arXiv:1707.04780, algorithm 1; the decay as in `rigl`.
    """
    _require(end, every, fraction, "sparse_evolution")
    return DropAndGrow(plan, end, every, fraction, seed)


def _require(end: int, every: int, fraction: float, what: str) -> None:
    if min(end, every) < 1:
        raise ValueError(f"{what} needs every >= 1 step and end >= 1, got {every} and {end}")
    if not 0 < fraction < 1:
        raise ValueError(f"{what} drops a fraction of the kept weights in (0, 1), got {fraction:g}")


def _without_smallest(
    pattern: Pattern,
    score: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    dropped: float,
) -> Bool[Tensor, "out in"]:
    """The mask without this fraction of what it keeps, the smallest scores."""
    score = score.masked_fill(~mask, -1)
    are_single = any(True for _ in pattern.groups(mask.shape[1]))
    if are_single or not takes_any_sparsity(pattern):
        kept = int(mask.sum())
        return keep_top(score.flatten(), kept - int(dropped * kept)).view_as(mask)
    return mask & pattern.at(1 - (1 - pattern.sparsity) * (1 - dropped)).mask(score)


# --- random numbers by place ----------------------------------------------------------------------

# The step between two states of SplitMix64, and the factors of its mixing function.
GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(key: str, like: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Numbers in [0, 1) in the matrix's shape, on its device: a function of key and place alone.

    The stream of SplitMix64 that starts at a hash of the key, of which each number has 24 bits.

    Source: Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195, figure 16, with the factors of
        Stafford's variant 13.
    """
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    places = torch.arange(1, like.numel() + 1, device=like.device)
    z = places * _signed(GAMMA) + _signed(start)
    z = (z ^ _shifted(z, 30)) * _signed(FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(SECOND)
    z = z ^ _shifted(z, 31)
    return (_shifted(z, 40).float() / 2**24).view(like.shape)


def _signed(number: int) -> int:
    """The 64-bit number with the same bits in two's complement."""
    return number - 2**64 if number >= 2**63 else number


def _shifted(z: Tensor, by: int) -> Tensor:
    """A shift to the right that brings in zeros, as of unsigned numbers."""
    shifted: Tensor = (z >> by) & (2 ** (64 - by) - 1)
    return shifted
