"""The score of Wanda++: Wanda, and how much a weight moves what its block puts out."""

from jaxtyping import Float
from torch import Tensor


def wanda_regional(
    weight: Float[Tensor, "out in"],
    input_norm: Float[Tensor, " in"],
    regional_gradient: Float[Tensor, "out in"],
    *,
    alpha: float = 100.0,
) -> Float[Tensor, "out in"]:
    """(alpha G_ij + ||x_j||_2) |W_ij|, G the regional gradient: Wanda++ without its optimisation.

    The gradients are those of the dense blocks on dense inputs, where the paper takes the inputs
    that the pruned blocks before make. ||x_j||_2 grows with the calibration data, G does not: the
    paper's alpha of 100 was chosen on its own data, and much more or less of it needs another.
    Source: Wanda++, Yang et al., arXiv:2503.04992, the regional gradient score.
    """
    return (alpha * regional_gradient + input_norm) * weight.float().abs()
