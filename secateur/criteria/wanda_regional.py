"""The score of Wanda++: Wanda's, plus how much a weight moves its block's output."""

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

    Gradients are taken in the dense blocks on dense inputs; the paper takes them on the outputs of
    the pruned blocks before. ||x_j||_2 grows with the amount of calibration data, G does not: the
    paper's alpha of 100 was chosen for its own data, and much more or less data needs another.
    Source: Wanda++, Yang et al., arXiv:2503.04992, the regional gradient score.
    """
    return (alpha * regional_gradient + input_norm) * weight.float().abs()
