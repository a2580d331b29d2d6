"""What `accelerate_` measured and decided, as data and as a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from secateur.accelerate.candidates import DENSE, PREPACKED
from secateur.accelerate.choices import LEAST_GAIN, Policy
from secateur.accelerate.layer_report import LayerReport, LayerTimes, token_count
from secateur.accelerate.tokens import Day
from secateur.accelerate.totals import given_up, in_all, layer_given_up
from secateur.core.shown import Shown, Table
from secateur.core.tables import as_bytes

REASONS_SHOWN = 8  # groups of layers that the printed report explains before it only counts


@dataclass(frozen=True)
class AccelerateReport(Shown):
    """What `accelerate_` measured and decided; printing it gives a table.

    `often` is how often each number of tokens occurs, empty where that is not known.
    `dense_formats` are those tried that store every weight, rounded: a sparse format that rounds
    has to beat them, too. `fused` are the layers that now apply the activation after them, and
    which one it is. `advice` is what would be faster on this machine, where nothing is.
    `model_bytes` are those of the whole model before, parameters and buffers. `coverage` says
    which share of all parameters is packed, if any is.
    """

    device: str
    threads: int
    tokens: tuple[int, ...]
    layers: tuple[LayerReport, ...]
    often: tuple[float, ...] = ()
    policy: Policy = "memory"
    dense_formats: tuple[str, ...] = ()
    fused: Mapping[str, str] = field(default_factory=dict)
    advice: str = ""
    model_bytes: int = 0
    coverage: str = ""

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
        measured = [entry for layer in self.changed for entry in layer.measured]
        everywhere = all(entry.ratio >= LEAST_GAIN for entry in measured)
        gain = "faster than dense" if everywhere else "faster than dense or as fast"
        quantised = len(self.changed) - len(self.sparse)
        dense = f" and {quantised} dense quantised" if quantised else ""
        return (
            f"{len(self.sparse)} of {len(self.layers)} layers run sparse{dense}, each {gain} "
            f"at tokens {counts}; their weights take {as_bytes(after)} instead of "
            f"{as_bytes(before)}{rounded}"
        )

    @property
    def gain(self) -> str:
        """One sentence: milliseconds a call and bytes, before and after; empty without a gain."""
        if not self.changed:
            return ""
        return in_all(self.layers, self._day, self.model_bytes)

    @property
    def given_up(self) -> str:
        """One sentence: what the other policy would gain or save; empty if it is the same."""
        return given_up(self.layers, self._day, self.model_bytes)

    @property
    def _day(self) -> Day:
        return Day(self.tokens, self.often)

    @property
    def columns(self) -> tuple[str, ...]:
        """The heads of `rows()`."""
        quantised = ("dense quantised us", "vs quantised") if self.dense_formats else ()
        return (
            *("layer", "shape", "tokens", "runs", "eager us", "prepacked us", "sparse us"),
            *("fastest sparse", "vs eager", "vs prepacked", *quantised, "others us", "holds"),
            "measured",
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
        told = {"headline": self.headline, "given_up": self.given_up, "gain": self.gain}
        return {**told, **asdict(self)}

    @property
    def paragraphs(self) -> tuple[str | Table, ...]:
        how = f"measured on {self.device}, {self.threads} threads"
        measured = [(one, entry) for one in self.layers for entry in one.measured]
        earlier = sum(entry.remembered for _, entry in measured)
        if earlier:
            what = "all" if earlier == len(measured) else f"{earlier} of {len(measured)} rows"
            how += f"; {what} remembered from earlier calls, remeasure=True measures afresh"
        if self.often:
            how += f"; {_frequencies(self._day)}"
        lines: list[str | Table] = [self.headline, how]
        if shown := self.distinct_rows():
            lines.append(Table(*_shown(self.columns, shown)))
        reasons: dict[tuple[int, str], list[str]] = {}
        for layer in self.layers:
            for rank, reason in enumerate(_reasons(layer)):
                if reason:
                    reasons.setdefault((rank, reason), []).append(layer.layer)
        for name, activation in self.fused.items():
            reasons.setdefault((0, f"applies the {activation} after it"), []).append(name)
        ranked = sorted(reasons, key=lambda one: one[0])[:REASONS_SHOWN]
        lines += [_grouped(reasons[one], one[1]) for one in ranked]
        if len(reasons) > REASONS_SHOWN:
            lines.append(f"... and {len(reasons) - REASONS_SHOWN} more reasons, in .layers")
        lines += filter(None, (self.coverage, self.advice, self.given_up, self.gain))
        return tuple(lines)

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
            as_bytes(layer.bytes_after),
            "earlier" if measured.remembered else "now",
        )


def _frequencies(day: Day) -> str:
    """How often each number of tokens occurs: `1 token in 99.9 % of all calls, ...`."""
    share = {n: often / sum(day.often) for n, often in zip(day.tokens, day.often, strict=True)}
    told = (f"{token_count(n)} in {100 * part:.3g} % of all calls" for n, part in share.items())
    return ", ".join(told)


def _shown(
    columns: Sequence[str], rows: Sequence[tuple[str, ...]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table for reading: no column that says nothing, and what a layer has once, said once."""
    of = dict(zip(columns, zip(*rows, strict=True), strict=True))
    silent = {name for name, cells in of.items() if set(cells) == {"-"}}
    if len(set(of["measured"])) == 1:  # the line above the table says it
        silent.add("measured")
    pairs = zip(of["fastest sparse"], of["runs"], strict=True)
    if all(name == "-" or runs.startswith(name) for name, runs in pairs):
        silent.add("fastest sparse")
    again = [False, *(one == other for one, other in pairwise(of["layer"]))]
    for name in ("layer", "shape", "holds"):
        of[name] = tuple("" if same else cell for same, cell in zip(again, of[name], strict=True))
    told = [name for name in columns if name not in silent]
    return tuple(told), list(zip(*(of[name] for name in told), strict=True))


def _reasons(layer: LayerReport) -> tuple[str, ...]:
    """The lines under the table, empty where there is nothing to say: the most important first."""
    why = f"{layer.format}: {layer.reason}"
    if layer.format == DENSE:
        return (why,)
    return (
        why,
        _beyond(layer),
        layer_given_up(layer),
        *(f"dropped: {reason}" for reason in layer.dropped),
    )


def _beyond(layer: LayerReport) -> str:
    """What runs at more tokens than anything was measured at, where it is something else."""
    if len(layer.table) < 2:
        return ""
    (_, above), (name, _) = layer.table[-2:]
    if above is None or above < layer.measured[-1].tokens:
        return ""
    return (
        f"above {above} tokens it runs its {name}, which was not measured there: name larger "
        "numbers in tokens= if they occur"
    )


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _grouped(names: Sequence[str], reason: str) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}: {reason}"
