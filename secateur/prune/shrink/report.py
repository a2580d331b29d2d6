"""What `shrink_` reports."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from secateur.core.shown import Shown, Table


@dataclass(frozen=True)
class Shrunk:
    """One place where something went: hidden units, heads, experts or blocks.

    `layer` reads what went. `lost` is the share of the scores of all that was there.
    """

    kind: str
    layer: str
    before: int
    after: int
    lost: float


@dataclass(frozen=True)
class ShrinkReport(Shown):
    """What `shrink_` removed, why other layers stay as wide as they were, and what is left.

    FLOPs are those of the first batch's products of matrices, two for a multiplication and an
    addition. `config` has the entries of the model's config that have changed.
    """

    method: str
    removed: tuple[Shrunk, ...]
    left: Mapping[str, str]
    config: Mapping[str, Any]
    parameters_before: int
    parameters: int
    flops_before: int
    flops: int
    seconds: float

    @property
    def columns(self) -> tuple[str, ...]:
        return ("what", "layer", "before", "after", "score lost")

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (r.kind, r.layer, f"{r.before:,}", f"{r.after:,}", f"{r.lost:.2%}")
            for r in self.removed
        ]

    @property
    def summary(self) -> str:
        """One sentence: parameters and FLOPs before and after."""
        return (
            f"{self.method}: {self.parameters_before:,} parameters became {self.parameters:,} "
            f"({_less(self.parameters_before, self.parameters)}), FLOPs of the first batch "
            f"{self.flops_before:,} became {self.flops:,} ({_less(self.flops_before, self.flops)}) "
            f"in {self.seconds:.1f} s"
        )

    @property
    def paragraphs(self) -> tuple[str | Table, ...]:
        entries = ", ".join(f"{key} = {value}" for key, value in self.config.items())
        config = [f"config: {entries}"] if entries else []
        return (Table(self.columns, self.rows()), self.summary, *config)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _less(before: int, after: int) -> str:
    return f"-{1 - after / before:.1%}" if before else "0%"
