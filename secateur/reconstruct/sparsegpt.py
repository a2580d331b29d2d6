"""SparseGPT: prune column after column, and let the columns still to come make up for each loss.

Symbols as in the paper: `W` the weight, `H` the damped Hessian of the layer's output error, `U` the
upper Cholesky factor of its inverse, `M` the mask, `E` the errors of a batch of columns.
Source: Frantar and Alistarh, arXiv:2301.00774, algorithm 1 and sections 3.2-3.3.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.patterns import Pattern
from secateur.reconstruct.solution import Solution

# Columns updated at once: the paper's lazy-batch size B. A part of a pattern is never split.
LAZY_COLUMNS = 128

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

    Cost: O(in^3 + out in^2) time, 3 in^2 + 2 out in float32 memory.
    Raises:
        ValueError: if H has no Cholesky factor even with the damping raised a million times.
    """
    W = weight.float().clone()
    dead = gram.diagonal() == 0
    W[:, dead] = 0
    U, note = _upper_factor(gram, dead, damping)
    M = torch.ones_like(W, dtype=torch.bool)
    d = U.diagonal()
    for batch in _lazy_batches(pattern, (W.shape[0], W.shape[1])):
        b, e = batch[0][0], batch[-1][1]
        E = torch.empty_like(W[:, b:e])
        for start, stop, part in batch:
            columns = slice(start, stop)
            M[:, columns] = part.mask(W[:, columns] ** 2 / d[columns] ** 2)
            for j in range(start, stop):
                E[:, j - b] = W[:, j].masked_fill(M[:, j], 0) / U[j, j]
                W[:, j:e].addr_(E[:, j - b], U[j, j:e], alpha=-1)
        W[:, e:].addmm_(E, U[b:e, e:], alpha=-1)
    if dead.any():
        note = "; ".join(filter(None, [note, f"{int(dead.sum())} inputs were never active"]))
    return Solution(W.masked_fill(~M, 0).to(weight.dtype), M, note)


def _upper_factor(gram: Tensor, dead: Tensor, damping: float) -> tuple[Tensor, str]:
    """U with U^T U = (G + damping mean(diag G) I)^-1; the damping raised until it exists."""
    mean = gram.diagonal().mean()
    for step in range(DAMPING_STEPS):
        raised = damping * 10**step
        H = gram.clone()
        H.diagonal()[dead] = 1
        H.diagonal().add_(raised * mean)
        L, failed = torch.linalg.cholesky_ex(H)
        if not failed:
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
        if not failed:
            return U, f"damping raised from {damping:g} to {raised:g}" if step else ""
    raise ValueError(
        f"sparsegpt needs a Hessian that can be factorised, this one cannot with damping "
        f"{raised:g}: add calibration data, or check it for extreme activations"
    )


def _lazy_batches(pattern: Pattern, shape: tuple[int, int]) -> list[list[tuple[int, int, Pattern]]]:
    """The pattern's parts in batches of at least `LAZY_COLUMNS` columns, the last of the rest."""
    batches: list[list[tuple[int, int, Pattern]]] = [[]]
    for part in pattern.parts(shape):
        if batches[-1] and batches[-1][-1][1] - batches[-1][0][0] >= LAZY_COLUMNS:
            batches.append([])
        batches[-1].append(part)
    return batches
