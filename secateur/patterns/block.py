"""Block sparsity: tiles of rows x columns that are kept or dropped as a whole."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

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
from secateur.patterns.unstructured import COLUMNS_TOGETHER


@dataclass(frozen=True)
class Block(Pattern):
    """Tiles of `rows` outputs by `cols` inputs; the tiles of a layer compete for its budget.

    A tile's score is the mean of its weights' scores, summed in float32.
    """

    rows: int
    cols: int
    sparsity: float

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if min(self.rows, self.cols) < 1:
            raise ValueError(f"Block needs rows and cols >= 1, got {self.rows}x{self.cols}")

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.cols}@{written(self.sparsity)}"

    @property
    def kind(self) -> str:
        return f"block:{self.rows}x{self.cols}"

    @property
    def tile(self) -> tuple[int, int]:
        return self.rows, self.cols

    def at(self, sparsity: float) -> "Block":
        return replace(self, sparsity=sparsity)

    def why_not(self, shape: tuple[int, int]) -> str | None:
        if min(shape) > 0 and shape[0] % self.rows == 0 and shape[1] % self.cols == 0:
            return None
        return (
            f"{self} needs out_features divisible by {self.rows} and in_features by {self.cols}, "
            f"got {shape[0]} and {shape[1]}"
        )

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        if reason := self.why_not((score.shape[0], score.shape[1])):
            raise ValueError(f"{reason}: choose a block that divides the weight")
        tiles = self.competing(score)
        keep = keep_top(tiles, len(tiles) - count_zeros(self.sparsity, len(tiles)))
        keep = keep.view(score.shape[0] // self.rows, score.shape[1] // self.cols)
        return keep.repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 1)

    def violation(self, mask: Bool[Tensor, "out in"]) -> str | None:
        kept = self._tiles(mask).sum((1, 3))
        zero_tiles, wanted = int((kept == 0).sum()), count_zeros(self.sparsity, kept.numel())
        if zero_tiles >= wanted:
            return None
        row, column = where_first(kept > 0)
        return (
            f"has {zero_tiles} zero tiles of {kept.numel()}, not {wanted}: the first other tile is "
            f"at row {row * self.rows}, column {column * self.cols}"
        )

    def competing(self, score: Float[Tensor, "out in"]) -> Float[Tensor, " tiles"]:
        return self._tiles(score.float()).mean((1, 3)).flatten()

    def parts(self, shape: tuple[int, int]) -> Iterator[tuple[int, int, "Block"]]:
        tile_rows = shape[0] // self.rows
        width = math.ceil(COLUMNS_TOGETHER / self.cols) * self.cols
        for start in range(0, shape[1], width):
            stop = min(start + width, shape[1])
            first, last = tile_rows * start // self.cols, tile_rows * stop // self.cols
            zeros = count_zeros(self.sparsity, last) - count_zeros(self.sparsity, first)
            yield start, stop, replace(self, sparsity=as_sparsity(zeros, last - first))

    @classmethod
    def parse(cls, text: str) -> "Block | None":
        if (parts := fields_of(text, "block", r"(\d+)x(\d+)@([^@]+)")) is None:
            return None
        rows, cols, sparsity = parts
        return cls(int(rows), int(cols), as_fraction(sparsity, text))

    def _tiles(self, matrix: Tensor) -> Tensor:
        tiles: Tensor = matrix.unflatten(1, (-1, self.cols)).unflatten(0, (-1, self.rows))
        return tiles
