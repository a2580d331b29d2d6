"""SNIP: how much the loss hangs on whether a weight is there."""

from jaxtyping import Float
from torch import Tensor


def snip(
    weight: Float[Tensor, "out in"], gradient: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """|W_ij dL/dW_ij|: the derivative of the loss by a factor that switches the weight off.

    The paper prunes a network before it is trained; here it is the network as it is.
    Source: Lee et al., arXiv:1810.02340, without the factor common to all weights.
    """
    return (weight.float() * gradient).abs()
