"""SparseGPT: prune column after column, and let the columns still to come make up for each loss.

Symbols as in the paper: `W` the weight, `H` the damped Hessian of the layer's output error, `U` the
upper Cholesky factor of its inverse, `M` the mask, `E` the columns' errors.

The paper updates the columns to come lazily, 128 at a time. Here the columns are halved again and
again: the left half is eliminated, one product brings the right half up to date, then it is the
right half's turn. That is the same arithmetic in another order, without a batch size, and nearly
all of it in products of matrices. `W` is held transposed, so that a column is contiguous.
Source: Frantar and Alistarh, arXiv:2301.00774, algorithm 1 and sections 3.2-3.3.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.patterns import Pattern
from secateur.reconstruct.solution import Solution

# Each failed factorisation multiplies the damping by ten; 1e-2 to 1e+4 of the mean diagonal.
DAMPING_STEPS = 7


def sparsegpt(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    pattern: Pattern,
    *,
    damping: float = 0.01,
) -> Solution:
    """The weight with the pattern's zeros and kept weights moved so that its outputs change least.

    The mask of each part of the columns is chosen when the walk gets there, from the weights as
    updated so far: the score is w^2 / U_jj^2, what dropping a weight costs. Inputs that were never
    active (zero diagonal) carry no information: their weights become zero and cost nothing.

    Cost: O(in^3 + out in^2) time, 3 in^2 + 3 out in float32 memory.
    Raises:
        ValueError: if H has no Cholesky factor even with the damping raised a million times.
    """
    dead = gram.diagonal() == 0
    U, note = _upper_factor(gram, dead, damping)
    W = weight.float().T.contiguous()
    W[dead] = 0
    walk = _Walk(W, U, torch.zeros_like(W), torch.ones_like(W, dtype=torch.bool))
    walk.prune(list(pattern.parts((weight.shape[0], weight.shape[1]))))
    if dead.any():
        note = "; ".join(filter(None, [note, f"{int(dead.sum())} inputs were never active"]))
    M = walk.M.T.contiguous()
    return Solution(W.T.masked_fill(~M, 0).to(weight.dtype), M, note)


class _Walk:
    """The walk over the columns; W, E and M are transposed, so that a column is contiguous."""

    def __init__(
        self,
        W: Float[Tensor, "in out"],
        U: Float[Tensor, "in in"],
        E: Float[Tensor, "in out"],
        M: Bool[Tensor, "in out"],
    ) -> None:
        self.W, self.U, self.E, self.M = W, U, E, M
        self.d = U.diagonal()

    def prune(self, parts: list[tuple[int, int, Pattern]]) -> None:
        """Choose the masks of these parts one after another, and eliminate what they drop."""
        if len(parts) > 1:
            middle = len(parts) // 2
            self.prune(parts[:middle])
            self.make_up(parts[0][0], parts[middle][0], parts[-1][1])
            self.prune(parts[middle:])
            return
        ((start, stop, pattern),) = parts
        score = (self.W[start:stop] / self.d[start:stop, None]).square().T
        self.M[start:stop] = pattern.mask(score).T
        self.eliminate(start, stop)

    def eliminate(self, start: int, stop: int) -> None:
        """Fill in the errors of these columns: what dropping costs, in units of their curvature."""
        if stop - start > 1:
            middle = (start + stop) // 2
            self.eliminate(start, middle)
            self.make_up(start, middle, stop)
            self.eliminate(middle, stop)
            return
        torch.div(self.W[start].masked_fill(self.M[start], 0), self.d[start], out=self.E[start])

    def make_up(self, start: int, middle: int, stop: int) -> None:
        """Move the columns from `middle` to `stop` against the errors of those before them."""
        self.W[middle:stop].addmm_(
            self.U[start:middle, middle:stop].T, self.E[start:middle], alpha=-1
        )


def _upper_factor(gram: Tensor, dead: Tensor, damping: float) -> tuple[Tensor, str]:
    """U with U^T U = (G + damping mean(diag G) I)^-1; the damping raised until it exists.

    With rows and columns reversed, a lower factor of H becomes an upper R with R R^T = H, and
    U = R^-1: one factorisation and one triangular solve, without forming the inverse of H.
    """
    mean = gram.diagonal().mean()
    for step in range(DAMPING_STEPS):
        raised = damping * 10**step
        H = gram.clone()
        H.diagonal()[dead] = 1
        H.diagonal().add_(raised * mean)
        L, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
        if not failed:
            eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
            U = torch.linalg.solve_triangular(L.flip(0, 1), eye, upper=True)
            return U, f"damping raised from {damping:g} to {raised:g}" if step else ""
    raise ValueError(
        f"sparsegpt needs a Hessian that can be factorised, this one cannot with damping "
        f"{raised:g}: add calibration data, or check it for extreme activations"
    )
