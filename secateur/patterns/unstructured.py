"""Unstructured sparsity: every weight has a mask bit of its own."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.patterns.keep import count_zeros, keep_top
from secateur.patterns.pattern import (
    Pattern,
    as_fraction,
    as_sparsity,
    check_sparsity,
    fields_of,
    where_first,
    written,
)

Scope = Literal["group", "row", "layer"]

# Columns that a walk over columns decides together: SparseGPT's mask block, B_s = 128.
COLUMNS_TOGETHER = 128


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any position may be zero; the `scope` says which weights compete for one budget.

    `row`: the inputs of one output (Wanda's comparison group). `layer`: the whole matrix. `group`:
    `group_size` consecutive inputs of one output; the last group may be smaller.
    """

    sparsity: float
    scope: Scope = "row"
    group_size: int = COLUMNS_TOGETHER

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if self.scope not in ("group", "row", "layer"):
            raise ValueError(f"scope must be 'group', 'row' or 'layer', got {self.scope!r}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")

    def __str__(self) -> str:
        suffix = {"row": "", "layer": "@layer", "group": f"@group{self.group_size}"}[self.scope]
        return f"unstructured:{written(self.sparsity)}{suffix}"

    @property
    def kind(self) -> str:
        return str(replace(self, sparsity=0.0))

    def at(self, sparsity: float) -> "Unstructured":
        return replace(self, sparsity=sparsity)

    def why_not(self, shape: tuple[int, int]) -> str | None:
        return None if min(shape) > 0 else f"{self} needs a weight that is not empty, got {shape}"

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        if self.scope == "layer":
            flat = score.flatten()
            return keep_top(flat, len(flat) - count_zeros(self.sparsity, len(flat))).view_as(score)
        mask = torch.ones_like(score, dtype=torch.bool)
        width = self.group_size if self.scope == "group" else score.shape[1]
        whole = score.shape[1] // width * width
        for columns, size in ((slice(whole), width), (slice(whole, None), score.shape[1] - whole)):
            if size and score[:, columns].numel():
                groups = score[:, columns].unflatten(1, (-1, size))
                kept = size - count_zeros(self.sparsity, size)
                mask[:, columns] = keep_top(groups, kept).flatten(1)
        return mask

    def violation(self, mask: Bool[Tensor, "out in"]) -> str | None:
        if self.scope == "layer":
            found, wanted = int((~mask).sum()), count_zeros(self.sparsity, mask.numel())
            return None if found >= wanted else f"has {found} zeros of {mask.numel()}, not {wanted}"
        width = self.group_size if self.scope == "group" else mask.shape[1]
        for start in range(0, mask.shape[1], width):
            zeros = (~mask[:, start : start + width]).sum(1, keepdim=True)
            size = min(width, mask.shape[1] - start)
            wanted = count_zeros(self.sparsity, size)
            if (short := zeros < wanted).any():
                row, _ = where_first(short)
                place = f"columns {start}..{start + size - 1} of row {row}"
                return f"has {int(zeros[row])} zeros of {size} in {place}, not {wanted}"
        return None

    def parts(self, shape: tuple[int, int]) -> Iterator[tuple[int, int, "Unstructured"]]:
        rows, columns = shape
        width = self.group_size if self.scope == "group" else COLUMNS_TOGETHER
        budget_rows = rows if self.scope == "layer" else 1
        for start in range(0, columns, width):
            stop = min(start + width, columns)
            if self.scope == "group":
                yield start, stop, self
                continue
            # Rounded cumulatively, so that the parts' zeros add up to the whole's.
            before, until = (count_zeros(self.sparsity, budget_rows * c) for c in (start, stop))
            sparsity = as_sparsity(until - before, budget_rows * (stop - start))
            yield start, stop, replace(self, sparsity=sparsity)

    def competing(self, score: Float[Tensor, "out in"]) -> Float[Tensor, " units"] | None:
        return score.flatten() if self.scope == "layer" else None

    def groups(self, columns: int) -> Iterator[tuple[int, int]]:
        width = self.group_size if self.scope == "group" else columns
        for start in range(0, columns, width):
            yield start, min(start + width, columns)

    @classmethod
    def parse(cls, text: str) -> "Unstructured | None":
        form = r"([^@]+)(?:@(row|layer|group(\d+)))?"
        if (parts := fields_of(text, "unstructured", form)) is None:
            return None
        sparsity, scope, size = parts
        if size:
            return cls(as_fraction(sparsity, text), "group", int(size))
        return cls(as_fraction(sparsity, text), "layer" if scope == "layer" else "row")
