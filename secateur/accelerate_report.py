"""What `accelerate_` measured and decided, as data and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.formats.candidates import DENSE, PREPACKED

REASONS_SHOWN = 8  # groups of layers that the printed report explains before it only counts


@dataclass(frozen=True)
class Measured:
    """One layer at one number of tokens: the time of each candidate, and the one that would run."""

    tokens: int
    microseconds: tuple[tuple[str, float], ...]
    fastest_sparse: str | None

    def ratio_to(self, baseline: str) -> float | None:
        """How many times faster the fastest sparse candidate is, if both were measured."""
        times = dict(self.microseconds)
        if self.fastest_sparse is None or baseline not in times:
            return None
        return times[baseline] / times[self.fastest_sparse]

    @property
    def ratio(self) -> float:
        """Against the faster of eager and prepacked dense; 0 where nothing sparse could run."""
        ratios = [self.ratio_to(DENSE), self.ratio_to(PREPACKED)]
        return min((ratio for ratio in ratios if ratio is not None), default=0.0)


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer: the format it runs in (or `dense`), and why.

    Bytes are those of the weight in use, with what implementations arranged for themselves.
    `weight_error` is ||W - W'|| / ||W||, 0 unless the format rounds weights to a grid.
    """

    layer: str
    shape: tuple[int, int]
    format: str
    measured: tuple[Measured, ...]
    measured_on: str
    bytes_before: int
    bytes_after: int
    reason: str
    weight_error: float = 0.0


@dataclass(frozen=True)
class AccelerateReport:
    """What `accelerate_` measured and decided; printing it gives a table."""

    device: str
    threads: int
    tokens: tuple[int, ...]
    layers: tuple[LayerReport, ...]

    @property
    def sparse(self) -> tuple[LayerReport, ...]:
        """The layers that now run sparse."""
        return tuple(layer for layer in self.layers if layer.format != DENSE)

    @property
    def headline(self) -> str:
        """One sentence: how many layers run sparse and how much faster, or that none does."""
        counts = ", ".join(str(number) for number in self.tokens)
        if not self.sparse:
            return (
                f"no layer is faster sparse on this device at tokens {counts}: "
                "the model is unchanged"
            )
        before = sum(layer.bytes_before for layer in self.sparse) / 1e6
        after = sum(layer.bytes_after for layer in self.sparse) / 1e6
        error = max(layer.weight_error for layer in self.sparse)
        rounded = f", rounded by up to {error:.1%}" if error else ""
        return (
            f"{len(self.sparse)} of {len(self.layers)} layers run sparse, each faster than dense "
            f"at tokens {counts}; their weights take {after:.1f} MB instead of {before:.1f} MB"
            f"{rounded}"
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The heads of `rows()`."""
        return (
            *("layer", "shape", "tokens", "eager us", "prepacked us", "sparse us"),
            *("fastest sparse", "vs eager", "vs prepacked", "runs"),
        )

    def rows(self) -> list[tuple[str, ...]]:
        """One row of text for each measured layer and number of tokens."""
        return [_row(layer, measured) for layer in self.layers for measured in layer.measured]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {"headline": self.headline, **asdict(self)}

    def __str__(self) -> str:
        lines = [self.headline, f"measured on {self.device}, {self.threads} threads"]
        shown = [
            _row(layer, measured)
            for layer in self.layers
            for measured in layer.measured
            if layer.layer == layer.measured_on
        ]
        lines += _aligned([self.columns, *shown]) if shown else []
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            reasons.setdefault(f"{layer.format}: {layer.reason}", []).append(layer.layer)
        lines += [
            _grouped(names, reason) for reason, names in list(reasons.items())[:REASONS_SHOWN]
        ]
        if len(reasons) > REASONS_SHOWN:
            lines.append(f"... and {len(reasons) - REASONS_SHOWN} more reasons, in .layers")
        return "\n".join(lines)


def measured_for(prefix: str, tokens: int, times: Mapping[str, float]) -> Measured:
    """The times at one number of tokens, and the fastest of the candidates named `prefix`..."""
    sparse = [name for name in times if name not in (DENSE, PREPACKED) and name.startswith(prefix)]
    fastest = min(sparse, key=lambda name: times[name], default=None)
    return Measured(tokens, tuple(times.items()), fastest)


def _row(layer: LayerReport, measured: Measured) -> tuple[str, ...]:
    times = dict(measured.microseconds)
    sparse = measured.fastest_sparse
    out, width = layer.shape
    return (
        layer.layer,
        f"{out}x{width}",
        str(measured.tokens),
        _us(times.get(DENSE)),
        _us(times.get(PREPACKED)),
        _us(times.get(sparse or "")),
        sparse or "-",
        _times(measured.ratio_to(DENSE)),
        _times(measured.ratio_to(PREPACKED)),
        f"{layer.format}, {layer.weight_error:.1%} off" if layer.weight_error else layer.format,
    )


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _grouped(names: Sequence[str], reason: str) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}: {reason}"
