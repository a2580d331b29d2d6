"""What a pattern is, and the checks of sparsities and strings that all patterns share."""

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.patterns.keep import count_zeros

EXAMPLES = "'2:4', '4:8', 'unstructured:0.6', 'block:64x64@0.8' or 'channels:0.25'"


@runtime_checkable
class Pattern(Protocol):
    """A set of zero positions, together with how many zeros: a frozen dataclass of this class.

    A pattern sees a weight as a matrix: a row is an output, a column an input (`layers.matrix`).
    `str(pattern)` is its short form. A pattern must define the members without a body; the others
    have defaults that hold for any pattern.
    """

    if TYPE_CHECKING:  # a dataclass would take an inherited property for a field's default

        @property
        def sparsity(self) -> float:
            """The fraction of zeros that it asks for, in [0, 1)."""
            ...

    def why_not(self, shape: tuple[int, int]) -> str | None:
        """Why a weight of this shape cannot have the pattern, or None if it can."""
        ...

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """The mask, True = keep, of the largest scores that the pattern allows, exactly counted."""
        ...

    def violation(self, mask: Bool[Tensor, "out in"]) -> str | None:
        """What in this mask breaks the pattern, and where; or None. More zeros never break it."""
        ...

    def parts(self, shape: tuple[int, int]) -> Iterator[tuple[int, int, "Pattern"]]:
        """`(start, stop, pattern)`: the runs of columns whose zeros are chosen together, in order.

        An algorithm that walks over the columns asks each part's pattern for its mask when it gets
        there. The parts have as many zeros together as the whole pattern.
        """
        ...

    @property
    def kind(self) -> str:
        """A string that patterns share if they differ only in sparsity, such as `block:64x64`."""
        return str(self)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile, kept or dropped as a whole: (1, 1) for single weights."""
        return 1, 1

    def at(self, sparsity: float) -> "Pattern":
        """The pattern of this kind with this sparsity, or with the next lower one that it can have.

        A pattern that has only one sparsity returns itself.
        """
        return self

    def on_kernel(self, channels: int) -> "Pattern":
        """The pattern for a convolution's matrix, with `channels` columns per kernel position."""
        return self

    def competing(self, score: Float[Tensor, "out in"]) -> Float[Tensor, " units"] | None:
        """The scores of what is kept or dropped as a whole, if all of a layer shares one budget.

        What they count is of one size in every layer, so that layers may compete with one another.
        None where rows or groups have budgets of their own.
        """
        return None

    def groups(self, columns: int) -> Iterator[tuple[int, int]]:
        """`(start, stop)`: columns among which a row may exchange a kept weight for a dropped one.

        There are none where weights are dropped together.
        """
        yield from ()

    def always_zero(self) -> Bool[Tensor, "out in"] | None:
        """The positions that it never keeps, for the weight that it was made for; None if none."""
        return None

    @classmethod
    def parse(cls, text: str) -> "Pattern | None":
        """The pattern of this class that a short string names; None for strings of other classes.

        Raises:
            ValueError: if the string is meant for this class, but a part of it is wrong.
        """
        return None


def check_sparsity(sparsity: float) -> None:
    """Raise unless the sparsity is a fraction in [0, 1)."""
    if 0 <= sparsity < 1:
        return
    likely = f": did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
    raise ValueError(f"sparsity must be in [0, 1), got {sparsity:g}{likely}")


def as_sparsity(zeros: int, n: int) -> float:
    """The sparsity of fewest digits that means exactly `zeros` of n; for all of them, below 1."""
    digits = 1
    while True:
        sparsity: float = min(round(zeros / n, digits), round(1 - 0.1**digits, digits))
        if count_zeros(sparsity, n) == zeros:
            return sparsity
        digits += 1


def written(sparsity: float) -> str:
    """The sparsity in a short string: as few of 12 digits as it has, enough for any weight."""
    return f"{sparsity:.12g}"


def fields_of(text: str, kind: str, form: str) -> tuple[Any, ...] | None:
    """The groups of the regular expression `form` in the short string `kind:rest`.

    It is None for a string of another kind.

    Raises: ValueError if the rest does not have the form.
    """
    before, colon, rest = text.partition(":")
    if before != kind or not colon:
        return None
    if not (found := re.fullmatch(form, rest)):
        raise ValueError(
            f"cannot read {rest!r} in the pattern {text!r}: patterns look like {EXAMPLES}"
        )
    return found.groups()


def as_fraction(number: str, text: str) -> float:
    """The sparsity written as `0.8` or `80%` in the short string `text`."""
    try:
        return float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        raise ValueError(f"cannot read the sparsity {number!r} in the pattern {text!r}") from None


def takes_any_sparsity(pattern: Pattern) -> bool:
    """Whether the pattern can have any sparsity, which N:M cannot."""
    return pattern.at(IRRATIONAL).sparsity == IRRATIONAL


# No pattern of whole numbers has this sparsity.
IRRATIONAL = 1 / math.pi


def where_first(bad: Bool[Tensor, "rows columns"]) -> tuple[int, int]:
    """The row and column of the first True, in row order; there must be one."""
    row, column = divmod(int(bad.flatten().to(torch.uint8).argmax()), bad.shape[1])
    return row, column
