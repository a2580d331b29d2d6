"""SNIP: how much the loss depends on whether a weight is present."""

from jaxtyping import Float
from torch import Tensor


def snip(
    weight: Float[Tensor, "out in"], gradient: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """|W_ij dL/dW_ij|: the derivative of the loss with respect to a factor on the weight.

    The paper prunes a network before training; here the network is pruned as it is.
    Source: Lee et al., arXiv:1810.02340, without the factor common to all weights.
    """
    return (weight.float() * gradient).abs()
