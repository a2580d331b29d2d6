"""An algorithm from outside: the largest weights, scaled to the output energy of each row."""

from jaxtyping import Float
from torch import Tensor

from secateur.patterns import Pattern
from secateur.reconstruct import Solution


def rescaled(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"], pattern: Pattern
) -> Solution:
    """The kept weights of a row, scaled to leave w G w^T unchanged."""
    mask = pattern.mask(weight.abs())
    kept = weight.masked_fill(~mask, 0)
    before, after = (((w @ gram) * w).sum(1, keepdim=True) for w in (weight, kept))
    return Solution(kept * (before / after.clamp(min=1e-12)).sqrt(), mask, "rescaled")
