"""What a pattern is, and the sparsity that every pattern checks in the same words."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

EXAMPLES = "'2:4', '4:8', 'unstructured:0.6', 'block:64x64@0.8' or 'channels:0.25'"


@runtime_checkable
class Pattern(Protocol):
    """A set of zero positions, together with how many zeros: a frozen dataclass of this class.

    A pattern sees a weight as a matrix: a row is an output, a column an input (`layers.matrix`).
    `str(pattern)` is its short form. The members without a body are what a pattern has to say;
    those with one hold for a pattern of which nothing more is known.
    """

    if TYPE_CHECKING:  # a dataclass would take an inherited property for a field's default

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

    @property
    def kind(self) -> str:
        """The same string for patterns that differ in sparsity alone, such as `block:64x64`."""
        return str(self)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of what is kept or dropped as a whole: (1, 1) for single weights."""
        return 1, 1

    def at(self, sparsity: float) -> "Pattern":
        """The pattern of this kind with this sparsity, or the next lower one that it can have.

        A pattern that has one sparsity only is itself at every one.
        """
        return self

    def on_kernel(self, channels: int) -> "Pattern":
        """The pattern as a convolution's matrix has it, `channels` columns a kernel position."""
        return self

    def groups(self, columns: int) -> Iterator[tuple[int, int]]:
        """`(start, stop)`: columns among which a row may exchange a kept weight for a dropped one.

        None where weights are dropped together.
        """
        yield from ()

    @classmethod
    def parse(cls, text: str) -> "Pattern | None":
        """The pattern of this class that a short string names, or None if it names another's.

        Raises:
            ValueError: if the string is of this class but for a part that is wrong.
        """
        return None


def check_sparsity(sparsity: float) -> None:
    """Raise unless the sparsity is a fraction in [0, 1)."""
    if 0 <= sparsity < 1:
        return
    likely = f": did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
    raise ValueError(f"sparsity must be in [0, 1), got {sparsity:g}{likely}")


def as_sparsity(zeros: int, n: int) -> float:
    """The sparsity that asks exactly these zeros of n; for all of them, the largest below 1."""
    return min(zeros / n, math.nextafter(1, 0))


def unreadable(text: str) -> ValueError:
    """The error for a short string of a known kind whose rest cannot be read."""
    rest = text.partition(":")[2]
    return ValueError(
        f"cannot read {rest!r} in the pattern {text!r}: patterns look like {EXAMPLES}"
    )


def as_fraction(number: str, text: str) -> float:
    """The sparsity that stands as `0.8` or `80%` in the short string `text`."""
    try:
        return float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        raise ValueError(f"cannot read the sparsity {number!r} in the pattern {text!r}") from None


def is_of_any_sparsity(pattern: Pattern) -> bool:
    """Whether the pattern can have every sparsity, which N:M cannot."""
    return pattern.at(IRRATIONAL).sparsity == IRRATIONAL


# A sparsity that no pattern of whole numbers has.
IRRATIONAL = 1 / math.pi


def where_first(bad: Bool[Tensor, "rows columns"]) -> tuple[int, int]:
    """Row and column of the first True."""
    row, column = divmod(int(bad.flatten().int().argmax()), bad.shape[1])
    return row, column
