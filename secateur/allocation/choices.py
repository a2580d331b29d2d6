"""What a layer may become in an allocation: zeros in a pattern, numbers on a grid, both or neither.

A choice is a short string, so that tables and files hold it: `dense`, a pattern such as `2:4`, a
grid behind `dense` or a pattern and a plus: `dense+int4`, `unstructured:0.5+int4`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.patterns import Grid, Pattern, Unstructured, as_pattern, parse
from secateur.patterns.grids import QUANTISABLE, parse_grid

DENSE_CHOICE = "dense"
NO_ZEROS = Unstructured(0.0)  # of a layer that is rounded and keeps every weight


@dataclass(frozen=True)
class Choice:
    """The zeros and the numbers of a layer; None leaves them as they are."""

    text: str
    pattern: Pattern | None = None
    grid: Grid | None = None

    @property
    def sparsity(self) -> float:
        return 0.0 if self.pattern is None else self.pattern.sparsity

    @property
    def kind(self) -> tuple[str, str]:
        """The same for choices that differ only in sparsity."""
        return ("" if self.pattern is None else self.pattern.kind, self.text.partition("+")[2])

    def why_not(self, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
        """Why a weight cannot become this, or None."""
        if self.grid is not None and dtype not in QUANTISABLE:
            return f"rounding to {self.grid!r} needs float32 or 16 bits, got {dtype}"
        return None if self.pattern is None else self.pattern.why_not(shape)

    def mask(self, scores: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """What is kept."""
        if self.pattern is None:
            return torch.ones_like(scores, dtype=torch.bool)
        return self.pattern.mask(scores)

    def applied(
        self, weight: Float[Tensor, "out in"], keep: Bool[Tensor, "out in"]
    ) -> Float[Tensor, "out in"]:
        """The weight without what is not kept, each number the nearest of the grid."""
        kept = weight.masked_fill(~keep, 0)
        if self.grid is None:
            return kept
        scales = self.grid.scales(kept)
        return self.grid.dequantised(self.grid.codes(kept, scales), scales).to(weight.dtype)


@cache  # tables ask again and again
def parse_choice(text: str) -> Choice:
    """The choice of a short string.

    Raises:
        ValueError: if the part before the plus is no pattern, or the part behind it no grid.
    """
    before, plus, behind = text.partition("+")
    pattern = None if before == DENSE_CHOICE else parse(before)
    return Choice(text, pattern, parse_grid(behind) if plus else None)


def as_choice(given: str | Pattern) -> Choice:
    """The choice that a string or a pattern names.

    Raises:
        ValueError: if it is neither, or cannot be read.
    """
    if isinstance(given, str) and "+" in given:
        return parse_choice(given)
    pattern = as_pattern(given)
    return Choice(str(pattern), pattern)


def patterns_of(choices: Mapping[str, str]) -> dict[str, Pattern]:
    """The patterns of the layers that get zeros."""
    found = {name: parse_choice(one).pattern for name, one in choices.items()}
    return {name: pattern for name, pattern in found.items() if pattern is not None}


def patterns_by_grid(choices: Mapping[str, str]) -> dict[Grid | None, dict[str, Pattern]]:
    """The patterns of the layers of each grid; one that keeps all weights where only rounded."""
    found = dict[Grid | None, dict[str, Pattern]]()
    for name, one in choices.items():
        choice = parse_choice(one)
        if choice.pattern is not None or choice.grid is not None:
            found.setdefault(choice.grid, {})[name] = choice.pattern or NO_ZEROS
    return found
