"""Wanda: a weight matters as much as the activation that meets it."""

from jaxtyping import Float
from torch import Tensor


def wanda(
    weight: Float[Tensor, "out in"], input_norm: Float[Tensor, " in"]
) -> Float[Tensor, "out in"]:
    """|W_ij| * ||x_j||_2, to be compared within an output row or an N:M group.

    Source: Wanda, Sun et al., arXiv:2306.11695, eq. 1.
    """
    return weight.float().abs() * input_norm
