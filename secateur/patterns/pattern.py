"""What a pattern is, and the sparsity that every pattern checks in the same words."""

import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor


@runtime_checkable
class Pattern(Protocol):
    """A set of zero positions, together with how many zeros: a frozen dataclass with these members.

    A pattern sees a weight as a matrix: a row is an output, a column an input (`layers.matrix`).
    `str(pattern)` is the short form that `parse` reads back.
    """

    @property
    def sparsity(self) -> float:
        """The fraction of zeros it asks for, in [0, 1)."""
        ...

    def why_not(self, shape: tuple[int, int]) -> str | None:
        """Why a weight of this shape cannot have the pattern, or None if it can."""
        ...

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """The mask, True = keep, of the largest scores the pattern allows, exactly counted."""
        ...

    def violation(self, mask: Bool[Tensor, "out in"]) -> str | None:
        """What in this mask breaks the pattern and where, or None. More zeros never do."""
        ...

    def parts(self, shape: tuple[int, int]) -> Iterator[tuple[int, int, "Pattern"]]:
        """`(start, stop, pattern)`: the runs of columns whose zeros are chosen together, in order.

        An algorithm that walks over the columns asks each part's pattern for its mask when it gets
        there. The zeros of the parts add up to those of the whole.
        """
        ...


def check_sparsity(sparsity: float) -> None:
    """Raise unless the sparsity is a fraction in [0, 1)."""
    if 0 <= sparsity < 1:
        return
    likely = f": did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
    raise ValueError(f"sparsity must be in [0, 1), got {sparsity:g}{likely}")


def as_sparsity(zeros: int, n: int) -> float:
    """The sparsity that asks exactly these zeros of n; for all of them, the largest below 1."""
    return min(zeros / n, math.nextafter(1, 0))


def where_first(bad: Bool[Tensor, "rows columns"]) -> tuple[int, int]:
    """Row and column of the first True."""
    row, column = divmod(int(bad.flatten().int().argmax()), bad.shape[1])
    return row, column
