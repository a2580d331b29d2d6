"""A pattern from outside: neighbouring inputs are kept or dropped in pairs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from jaxtyping import Bool, Float
from torch import Tensor

from secateur.patterns import Pattern, keep_top


@dataclass(frozen=True)
class Pairs(Pattern):
    """In every row a share `sparsity` of the pairs is zero, rounded down."""

    sparsity: float

    def __str__(self) -> str:
        return f"pairs:{self.sparsity:g}"

    @property
    def kind(self) -> str:
        return "pairs"

    @property
    def tile(self) -> tuple[int, int]:
        return 1, 2

    def at(self, sparsity: float) -> "Pairs":
        return replace(self, sparsity=sparsity)

    def why_not(self, shape: tuple[int, int]) -> str | None:
        return f"{self} needs an even in_features, got {shape[1]}" if shape[1] % 2 else None

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        pairs = score.float().unflatten(1, (-1, 2)).sum(-1)
        kept = keep_top(pairs, pairs.shape[1] - int(self.sparsity * pairs.shape[1]))
        return kept.repeat_interleave(2, 1)

    def violation(self, mask: Bool[Tensor, "out in"]) -> str | None:
        pairs = ~mask.unflatten(1, (-1, 2)).any(-1)
        asked = int(self.sparsity * pairs.shape[1])
        if not (short := pairs.sum(1) < asked).any():
            return None
        return f"has {int(short.sum())} rows with fewer than {asked} zero pairs"

    def parts(self, shape: tuple[int, int]) -> Iterator[tuple[int, int, "Pairs"]]:
        yield 0, shape[1], self

    @classmethod
    def parse(cls, text: str) -> "Pairs | None":
        return cls(float(text[6:])) if text.startswith("pairs:") else None
