"""Channel sparsity: whole outputs or whole inputs are zero, the shape stays."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from secateur.patterns.keep import count_zeros, keep_top
from secateur.patterns.pattern import Pattern, as_fraction, check_sparsity, fields_of, written


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole rows (`side="out"`) or columns (`side="in"`) of the weight are zero.

    A channel's score is the sum of its weights' scores, in float32. The channels are only zeroed:
    `sc.shrink_` removes channels, so that shapes shrink.
    """

    sparsity: float
    side: Literal["out", "in"] = "out"

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if self.side not in ("out", "in"):
            raise ValueError(f"side must be 'out' or 'in', got {self.side!r}")

    def __str__(self) -> str:
        return f"channels:{written(self.sparsity)}" + ("@in" if self.side == "in" else "")

    @property
    def kind(self) -> str:
        return f"channels@{self.side}"

    def at(self, sparsity: float) -> "Channel":
        return replace(self, sparsity=sparsity)

    def why_not(self, shape: tuple[int, int]) -> str | None:
        return None if min(shape) > 0 else f"{self} needs a weight that is not empty, got {shape}"

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        channels = score.float().sum(1 if self.side == "out" else 0)
        keep = keep_top(channels, len(channels) - count_zeros(self.sparsity, len(channels)))
        keep = keep[:, None] if self.side == "out" else keep[None, :]
        return keep.expand(score.shape).clone()

    def violation(self, mask: Bool[Tensor, "out in"]) -> str | None:
        zero_channels = ~mask.any(1 if self.side == "out" else 0)
        found, wanted = int(zero_channels.sum()), count_zeros(self.sparsity, len(zero_channels))
        if found >= wanted:
            return None
        word = "rows" if self.side == "out" else "columns"
        return f"has {found} zero {word} of {len(zero_channels)}, not {wanted}"

    def parts(self, shape: tuple[int, int]) -> Iterator[tuple[int, int, "Channel"]]:
        yield 0, shape[1], self

    @classmethod
    def parse(cls, text: str) -> "Channel | None":
        if (parts := fields_of(text, "channels", r"([^@]+)(@(?:in|out))?")) is None:
            return None
        sparsity, side = parts
        return cls(as_fraction(sparsity, text), "in" if side == "@in" else "out")
