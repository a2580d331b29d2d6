"""A criterion from outside: Wanda's with the square root of the norm."""

from jaxtyping import Float
from torch import Tensor


def softened(
    weight: Float[Tensor, "out in"], input_norm: Float[Tensor, " in"]
) -> Float[Tensor, "out in"]:
    """|W| * sqrt ||x||."""
    return weight.abs() * input_norm.sqrt()
