"""Swap: a mask improved by exchanges of a kept for a dropped weight, whose gain is exact.

Symbols: `W` the weight, `R` the dropped part of a row, zero where it keeps, `G` the Gram matrix,
`C = R G`. A row's error is R G R^T. Dropping a kept u and restoring a dropped p adds to it

    A_u + B_p - 2 W_u W_p G_up,   A_u = 2 W_u C_u + W_u^2 G_uu,   B_p = W_p^2 G_pp - 2 W_p C_p,

which is exact, so a swap is made only if the error falls. All rows are worked on at once, and no
weight changes. Source: SparseSwaps, arXiv:2512.10922, for the exact gain; the order is ours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.float64 import float64_device, in_float64
from secateur.patterns import Pattern
from secateur.reconstruct.masked import on_mask_of
from secateur.reconstruct.refit import require_gram
from secateur.reconstruct.solution import Solution

SWEEPS = 100  # over all columns; a row is done after a sweep without a swap
COLUMNS = 128  # updated swap by swap; the rest are updated by one product
PAIRS = 256  # among which a row makes its best swap at a time: all pairs of a narrow group
ELEMENTS = 2**24  # of a matrix of the rows worked on at once, 128 MiB

# A swap must gain this share of its own terms: less cannot be told from float64's rounding.
GAIN = 1e-10


def swap(method: Callable[..., Any]) -> Callable[..., Solution]:
    """The algorithm that improves the mask of a criterion or an algorithm and changes no weight.

    `sc.reconstruct_(model, plan, swap(sc.wanda), batches)`, where kept weights must not change;
    where they may, `refit` gains more. Whatever an algorithm did to the kept weights is undone. If
    you already have a mask, use `secateur.reconstruct.swapped`, which says what is computed.

    Cost: the method's, and `swapped`.
    Raises:
        ValueError: if the method is not a function.
    Source: SparseSwaps, arXiv:2512.10922.
    """
    return on_mask_of(method, swapped, "swap", "swapped")


def swapped(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    pattern: Pattern,
) -> Solution:
    """The weight on a mask with as many kept in each group, whose error no single swap lowers.

    The error is ||(W - What) X||^2 per token, undamped; it never rises. A group is an N:M group, a
    row, or a row's `group_size` columns. Columns are swept from left to right: each row makes the
    best swap for a dropped column, or the best of all pairs in a narrow group, until a sweep has
    none (or for 100 sweeps, and then the note says so). It is computed in float64.

    Cost: a sweep of N:M takes 2 out in^2 operations, mostly one product; of unstructured sparsity
        about 10 out in^2, elementwise. 5 to 20 sweeps, later ones of fewer rows. Memory: in^2 in
        float64, and a few matrices of 128 MiB.
    Raises:
        ValueError: if the pattern's zeros are not single weights, as those in N:M and unstructured
            patterns are, or the Gram matrix is not finite or has a negative diagonal.
    Source: SparseSwaps, arXiv:2512.10922.
    """
    require_gram(gram)
    groups = _groups(pattern, weight.shape[1])
    never = pattern.always_zero()
    there = float64_device(weight.device)
    G, W, mask = in_float64(gram), weight.to(there), mask.to(there, copy=True)
    open_rows = 0
    for part in torch.arange(len(weight), device=there).split(max(1, ELEMENTS // weight.shape[1])):
        rows = part
        for _ in range(SWEEPS):
            held = None if never is None else never.to(there)[rows]
            state = _Rows(in_float64(W[rows]), mask[rows], G, held)
            moved = state.sweep(groups)
            mask[rows] = state.mask
            rows = rows[moved]
            if not len(rows):
                break
        open_rows += len(rows)
    note = f"{open_rows} outputs could still gain by swaps" if open_rows else ""
    mask = mask.to(weight.device)
    return Solution(weight.masked_fill(~mask, 0), mask, note)


@dataclass
class _Rows:
    """Rows being swapped; `mask` is changed in place, and keeps none of `never`."""

    W: Float[Tensor, "rows in"]
    mask: Bool[Tensor, "rows in"]
    G: Float[Tensor, "in in"]
    never: Bool[Tensor, "rows in"] | None

    def sweep(self, groups: list[tuple[int, int]]) -> Bool[Tensor, " rows"]:
        """The rows that swapped in one sweep, in which each few columns of a group allow one."""
        C = self.W.masked_fill(self.mask, 0) @ self.G
        moved = torch.zeros(len(self.W), dtype=torch.bool, device=self.W.device)
        for run in _runs(groups):
            columns = slice(run[0][0], run[-1][1])
            near, before = C[:, columns].clone(), self.mask[:, columns].clone()
            for start, stop in run:
                step = max(1, PAIRS // (stop - start))
                for first in range(start, stop, step):
                    moved |= self._swap(near, columns, (start, stop), first, first + step)
            now = self.mask[:, columns]
            change = self.W[:, columns] * (before.to(C.dtype) - now.to(C.dtype))
            C.addmm_(change, self.G[columns])
        return moved

    def _swap(
        self, C: Tensor, run: slice, group: tuple[int, int], first: int, last: int
    ) -> Bool[Tensor, " rows"]:
        """The rows that made their best swap in the group, of a kept for a dropped weight.

        The dropped weight lies in columns `first` to `last`. `C` holds the columns of the run and
        is brought up to date.
        """
        u, p = slice(*group), slice(first, min(last, group[1]))
        d = self.G.diagonal()
        Wu, Wp = self.W[:, u], self.W[:, p]
        Cu, Cp = (C[:, s.start - run.start : s.stop - run.start] for s in (u, p))
        drop = (Wu * (2 * Cu + Wu * d[u])).masked_fill_(~self.mask[:, u], torch.inf)
        restore = (Wp * (Wp * d[p] - 2 * Cp)).masked_fill_(self.mask[:, p], torch.inf)
        if self.never is not None:
            restore.masked_fill_(self.never[:, p], torch.inf)
        both = Wu[:, :, None] * (2 * Wp[:, None, :] * self.G[u, p])
        change = (drop[:, :, None] + restore[:, None, :]).sub_(both)
        best, where = change.flatten(1).min(1)
        dropped = u.start + where // (p.stop - p.start)
        restored = p.start + where % (p.stop - p.start)
        return self._make(C, run, best, dropped, restored)

    def _make(
        self, C: Tensor, run: slice, change: Tensor, dropped: Tensor, restored: Tensor
    ) -> Bool[Tensor, " rows"]:
        """The rows whose swap was made, because it lowers the error by more than rounding."""
        d, every = self.G.diagonal(), torch.arange(len(C), device=C.device)
        Wu, Wp = self.W[every, dropped], self.W[every, restored]
        Cu, Cp = C[every, dropped - run.start], C[every, restored - run.start]
        both = (2 * Wu * Wp * self.G[dropped, restored]).abs()
        terms = (2 * Wu * Cu).abs() + Wu**2 * d[dropped] + (2 * Wp * Cp).abs() + Wp**2 * d[restored]
        moved = change < -GAIN * (terms + both)
        rows, dropped, restored = every[moved], dropped[moved], restored[moved]
        self.mask[rows, dropped] = False
        self.mask[rows, restored] = True
        C[rows] += Wu[moved, None] * self.G[dropped, run] - Wp[moved, None] * self.G[restored, run]
        return moved


def _groups(pattern: Pattern, columns: int) -> list[tuple[int, int]]:
    """`(start, stop)` of the columns among which a row's weights may be exchanged."""
    if not (groups := list(pattern.groups(columns))):
        raise ValueError(
            f"swap exchanges single weights, {pattern} drops them together: use N:M or "
            "unstructured sparsity, or sc.refit"
        )
    return groups


def _runs(groups: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Runs of neighbouring groups, each run the fewest that have at least `COLUMNS` columns."""
    run: list[tuple[int, int]] = []
    for group in groups:
        run.append(group)
        if group[1] - run[0][0] >= COLUMNS:
            yield run
            run = []
    if run:
        yield run
