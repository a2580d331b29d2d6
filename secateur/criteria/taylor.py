"""Taylor: how much the loss changes without a weight, to first order."""

from jaxtyping import Float
from torch import Tensor


def taylor(
    weight: Float[Tensor, "out in"], gradient: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """(W_ij dL/dW_ij)^2, the first-order estimate of the squared change of the loss.

    A block or channel scores the sum over its weights, as in the paper; single weights rank as by
    `snip`.
    Source: Molchanov et al., arXiv:1906.10771, the first-order criterion.
    """
    return (weight.float() * gradient).square()
