"""A pattern for a weight that has zeros: all of them stay, and they count towards its sparsity."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from secateur.patterns.block import Block
from secateur.patterns.pattern import Pattern, where_first
from secateur.patterns.unstructured import Unstructured

# The score of a zero in a tile, whose other scores are at least 0: below them all, and nothing in
# their mean.
BELOW = -torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class KeepingZeros(Pattern):
    """The pattern, which drops first what is zero already.

    Where weights are dropped one by one, zeros go before everything else. A tile or a channel goes
    first if all of it is zero; in one that is kept, zeros add nothing to its score and stay. If
    there are more zeros than the pattern asks for, all of them stay.

    `kept` is for part of a weight whose columns share a budget with others: how many tiles are kept
    in each row, or in all rows together.
    """

    pattern: Pattern
    zeros: Bool[Tensor, "out in"]
    kept: Int[Tensor, " budgets"] | None = None

    def __str__(self) -> str:
        return str(self.pattern)

    @property
    def sparsity(self) -> float:
        return self.pattern.sparsity

    @property
    def kind(self) -> str:
        return self.pattern.kind

    @property
    def tile(self) -> tuple[int, int]:
        return self.pattern.tile

    def at(self, sparsity: float) -> "KeepingZeros":
        return replace(self, pattern=self.pattern.at(sparsity))

    def why_not(self, shape: tuple[int, int]) -> str | None:
        return self.pattern.why_not(shape)

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        zeros = self.zeros.to(score.device)
        score = self._with_zeros_last(score, zeros)
        mask = self.pattern.mask(score) if self.kept is None else self._best(score, self.kept)
        return mask & ~zeros

    def violation(self, mask: Bool[Tensor, "out in"]) -> str | None:
        if (revived := mask & self.zeros.to(mask.device)).any():
            row, column = where_first(revived)
            return (
                f"keeps {int(revived.sum())} weights that were zero, first row {row}, column "
                f"{column}"
            )
        return self.pattern.violation(mask)

    def parts(self, shape: tuple[int, int]) -> Iterator[tuple[int, int, Pattern]]:
        found = list(self.pattern.parts(shape))
        counts = self._counts([stop for _, stop, _ in found], shape)
        for (start, stop, part), kept in zip(found, counts, strict=True):
            yield start, stop, KeepingZeros(part, self.zeros[:, start:stop], kept)

    def groups(self, columns: int) -> Iterator[tuple[int, int]]:
        yield from self.pattern.groups(columns)

    def always_zero(self) -> Bool[Tensor, "out in"] | None:
        return self.zeros

    def _with_zeros_last(
        self, score: Float[Tensor, "out in"], zeros: Bool[Tensor, "out in"]
    ) -> Float[Tensor, "out in"]:
        if any(self.pattern.groups(score.shape[1])):  # weights are dropped one by one
            return score.masked_fill(zeros, -torch.inf)
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        lowest = score.nan_to_num(neginf=0.0).min().clamp(max=0)
        return (score - lowest).masked_fill(zeros, BELOW)

    def _best(
        self, score: Float[Tensor, "out in"], kept: Int[Tensor, " budgets"]
    ) -> Bool[Tensor, "out in"]:
        """The mask of as many tiles as each budget has; ties go to the lower index."""
        rows, columns = self.tile
        tiles = self._tiles(score).mean(-1)
        order = tiles.reshape(len(kept), -1).argsort(dim=-1, descending=True, stable=True)
        best: Tensor = order.argsort(-1) < kept.to(score.device)[:, None]
        return best.view_as(tiles).repeat_interleave(rows, 0).repeat_interleave(columns, 1)

    def _counts(
        self, stops: Sequence[int], shape: tuple[int, int]
    ) -> Sequence[Int[Tensor, " budgets"] | None]:
        """How many tiles each part keeps, in every row or in all; None where parts do not share.

        Each keeps the same share of its tiles that are not zero, rounded cumulatively.
        """
        match self.pattern:
            case Unstructured(scope="row"):
                budgets = shape[0]
            case Unstructured(scope="layer") | Block():
                budgets = 1
            case _:
                return [None] * len(stops)
        full = self.pattern.mask(torch.ones(shape, dtype=torch.float32, device=self.zeros.device))
        asked, alive = (
            self._tiles(mask).any(-1).unflatten(0, (budgets, -1)).sum(1).cumsum(1)
            for mask in (full, ~self.zeros)
        )
        there = alive[:, -1].clamp(min=1)
        kept = torch.minimum(asked[:, -1], alive[:, -1])
        ends = torch.tensor(stops, device=alive.device) // self.tile[1] - 1
        until = (2 * alive[:, ends] * kept[:, None] + there[:, None]) // (2 * there[:, None])
        return list(until.diff(dim=1, prepend=torch.zeros_like(until[:, :1])).unbind(1))

    def _tiles(self, matrix: Shaped[Tensor, "out in"]) -> Shaped[Tensor, "rows columns tile"]:
        rows, columns = self.tile
        tiles: Tensor = matrix.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return tiles.transpose(1, 2).flatten(2)
