"""ALPS: a mask from ADMM, which lets weights and zeros come to terms, then the exact refit.

Symbols as in the paper, in its normalised space: `B` the weight that fits the outputs, `D` the one
with the pattern's zeros, `V` the dual variable that draws them together, `rho` how strongly, `A`
the damped and normalised Gram matrix, `Q` and `L` its eigenvectors and eigenvalues, `W` the
weight. Rows here are the paper's columns.
Source: Meng et al., NeurIPS 2024, arXiv:2406.07831, algorithms 1 and 2 and appendix B; the smaller
start where rho was too large at once is of the authors' code.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.patterns import Pattern
from secateur.reconstruct.refit import normalised, refitted
from secateur.reconstruct.solution import Solution

RHO = 0.1  # the first
EVERY = 3  # iterations between two looks at the support
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # rho grows if more than this share of it changed
SMALLER = 5.0
ITERATIONS = 300


def alps(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    pattern: Pattern,
    *,
    damping: float = 0.01,
) -> Solution:
    """The weight with the pattern's zeros where ADMM finds that they cost least, then refitted.

    Weights compete for the mask by their squared magnitude, each in units of its input's norm, as
    they are after making up for one another. Any pattern works: its own mask of that score is the
    projection.

    Cost: O(in^3) once in float64, for the eigenvectors, and two products with an in x in matrix an
        iteration, 300 at most; 8 out in + 6 in^2 in float32 memory; then that of the refit.
    Raises:
        ValueError: as `secateur.reconstruct.refitted`.
    Source: Meng et al., NeurIPS 2024, arXiv:2406.07831.
    """
    A, n = normalised(gram, damping, torch.float64)
    mask, settled = _admm(weight.double() * n, A, pattern)
    found = refitted(weight, mask, gram, damping=damping)
    note = "" if settled else f"the mask still changed after {ITERATIONS} iterations"
    return found._replace(note="; ".join(filter(None, [note, found.note])))


def _admm(
    W: Float[Tensor, "out in"], A: Float[Tensor, "in in"], pattern: Pattern
) -> tuple[Bool[Tensor, "out in"], bool]:
    """The support of D once it has stopped changing, and whether it has."""
    L, Q = (part.float() for part in torch.linalg.eigh(A))
    WA = (W @ A).float()
    start = W.float()
    seen = first = pattern.mask(start.square())
    D, V = start.masked_fill(~first, 0), torch.zeros_like(start)
    rho, raised = RHO, False
    for t in range(1, ITERATIONS + 1):
        B = ((WA - V + rho * D) @ Q / (L.clamp(min=0) + rho)) @ Q.T
        D = B + V / rho
        mask = pattern.mask(D.square())
        D.masked_fill_(~mask, 0)
        V = V + rho * (B - D)
        if t % EVERY:
            continue
        changed = int((mask != seen).sum()) / max(1, int(mask.sum()))
        seen = mask
        growth = next((factor for share, factor in GROWTH if changed > share), None)
        if raised and growth is None:
            return mask, True
        if raised or changed > GROWTH[1][0]:
            assert growth is not None
            rho, raised = rho * growth, True
        else:
            rho /= SMALLER
            seen, D, V = first, start.masked_fill(~first, 0), torch.zeros_like(start)
    return seen, False
