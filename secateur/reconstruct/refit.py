"""Refit: the kept weights that lose least of the outputs, on any mask, for all rows at once.

Symbols: `W` the weight, `M` the mask, `H = G + damping mean(diag G) I` the damped Hessian, `n` the
root of its diagonal, `A = H / (n n^T)`, whose diagonal is 1. With Z the dropped part of W n, the
kept weights move by X / n, where X lies on the mask and X A = Z A there: one linear system per row.
Conjugate gradients solve all rows at once, with one product with A per step and a step size for
each row. Normalising A preconditions the systems by the diagonal.

How much damping is right depends on how much data there is. Of a few values, the one is used whose
refit on part of the data loses least of the outputs on the rest, the held-out part.
Source: Meng et al., NeurIPS 2024, arXiv:2406.07831, section 3.3; Hestenes and Stiefel, 1952.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.float64 import float64_device, in_float64
from secateur.patterns.grids import Grid, require_grid
from secateur.reconstruct.masked import on_mask_of
from secateur.reconstruct.rounding import rounded
from secateur.reconstruct.solution import Solution

# A row's residual, relative to its first. What a refit could still gain is then at most
# TOLERANCE^2 cond(A) of what it gained: 1e-3 of it where cond(A) is 1e5.
TOLERANCE = 1e-4

# The same when dampings are compared, which differ by less than a refit may still gain. At 1e-4 one
# in a hundred choices among ill-conditioned refits lost 0.1 to 3 % more than the best.
COMPARING = 3e-6

# Used where nothing is held out to choose by. SparseGPT's value.
DAMPING = 0.01

# Half a decade apart: the held-out error hardly differs between neighbours. From the largest, whose
# systems take the fewest steps; each solution is the start of the next.
DAMPINGS = (0.1, 0.03, DAMPING, 0.003, 0.001)

# Outputs that the damping is chosen on: all have the same inputs, so a sample is enough.
CHOOSING = 512


def refit(
    method: Callable[..., Any], *, damping: float | None = None, grid: Grid | None = None
) -> Callable[..., Solution]:
    """The algorithm that takes the mask of a criterion or an algorithm and refits what it keeps.

    `sc.reconstruct_(model, plan, sc.refit(sc.wanda), batches)`. Any mask will do; whatever an
    algorithm did to the kept weights, such as rounding to a grid, is replaced. If you already have
    a mask, use `secateur.reconstruct.refitted`, which says what is computed, how the damping is
    chosen on held-out batches unless it is given, and how weights are rounded to a `grid`.

    Cost: the method's, and `refitted`.
    Raises:
        ValueError: if the method is not a function.
    Source: Meng et al., arXiv:2406.07831, section 3.3.
    """
    require_grid(grid, "refit")
    given = {"damping": damping, "grid": grid}
    options = "".join(f", {key}={value!r}" for key, value in given.items() if value is not None)

    def chosen(
        weight: Tensor,
        mask: Tensor,
        gram: Tensor,
        held_gram: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Solution:
        return refitted(weight, mask, gram, held_gram, damping=damping, grid=grid, dtype=dtype)

    def fixed(
        weight: Tensor, mask: Tensor, gram: Tensor, dtype: torch.dtype | None = None
    ) -> Solution:
        return refitted(weight, mask, gram, damping=damping, grid=grid, dtype=dtype)

    finish = chosen if damping is None else fixed  # which asks for fewer statistics
    return on_mask_of(method, finish, "refit", "refitted", options)


def refitted(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    held_gram: Float[Tensor, "in in"] | None = None,
    *,
    damping: float | None = None,
    grid: Grid | None = None,
    dtype: torch.dtype | None = None,
) -> Solution:
    """The What on the mask with the least tr (W - What) H (W - What)^T, its excess bounded.

    That is ||(W - What) X||^2 per token, plus damping mean(diag G) ||W - What||^2, which draws the
    kept weights to where they were. A row is done when its residual is `TOLERANCE` of the first. In
    exact arithmetic that takes at most as many steps as the row keeps weights; `in` is the limit.
    It is computed in float32. Residuals are then computed afresh, and rows where rounding left more
    than twice the tolerance, as with nearly dependent inputs, continue in float64 under the same
    limit; the note counts rows that still miss it. A row that drops nothing keeps every bit, and so
    do weights of inputs that were never active (zero diagonal).

    With `held_gram`, the held-out batches' part of the Gram matrix, the damping is the value in
    `DAMPINGS` whose refit on `gram - held_gram` loses least of the outputs on the held-out part,
    tr (W - What) G_held (W - What)^T, on every n-th output where there are many; the result is the
    refit on all of `gram` with that damping. The note names it where it is not `DAMPING`, which is
    used where nothing is held out, as with a single batch. A given damping is used as it is.

    With a `grid`, What is then rounded to it by `secateur.reconstruct.rounding.rounded`, scales in
    the `dtype` in which the layer will store them (by default the weight's own).

    Cost: out in^2 time per step, 10 to 100 steps, and five solutions for at most 1,023 of the
        outputs to choose the damping; 7 out in + 2 in^2 in float32 memory; then that of `rounded`.
    Raises:
        ValueError: if the damping is negative, a Gram matrix is not finite or has a negative
            diagonal, or `rounded` finds no factor of it.
    Source: Meng et al., arXiv:2406.07831, section 3.3; damping as in SparseGPT, arXiv:2301.00774.
    """
    W = weight.float()
    notes = []
    if damping is None:
        damping = DAMPING if held_gram is None else _chosen_damping(W, mask, gram, held_gram)
        notes += [f"damping {damping:g}"] if damping != DAMPING else []
    X, rough = _solved(gram, damping, W, mask, torch.zeros_like(W), TOLERANCE)
    if rough.any() and (still := _in_float64_(X, rough, gram, damping, W, mask)):
        notes.append(f"the refit of {still} outputs did not converge, raise the damping")
    if dead := int((gram.diagonal() == 0).sum()):
        notes.append(f"{dead} inputs were never active")
    new = W.masked_fill(~mask, 0) + X
    if grid is not None:
        new = rounded(new, mask, gram, grid, damping=damping, dtype=dtype or weight.dtype).weight
    return Solution(new.to(weight.dtype), mask, "; ".join(notes))


def _in_float64_(
    X: Float[Tensor, "out in"],
    rough: Bool[Tensor, " out"],
    gram: Float[Tensor, "in in"],
    damping: float,
    W: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
) -> int:
    """Go on with the rough rows of X in float64; the number of those that still miss."""
    there = float64_device(W.device)
    W, mask, start = in_float64(W[rough]), mask[rough].to(there), in_float64(X[rough])
    better, still = _solved(gram.to(there), damping, W, mask, start, TOLERANCE)
    X[rough] = better.to(X)
    return int(still.sum())


def _chosen_damping(
    W: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    held_gram: Float[Tensor, "in in"],
) -> float:
    """The value in `DAMPINGS` whose refit on the rest loses least of the held-out outputs."""
    require_gram(held_gram)
    rest = gram - held_gram
    rest.diagonal().clamp_(min=0)  # rounding may have left it below 0
    if not (held_gram.diagonal().any() and rest.diagonal().any()):
        return DAMPING
    some = slice(None, None, max(1, len(W) // CHOOSING))
    W, mask = W[some], mask[some]
    X, errors = torch.zeros_like(W), {}
    for damping in DAMPINGS:
        X, _ = _solved(rest, damping, W, mask, X, COMPARING)
        lost = W.masked_fill(mask, 0) - X
        errors[damping] = float(((lost @ held_gram) * lost).sum().nan_to_num(torch.inf))
    least = min(errors.values())
    return DAMPING if errors[DAMPING] == least else min(errors, key=lambda d: errors[d])


def _solved(
    gram: Float[Tensor, "in in"],
    damping: float,
    W: Float[Tensor, "rows in"],
    mask: Bool[Tensor, "rows in"],
    start: Float[Tensor, "rows in"],
    tolerance: float,
) -> tuple[Float[Tensor, "rows in"], Bool[Tensor, " rows"]]:
    """How far kept weights move, iterated from `start`, and the rows beyond twice the tolerance.

    It is computed in the dtype of W.
    """
    A, n = normalised(gram, damping, W.dtype)
    Z = W.masked_fill(mask, 0) * n
    goal = tolerance**2 * _on(mask, Z @ A).square().sum(1)
    X = start.nan_to_num(0, 0, 0) * n
    X = X + _conjugate_gradients(A, _on(mask, (Z - X) @ A), mask, goal)
    left = _on(mask, (Z - X) @ A).square().sum(1)
    return X / n.masked_fill(n == 0, 1), ~(left <= 4 * goal)


def normalised(
    gram: Float[Tensor, "in in"], damping: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "in in"], Float[Tensor, " in"]]:
    """A = H / (n n^T) and n, the root of the diagonal of H = G / mean(diag G) + damping I.

    Where n is zero, so are the row and the column of A.

    Raises:
        ValueError: if the damping is negative, or G is not finite or has a negative diagonal.
    """
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be a number of at least 0, got {damping:g}: 0.01 is usual")
    require_gram(gram)
    mean = gram.diagonal().to(dtype).mean()
    H = gram.to(dtype) / mean.masked_fill(mean == 0, 1)
    H.diagonal().add_(damping * (mean > 0).to(dtype))
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


def _conjugate_gradients(
    A: Float[Tensor, "in in"],
    R: Float[Tensor, "rows in"],
    mask: Bool[Tensor, "rows in"],
    goal: Float[Tensor, " rows"],
) -> Float[Tensor, "rows in"]:
    """X on the mask with X A = R there, each row until its squared residual is within its goal.

    Rows that are done, or meet a direction without curvature, are frozen; once these are half of
    the rows, the products leave them out.
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
    """The matrix itself, zeroed in place where the mask drops."""
    return matrix.masked_fill_(~mask, 0)
