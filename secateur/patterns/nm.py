"""N:M sparsity: at most n nonzeros in every m consecutive inputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.patterns.keep import keep_top
from secateur.patterns.pattern import Pattern, where_first
from secateur.patterns.unstructured import Unstructured


@dataclass(frozen=True)
class NM:
    """At most `n` nonzeros in every `m` consecutive weights along the input dim.

    `n` is what is *kept* (NVIDIA's and most papers' notation; some tools prune n). 2:4 is what
    sparse tensor cores multiply. `remainder="dense"` leaves the last `in % m` columns dense where
    the width does not divide; by default such a width is an error.
    """

    n: int
    m: int
    remainder: Literal["error", "dense"] = "error"

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(f"NM(n, m) keeps n of m, needs 1 <= n <= m, got {self.n}:{self.m}")
        if self.remainder not in ("error", "dense"):
            raise ValueError(f"remainder must be 'error' or 'dense', got {self.remainder!r}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + ("@dense-remainder" if self.remainder == "dense" else "")

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def why_not(self, shape: tuple[int, int]) -> str | None:
        columns = shape[1]
        if columns < self.m:
            return f"{self} needs in_features of at least {self.m}, got {columns}"
        if columns % self.m and self.remainder == "error":
            return f"{self} needs in_features divisible by {self.m}, got {columns}"
        return None

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        if reason := self.why_not((score.shape[0], score.shape[1])):
            raise ValueError(f"{reason}: choose another pattern, or remainder='dense'")
        whole = score.shape[1] // self.m * self.m
        mask = torch.ones_like(score, dtype=torch.bool)
        groups = score[:, :whole].unflatten(1, (-1, self.m))
        mask[:, :whole] = keep_top(groups, self.n).flatten(1)
        return mask

    def violation(self, mask: Bool[Tensor, "out in"]) -> str | None:
        whole = mask.shape[1] // self.m * self.m
        kept = mask[:, :whole].unflatten(1, (-1, self.m)).sum(-1)
        if not (over := kept > self.n).any():
            return None
        row, group = where_first(over)
        first = f"columns {group * self.m}..{group * self.m + self.m - 1} of row {row}"
        return (
            f"has {int(over.sum())} groups of {self.m} keeping more than {self.n}: first {first}, "
            f"keeping {int(kept[row, group])}"
        )

    def parts(self, shape: tuple[int, int]) -> Iterator[tuple[int, int, Pattern]]:
        whole = shape[1] // self.m * self.m
        for start in range(0, whole, self.m):
            yield start, start + self.m, self
        if whole < shape[1]:
            yield whole, shape[1], Unstructured(0.0)
