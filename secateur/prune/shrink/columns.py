"""The pattern of a layer of which some inputs are about to go."""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from secateur.patterns import Pattern


@dataclass(frozen=True, eq=False)
class Columns(Pattern):
    """Given columns are kept, whatever their scores; for one weight."""

    kept: Bool[Tensor, " in"]

    def __str__(self) -> str:
        return f"{int(self.kept.sum())} of {len(self.kept)} inputs"

    @property
    def sparsity(self) -> float:
        return 1 - int(self.kept.sum()) / len(self.kept)

    def why_not(self, shape: tuple[int, int]) -> str | None:
        return None if shape[1] == len(self.kept) else f"it is for {len(self.kept)} inputs"

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        return self.kept.to(score.device).expand(score.shape).clone()

    def violation(self, mask: Bool[Tensor, "out in"]) -> str | None:
        return "keeps a column that goes" if mask[:, ~self.kept.to(mask.device)].any() else None

    def parts(self, shape: tuple[int, int]) -> Iterator[tuple[int, int, Pattern]]:
        yield 0, shape[1], self
