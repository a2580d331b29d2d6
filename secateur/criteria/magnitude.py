"""Magnitude: a weight matters as much as it is large."""

from jaxtyping import Float
from torch import Tensor


def magnitude(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """|W_ij|; a block or channel scores its L1 norm. Han et al., arXiv:1506.02626, sec. 3."""
    return weight.abs()


def magnitude_l2(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """W_ij^2; a block or channel scores its squared L2 norm. Weights rank as by `magnitude`."""
    return weight.float().square()
