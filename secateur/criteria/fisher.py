"""Fisher: how much the loss rises without a weight, to second order at a minimum."""

from jaxtyping import Float
from torch import Tensor


def fisher(
    weight: Float[Tensor, "out in"], squared_gradient: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """W_ij^2 F_ij / 2, F the diagonal of the empirical Fisher matrix: mean squared gradients.

    Gradients are taken sample by sample: their mean would vanish at a minimum, where the mean of
    their squares estimates the Hessian of the loss.
    Source: Theis et al., arXiv:1801.05787; WoodFisher, Singh and Alistarh, arXiv:2004.14340.
    """
    return weight.float().square() * squared_gradient / 2
