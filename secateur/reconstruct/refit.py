"""Refit: the kept weights that lose least of the outputs, on any mask, for all rows at once.

Symbols: `W` the weight, `M` the mask, `H = G + damping mean(diag G) I` the damped Hessian, `n` the
root of its diagonal, `A = H / (n n^T)`, whose diagonal is 1. With Z the dropped part of W n, the
kept weights move by X / n, where X lies on the mask and X A = Z A there: one linear system a row.
Conjugate gradients solve all rows at once, a product with A each step, with step sizes of their
own. That A is normalised is the preconditioning, by the diagonal.
Source: Meng et al., NeurIPS 2024, arXiv:2406.07831, section 3.3; Hestenes and Stiefel, 1952.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.reconstruct.masked import on_mask_of
from secateur.reconstruct.solution import Solution

# Of the residual of a row, relative to the one it starts with. What a refit could still gain is
# then at most TOLERANCE^2 cond(A) of what it gained: 1e-3 of it where cond(A) is 1e5.
TOLERANCE = 1e-4


def refit(method: Callable[..., Any], *, damping: float = 0.01) -> Callable[..., Solution]:
    """The algorithm that takes the mask of a criterion or an algorithm and refits what it keeps.

    `sc.reconstruct_(model, plan, sc.refit(sc.wanda), batches)`. Any mask will do; what an algorithm
    did with the kept weights, rounding to a grid included, is replaced. For a mask at hand there is
    `secateur.reconstruct.refitted`, which says what is computed.

    Cost: that of the method, and a product with an in x in matrix a step, 10 to 100 steps.
    Raises:
        ValueError: if the method is no function.
    Source: Meng et al., arXiv:2406.07831, section 3.3.
    """
    option = "" if damping == 0.01 else f", damping={damping!r}"
    return on_mask_of(
        method,
        lambda weight, mask, gram, pattern: refitted(weight, mask, gram, damping=damping),
        "refit",
        "refitted",
        option,
    )


def refitted(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    *,
    damping: float = 0.01,
) -> Solution:
    """The What on the mask with the least tr (W - What) H (W - What)^T, its excess bounded.

    That is ||(W - What) X||^2 a token, and damping mean(diag G) ||W - What||^2, which draws the
    kept weights to where they were. A row is done when its residual is `TOLERANCE` of the first; it
    then rests. In exact arithmetic that takes as many steps as it keeps weights, and `in` is the
    bound. It is computed in float32. Then residuals are computed afresh, and rows where rounding
    left more than twice the tolerance, as nearly dependent inputs do, go on in float64, bounded as
    before; rows that remain are told in the note. A row that drops nothing does not change by a
    bit, nor do weights of inputs that were never active (zero diagonal).

    Cost: out in^2 time a step, 10 to 100 steps; 7 out in + 2 in^2 in float32 memory.
    Raises:
        ValueError: if the damping is negative, or the Gram matrix is not finite or has a negative
            diagonal.
    Source: Meng et al., arXiv:2406.07831, section 3.3; damping as in SparseGPT, arXiv:2301.00774.
    """
    A, n = normalised(gram, damping, torch.float32)
    W = weight.float()
    Z = W.masked_fill(mask, 0) * n
    R = _on(mask, Z @ A)
    goal = TOLERANCE**2 * R.square().sum(1)
    X = _conjugate_gradients(A, R, mask, goal)
    rough = ~(_on(mask, (Z - X) @ A).square().sum(1) <= 4 * goal)
    note = ""
    if rough.any():
        X[rough], open_rows = _in_float64(gram, damping, W[rough], mask[rough], X[rough])
        if open_rows:
            note = f"the refit of {open_rows} outputs did not converge, raise the damping"
    if dead := int((gram.diagonal() == 0).sum()):
        note = "; ".join(filter(None, [note, f"{dead} inputs were never active"]))
    new = W.masked_fill(~mask, 0) + X / n.masked_fill(n == 0, 1)
    return Solution(new.to(weight.dtype), mask, note)


def normalised(
    gram: Float[Tensor, "in in"], damping: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "in in"], Float[Tensor, " in"]]:
    """A = H / (n n^T) and n, the root of the diagonal of H = G / mean(diag G) + damping I.

    Where n is zero, row and column of A are zeros.

    Raises:
        ValueError: if the damping is negative, or G is not finite or has a negative diagonal.
    """
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be a number of at least 0, got {damping:g}: 0.01 is usual")
    require_gram(gram)
    mean = gram.diagonal().to(dtype).mean()
    H = gram.to(dtype) / mean.masked_fill(mean == 0, 1)
    H.diagonal().add_(damping * (mean > 0))
    n = H.diagonal().sqrt()
    inverse = n.masked_fill(n == 0, 1).reciprocal()
    return H.mul_(inverse[:, None]).mul_(inverse), n


def require_gram(gram: Float[Tensor, "in in"]) -> None:
    """Raise unless the matrix is finite, with no negative number on its diagonal."""
    d = gram.diagonal()
    wrong = int((~gram.isfinite()).sum())
    if wrong or (d < 0).any():
        what = f"{wrong} entries that are not finite" if wrong else f"a diagonal of {d.min():g}"
        raise ValueError(
            f"a Gram matrix is finite with squares on its diagonal, this one has {what}: check the "
            "calibration data for NaN and extreme activations"
        )


def _in_float64(
    gram: Tensor, damping: float, W: Tensor, mask: Tensor, X: Tensor
) -> tuple[Tensor, int]:
    """X brought to the tolerance, from where float32 left it, and the rows that still miss it."""
    A, n = normalised(gram, damping, torch.float64)
    Z = W.double().masked_fill(mask, 0) * n
    goal = TOLERANCE**2 * _on(mask, Z @ A).square().sum(1)
    start = X.double().nan_to_num(0, 0, 0)
    X = start + _conjugate_gradients(A, _on(mask, (Z - start) @ A), mask, goal)
    left = _on(mask, (Z - X) @ A).square().sum(1)
    return X.float(), int((left > 4 * goal).sum())


def _conjugate_gradients(
    A: Float[Tensor, "in in"],
    R: Float[Tensor, "rows in"],
    mask: Bool[Tensor, "rows in"],
    goal: Float[Tensor, " rows"],
) -> Float[Tensor, "rows in"]:
    """X on the mask with X A = R there, each row until its squared residual is within its goal.

    Rows that are done, or meet a direction without curvature, rest; they are left out of the
    products once they are half of all.
    """
    found = torch.zeros_like(R)
    rows = torch.arange(len(R), device=R.device)
    X, P, square = found.clone(), R.clone(), R.square().sum(1)
    for _ in range(R.shape[1]):
        active = square > goal
        count = int(active.sum())
        if not count:
            break
        if 2 * count <= len(rows):
            found[rows] = X
            state = rows, X, R, P, mask, square, goal, active
            rows, X, R, P, mask, square, goal, active = (kept[active] for kept in state)
        Q = _on(mask, P @ A)
        curvature = (P * Q).sum(1)
        goal = goal.masked_fill(active & ~(curvature > 0), torch.inf)
        active &= curvature > 0
        alpha = (square / curvature).masked_fill(~active, 0)[:, None]
        X = X.addcmul(alpha, P)
        R = R.addcmul(alpha, Q, value=-1)
        before, square = square, R.square().sum(1)
        beta = (square / before).masked_fill(~active, 0)[:, None]
        P = R.addcmul(beta, P)
    found[rows] = X
    return found


def _on(mask: Tensor, matrix: Tensor) -> Tensor:
    """The matrix with zeros where the mask drops; in place."""
    return matrix.masked_fill_(~mask, 0)
