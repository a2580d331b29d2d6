"""What `accelerate_` measured and decided, as data and as a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.accelerate.candidates import DENSE, PREPACKED
from secateur.formats.pack import whole_model

REASONS_SHOWN = 8  # groups of layers that the printed report explains before it only counts


@dataclass(frozen=True)
class LayerTimes:
    """One layer at one number of tokens: the time of each candidate, and the one that would run.

    The fastest candidate, of the chosen format if one was chosen.
    `remembered` times are from an earlier call on a like layer.
    """

    tokens: int
    microseconds: tuple[tuple[str, float], ...]
    fastest_sparse: str | None
    remembered: bool = False

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

    def fastest_of(self, formats: Sequence[str]) -> tuple[str, float] | None:
        """The fastest candidate of these formats and its microseconds."""
        found = [entry for entry in self.microseconds if entry[0].rpartition(" ")[0] in formats]
        return min(found, key=lambda entry: entry[1], default=None)


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that a layer holds, what they are and why: its packed weight, or an arrangement."""

    name: str
    nbytes: int
    why: str


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer: the format it runs in (or `dense`), and why.

    `table` says which implementation runs up to which number of tokens. Bytes are those of the
    weight in use, `holds` what they are: the packed weight, and what implementations arranged for
    themselves. `weight_error` is ||W - W'|| / ||W||, 0 unless the format rounds weights to a grid.
    `cannot` is what implementations said that cannot run here, `dropped` why others were no choice:
    out of memory, a library's error, a wrong result, or the policy.
    """

    layer: str
    shape: tuple[int, int]
    format: str
    measured: tuple[LayerTimes, ...]
    measured_on: str
    bytes_before: int
    bytes_after: int
    reason: str
    weight_error: float = 0.0
    table: tuple[tuple[str, int | None], ...] = ()
    holds: tuple[HeldBytes, ...] = ()
    cannot: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class AccelerateReport:
    """What `accelerate_` measured and decided; printing it gives a table.

    `dense_formats` are those tried that store every weight, rounded: a sparse format that rounds
    has to beat them, too. `fused` are the layers that now apply the activation after them, and
    which one it is. `advice` is what would be faster on this machine, where nothing is.
    `model_bytes` are those of the whole model before, parameters and buffers.
    """

    device: str
    threads: int
    tokens: tuple[int, ...]
    layers: tuple[LayerReport, ...]
    policy: str = "fastest"
    dense_formats: tuple[str, ...] = ()
    fused: Mapping[str, str] = field(default_factory=dict)
    advice: str = ""
    model_bytes: int = 0

    @property
    def changed(self) -> tuple[LayerReport, ...]:
        """The layers that are now `SparseLinear`."""
        return tuple(layer for layer in self.layers if layer.format != DENSE)

    @property
    def sparse(self) -> tuple[LayerReport, ...]:
        """The layers that now run sparse: all that changed but those that are dense and rounded."""
        return tuple(layer for layer in self.changed if layer.format not in self.dense_formats)

    @property
    def headline(self) -> str:
        """One sentence: how many layers run sparse and how much faster, or that none does."""
        counts = ", ".join(str(number) for number in self.tokens)
        if not self.changed:
            return (
                f"no layer is faster sparse on this device at tokens {counts}: "
                "the model is unchanged"
            )
        before = sum(layer.bytes_before for layer in self.changed)
        after = sum(layer.bytes_after for layer in self.changed)
        error = max(layer.weight_error for layer in self.changed)
        rounded = f", rounded by up to {error:.1%}" if error else ""
        everywhere = all(entry.ratio > 1 for layer in self.changed for entry in layer.measured)
        gain = "faster than dense" if everywhere else "faster than dense or as fast"
        quantised = len(self.changed) - len(self.sparse)
        dense = f" and {quantised} dense quantised" if quantised else ""
        return (
            f"{len(self.sparse)} of {len(self.layers)} layers run sparse{dense}, each {gain} "
            f"at tokens {counts}; their weights take {after / 1e6:.1f} MB instead of "
            f"{before / 1e6:.1f} MB{rounded}; {whole_model(self.model_bytes, before, after)}"
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The heads of `rows()`."""
        quantised = ("dense quantised us", "vs quantised") if self.dense_formats else ()
        return (
            *("layer", "shape", "tokens", "runs", "eager us", "prepacked us", "sparse us"),
            *("fastest sparse", "vs eager", "vs prepacked", *quantised, "others us", "measured"),
        )

    def rows(self) -> list[tuple[str, ...]]:
        """One row of text for each measured layer and number of tokens."""
        return [self._row(layer, one) for layer in self.layers for one in layer.measured]

    def distinct_rows(self) -> list[tuple[str, ...]]:
        """The rows of the layers that were timed, with how many more each of them stands for."""
        stands_for = Counter(layer.measured_on for layer in self.layers)
        rows = []
        for layer in self.layers:
            more = stands_for[layer.layer] - 1
            name = f"{layer.layer} and {more} more" if more > 0 else layer.layer
            if layer.layer == layer.measured_on:
                rows += [(name, *self._row(layer, one)[1:]) for one in layer.measured]
        return rows

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {"headline": self.headline, **asdict(self)}

    def __str__(self) -> str:
        lines = [self.headline, f"measured on {self.device}, {self.threads} threads"]
        measured = [(one, entry) for one in self.layers for entry in one.measured]
        earlier = sum(entry.remembered for _, entry in measured)
        if earlier:
            what = "all" if earlier == len(measured) else f"{earlier} of {len(measured)} rows"
            lines[-1] += f"; {what} remembered from earlier calls, remeasure=True measures afresh"
        shown = self.distinct_rows()
        lines += _aligned([self.columns, *shown]) if shown else []
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            for reason in _reasons(layer):
                reasons.setdefault(reason, []).append(layer.layer)
        for name, activation in self.fused.items():
            reasons.setdefault(f"applies the {activation} after it", []).append(name)
        lines += [
            _grouped(names, reason) for reason, names in list(reasons.items())[:REASONS_SHOWN]
        ]
        if len(reasons) > REASONS_SHOWN:
            lines.append(f"... and {len(reasons) - REASONS_SHOWN} more reasons, in .layers")
        if self.advice:
            lines.append(self.advice)
        return "\n".join(lines)

    def _row(self, layer: LayerReport, measured: LayerTimes) -> tuple[str, ...]:
        times = dict(measured.microseconds)
        sparse = measured.fastest_sparse
        out, width = layer.shape
        runs = DENSE if layer.format == DENSE else str(sparse)
        quantised = measured.fastest_of(self.dense_formats)
        beside: tuple[str, ...] = ()
        if self.dense_formats:
            ratio = None if quantised is None else measured.ratio_to(quantised[0])
            named = "-" if quantised is None else f"{quantised[0]} {_us(quantised[1])}"
            beside = named, _times(ratio)
        shown = (DENSE, PREPACKED, sparse, quantised and quantised[0])
        others = [f"{name} {_us(us)}" for name, us in times.items() if name not in shown]
        return (
            layer.layer,
            f"{out}x{width}",
            str(measured.tokens),
            f"{runs}, {layer.weight_error:.1%} off" if layer.weight_error else runs,
            _us(times.get(DENSE)),
            _us(times.get(PREPACKED)),
            _us(times.get(sparse or "")),
            sparse or "-",
            _times(measured.ratio_to(DENSE)),
            _times(measured.ratio_to(PREPACKED)),
            *beside,
            ", ".join(others) or "-",
            "earlier" if measured.remembered else "now",
        )


def best_dense(microseconds: Mapping[str, float]) -> tuple[str, float]:
    """The faster of eager and prepacked dense, and its microseconds."""
    return min(
        ((name, us) for name, us in microseconds.items() if name in (DENSE, PREPACKED)),
        key=lambda entry: entry[1],
    )


def _reasons(layer: LayerReport) -> list[str]:
    """The lines under the table: why, what is held and what was dropped."""
    lines = [f"{layer.format}: {layer.reason}"]
    if layer.holds:
        held = "; ".join(f"{one.name} {_mb(one.nbytes)} ({one.why})" for one in layer.holds)
        before = _mb(layer.bytes_before)
        lines.append(f"holds {_mb(layer.bytes_after)} instead of {before}: {held}")
        lines += [f"dropped: {reason}" for reason in layer.dropped]
    return lines


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 100_000 else f"{nbytes} bytes"


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
