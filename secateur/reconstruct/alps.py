"""ALPS: a mask from ADMM, which settles weights and zeros together, then the exact refit.

Symbols as in the paper, in its normalised space: `B` the weight that fits the outputs, `D` the
weight with the pattern's zeros, `V` the dual variable that draws them together, `rho` how strongly,
`A` the damped and normalised Gram matrix, `Q` and `L` its eigenvectors and eigenvalues, `W` the
weight. Rows here are the paper's columns.
Source: Meng et al., NeurIPS 2024, arXiv:2406.07831, algorithms 1 and 2 and appendix B; the smaller
start if rho is too large from the beginning is in the authors' code.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.float64 import float64_device
from secateur.model.statistics import call
from secateur.patterns import Pattern
from secateur.patterns.grids import Grid, require_grid
from secateur.reconstruct.refit import DAMPING, normalised, refitted
from secateur.reconstruct.solution import Solution

RHO = 0.1  # the initial value
EVERY = 3  # iterations between two looks at the support
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # rho's, where more than this share of it changed
SMALLER, LEAST_RHO = 5.0, 1e-5  # where hardly a weight can change, no rho changes more of them
ITERATIONS = 300

# Share of ||A|| by which eigenvectors in float32 may miss A. ADMM divides by L + rho, so what
# counts is this beside rho; float32 misses by about 1e-6.
MISSED = 1e-4


def alps(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    pattern: Pattern,
    held_gram: Float[Tensor, "in in"] | None = None,
    *,
    damping: float | None = None,
    grid: Grid | None = None,
    dtype: torch.dtype | None = None,
    memo: Callable[..., Any] = call,
) -> Solution:
    """The weight with the pattern's zeros where ADMM finds that they cost least, then refitted.

    Weights compete for the mask by their squared magnitude, each in units of its input's norm,
    after they have made up for one another. Any pattern works: its own mask of that score is the
    projection. The mask is found with the damping `DAMPING`; for the refit the held-out part of the
    data chooses it. A given `damping` is used for both. With a `grid` the refitted weights are
    rounded to it, as by `secateur.reconstruct.refitted`.

    Cost: O(in^3), for the eigenvectors, which layers with the same input share (`memo`), and two
        products with an in x in matrix per iteration, 300 at most; 8 out in + 6 in^2 in float32
        memory; then the refit.
    Raises:
        ValueError: as `secateur.reconstruct.refitted`.
    Source: Meng et al., NeurIPS 2024, arXiv:2406.07831.
    """
    require_grid(grid, "alps")
    mask, settled = pattern.mask(weight.float().abs()), True
    if weight[~mask].any():  # else there is nothing to choose, or the zeros are there
        for_mask = DAMPING if damping is None else damping
        L, Q = memo(_eigenvectors, gram, for_mask)
        A, n = normalised(gram, for_mask, torch.float32)
        start = weight.float() * n
        WA = start @ A
        del A, n  # the refit needs the room
        mask, settled = _admm(start, WA, L, Q, pattern)
    found = refitted(
        weight, mask, gram, held_gram, damping=damping, grid=grid, dtype=dtype or weight.dtype
    )
    note = "" if settled else f"the mask still changed after {ITERATIONS} iterations"
    return found._replace(note="; ".join(filter(None, [note, found.note])))


def _eigenvectors(
    gram: Float[Tensor, "in in"], damping: float
) -> tuple[Float[Tensor, " in"], Float[Tensor, "in in"]]:
    """L and Q of the normalised Gram matrix, found in float64 where float32 fails."""
    A, _ = normalised(gram, damping, torch.float32)
    with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        L, Q = torch.linalg.eigh(A)
        if (Q * L @ Q.T).sub_(A).norm() <= MISSED * A.norm():
            return L, Q
    wide = gram.to(float64_device(gram.device))
    L, Q = torch.linalg.eigh(normalised(wide, damping, torch.float64)[0])
    return L.to(gram), Q.to(gram)


def _admm(
    start: Float[Tensor, "out in"],
    WA: Float[Tensor, "out in"],
    L: Float[Tensor, " in"],
    Q: Float[Tensor, "in in"],
    pattern: Pattern,
) -> tuple[Bool[Tensor, "out in"], bool]:
    """The support of D at the end, and whether it had stopped changing."""
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
        raised = raised or rho < LEAST_RHO
        if raised and growth is None:
            return mask, True
        if raised or changed > GROWTH[1][0]:
            assert growth is not None
            rho, raised = rho * growth, True
        else:
            rho /= SMALLER
            seen, D, V = first, start.masked_fill(~first, 0), torch.zeros_like(start)
    return seen, False
