"""Sparse plus low rank: the part of a weight to leave to two thin matrices, so zeros cost less.

Symbols: `W` the weight, `D` the norms of its inputs, `S` the sparse part, `B A` the low-rank part,
`E = (W - S) D`. S and B A take turns at minimising ||(W - S - B A) D||, each the best for the
other: S is W - B A on the pattern's mask of its own squares, in units of D. The paper computes the
truncated SVD of E anew each time. Here B continues from the last one: the best A for it, then the
best B for that A, which together are B = orth(E E^T B), A = B^T (W - S). So each of the three steps
is a least-squares problem, the norm never grows, and nothing is divided by D.
Source: OATS, Zhang and Papyan 2024, arXiv:2409.13652, algorithms 1 and 2; the step for B is a
subspace iteration.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.patterns import Pattern
from secateur.reconstruct.lowrank import compensation

ITERATIONS = 80  # the paper's


def low_rank_part(
    weight: Float[Tensor, "out in"],
    input_norm: Float[Tensor, " in"],
    pattern: Pattern,
    rank: int,
    iterations: int = ITERATIONS,
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """The factors B, A of the part of the weight not to prune, B with orthonormal columns.

    Pruning `weight - B @ A` instead of the weight loses less, whatever the method;
    `compensation(weight, sparse part)` then makes up for what is still lost. B starts as the
    leading left singular vectors of the weight in units of the input norms. It is computed in
    float32, the start in float64, and returned in the weight's dtype.

    Cost: `compensation`, then 6 out in rank operations and the pattern's mask per iteration.
    Raises:
        ValueError: if the rank is not from 1 to min(out, in), an input norm is not finite, or the
            pattern does not suit the weight.
    Source: OATS, arXiv:2409.13652, algorithms 1 and 2.
    """
    W, D = weight.float(), input_norm.float()
    S = torch.zeros_like(W)
    B, A = compensation(W, S, D.square().diag(), rank, damping=0.0)
    for _ in range(iterations):
        rest = W - B @ A
        mask = pattern.mask((rest * D).square())
        S = rest.masked_fill(~mask, 0)
        E = (W - S) * D
        B = torch.linalg.qr(E @ (E.T @ B)).Q
        A = B.T @ (W - S)
    return B.to(weight.dtype), A.to(weight.dtype)
