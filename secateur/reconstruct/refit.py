"""Refit: the kept weights that lose least of the outputs, on any mask, for all rows at once.

Symbols: `W` the weight, `M` the mask, `H = G + damping mean(diag G) I` the damped Hessian, `n` the
root of its diagonal, `A = H / (n n^T)`, whose diagonal is 1. With Z the dropped part of W n, the
kept weights move by X / n, where X lies on the mask and X A = Z A there: one linear system a row.
Conjugate gradients solve all rows at once, a product with A each step, with step sizes of their
own. That A is normalised is the preconditioning, by the diagonal.

How much damping there should be depends on how much data there is. It is the one of a few whose
refit on part of the data loses least of the outputs on the rest, the held-out part.
Source: Meng et al., NeurIPS 2024, arXiv:2406.07831, section 3.3; Hestenes and Stiefel, 1952.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.float64 import float64_device, in_float64
from secateur.reconstruct.masked import on_mask_of
from secateur.reconstruct.solution import Solution

# Of the residual of a row, relative to the one it starts with. What a refit could still gain is
# then at most TOLERANCE^2 cond(A) of what it gained: 1e-3 of it where cond(A) is 1e5.
TOLERANCE = 1e-4

# The same where dampings are compared: they differ by less than what a refit may still gain. At
# 1e-4 one in a hundred choices among ill-conditioned refits lost 0.1 to 3 % more than the best.
COMPARING = 3e-6

# Where nothing is held out to choose it by. SparseGPT's.
DAMPING = 0.01

# Half a decade apart: between two neighbours the held-out error hardly differs. From the largest,
# whose systems take the fewest steps, each solution the start of the next.
DAMPINGS = (0.1, 0.03, DAMPING, 0.003, 0.001)

# Of the outputs, that the choice is made on: all have the same inputs, so that some speak for all.
CHOOSING = 512


def refit(method: Callable[..., Any], *, damping: float | None = None) -> Callable[..., Solution]:
    """The algorithm that takes the mask of a criterion or an algorithm and refits what it keeps.

    `sc.reconstruct_(model, plan, sc.refit(sc.wanda), batches)`. Any mask will do; what an algorithm
    did with the kept weights, rounding to a grid included, is replaced. For a mask at hand there is
    `secateur.reconstruct.refitted`, which says what is computed, and how the damping is chosen on
    held-out batches unless it is given.

    Cost: that of the method, and of `refitted`.
    Raises:
        ValueError: if the method is no function.
    Source: Meng et al., arXiv:2406.07831, section 3.3.
    """
    if damping is None:
        return on_mask_of(method, refitted, "refit", "refitted")

    def fixed(weight: Tensor, mask: Tensor, gram: Tensor) -> Solution:
        return refitted(weight, mask, gram, damping=damping)

    return on_mask_of(method, fixed, "refit", "refitted", f", damping={damping!r}")


def refitted(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    held_gram: Float[Tensor, "in in"] | None = None,
    *,
    damping: float | None = None,
) -> Solution:
    """The What on the mask with the least tr (W - What) H (W - What)^T, its excess bounded.

    That is ||(W - What) X||^2 a token, and damping mean(diag G) ||W - What||^2, which draws the
    kept weights to where they were. A row is done when its residual is `TOLERANCE` of the first; it
    then rests. In exact arithmetic that takes as many steps as it keeps weights, and `in` is the
    bound. It is computed in float32. Then residuals are computed afresh, and rows where rounding
    left more than twice the tolerance, as nearly dependent inputs do, go on in float64, bounded as
    before; rows that remain are told in the note. A row that drops nothing does not change by a
    bit, nor do weights of inputs that were never active (zero diagonal).

    With `held_gram`, the part of the Gram matrix that is of held-out batches, the damping is the
    one of `DAMPINGS` whose refit on `gram - held_gram` loses least of the outputs on the held-out
    part, tr (W - What) G_held (W - What)^T, of every n-th output where there are many; the result
    is the refit on all of `gram` with it. The note says where it is not `DAMPING`, which it is
    where nothing is held out, as of one batch. A given damping is taken as it is.

    Cost: out in^2 time a step, 10 to 100 steps, and five solutions for at most 1,023 of the outputs
        to choose the damping; 7 out in + 2 in^2 in float32 memory.
    Raises:
        ValueError: if the damping is negative, or a Gram matrix is not finite or has a negative
            diagonal.
    Source: Meng et al., arXiv:2406.07831, section 3.3; damping as in SparseGPT, arXiv:2301.00774.
    """
    W = weight.float()
    notes = []
    if damping is None:
        damping = DAMPING if held_gram is None else _chosen_damping(W, mask, gram, held_gram)
        notes += [f"damping {damping:g}"] if damping != DAMPING else []
    X, rough = _solved(gram, damping, W, mask, torch.zeros_like(W), TOLERANCE)
    if rough.any():
        there = float64_device(W.device)
        better, still = _solved(
            gram.to(there),
            damping,
            in_float64(W[rough]),
            mask[rough].to(there),
            in_float64(X[rough]),
            TOLERANCE,
        )
        X[rough] = better.to(X)
        if still.any():
            notes.append(
                f"the refit of {int(still.sum())} outputs did not converge, raise the damping"
            )
    if dead := int((gram.diagonal() == 0).sum()):
        notes.append(f"{dead} inputs were never active")
    new = W.masked_fill(~mask, 0) + X
    return Solution(new.to(weight.dtype), mask, "; ".join(notes))


def _chosen_damping(
    W: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    held_gram: Float[Tensor, "in in"],
) -> float:
    """The one of `DAMPINGS` whose refit on the rest loses least of the held-out outputs."""
    require_gram(held_gram)
    rest = gram - held_gram
    rest.diagonal().clamp_(min=0)  # where rounding left less than nothing
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
    """By how much kept weights move, from a start on, and which rows miss the tolerance twice.

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

    Where n is zero, row and column of A are zeros.

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
