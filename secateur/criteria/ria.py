"""RIA: a weight matters relative to the other weights in its row and in its column."""

from jaxtyping import Float
from torch import Tensor


def ria(
    weight: Float[Tensor, "out in"], input_norm: Float[Tensor, " in"], *, power: float = 0.5
) -> Float[Tensor, "out in"]:
    """(|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * ||x_j||_2^power.

    The column's share keeps an input whose weights are all small from being lost as a whole.
    Source: Zhang et al., ICLR 2024, Plug-and-Play: An Efficient Post-training Pruning Method for
    Large Language Models, which compares with Wanda, arXiv:2306.11695.
    """
    W = weight.float().abs()
    row, column = W.sum(1, keepdim=True), W.sum(0, keepdim=True)
    relative = W / row.masked_fill(row == 0, 1) + W / column.masked_fill(column == 0, 1)
    return relative * input_norm**power
