"""What `prune_` and `reconstruct_` report."""

from dataclasses import asdict, dataclass
from typing import Any

from secateur.core.shown import Shown, Table


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer; `sparsity_before` is its share of zeros before the pass.

    `error` is the share of the layer's output energy that is lost, ||(W - W')X||^2 / ||WX||^2 on
    the calibration inputs; None where the method gathers no Gram matrix to compute it from.
    """

    layer: str
    pattern: str
    sparsity_before: float
    sparsity: float
    error: float | None
    tokens: int
    note: str


@dataclass(frozen=True)
class PruneReport(Shown):
    """What `prune_` or `reconstruct_` did, layer by layer.

    `zeros` counts the zeros in these layers' weights, `parameters` all parameters of the model.
    """

    method: str
    layers: tuple[LayerResult, ...]
    seconds: float
    zeros: int
    parameters: int

    @property
    def columns(self) -> tuple[str, ...]:
        return ("layer", "pattern", "before", "sparsity", "output error", "tokens", "note")

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                r.layer,
                r.pattern,
                f"{r.sparsity_before:.2%}",
                f"{r.sparsity:.2%}",
                "-" if r.error is None else f"{r.error:.4f}",
                f"{r.tokens:,}",
                r.note,
            )
            for r in self.layers
        ]

    @property
    def paragraphs(self) -> tuple[str | Table, ...]:
        return Table(self.columns, self.rows()), self.summary

    @property
    def summary(self) -> str:
        """One sentence: what was done, and the share of all parameters that these zeros are."""
        share = self.zeros / max(self.parameters, 1)
        return (
            f"{self.method}: {len(self.layers)} layers in {self.seconds:.1f} s; their zeros are "
            f"{share:.1%} of all {self.parameters:,} parameters"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
