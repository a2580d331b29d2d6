"""The sections of the report, each from one kind of result; None if there is nothing to show."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from secateur.accelerate.report import AccelerateReport
from secateur.allocation import Allocation, Sensitivity
from secateur.allocation.budget import figure
from secateur.allocation.choices import parse_choice
from secateur.core.tables import as_bytes
from secateur.model import layers as _layers
from secateur.model.plan import Plan
from secateur.prune.verbs import PruneReport
from secateur.report import plots
from secateur.report.content import (
    MARKS,
    Figure,
    Mark,
    Section,
    Table,
    by_kind,
    layer_tables,
    metric,
)
from secateur.report.inspection import Inspection
from secateur.report.pictures import picture

# More strips or bars than this do not fit a screen; the tables have all layers.
KINDS_DRAWN, BARS_DRAWN, PICTURES = 12, 16, 6

Evaluations = Mapping[str, Mapping[str, float]]


def accuracy(evaluations: Evaluations) -> Section:
    """Each method's measures beside the dense model's."""
    names = list(dict.fromkeys(name for measured in evaluations.values() for name in measured))
    rows = [
        (method, *(_cell(name, measured.get(name)) for name in names))
        for method, measured in evaluations.items()
    ]
    figures = []
    for i, name in enumerate(names):
        values = {m: v[name] for m, v in evaluations.items() if name in v}
        if len(values) > 1:
            how = metric(name)
            svg = plots.bars(
                values, how.label, key=f"accuracy{i}", baseline=dense_of(values), unit=how.text
            )
            figures.append(Figure(svg, f"{how.meaning} {_dashed(values)}".strip(), f"{name}:"))
    return Section(
        "accuracy",
        "Accuracy",
        "What the zeros cost, beside the dense model where it was measured too.",
        figures,
        tables=[Table(("weights", *names), rows)],
    )


def sparsity(inspection: Inspection) -> Section:
    """Where the zeros are."""
    values = {r.layer: r.zeros for r in inspection.layers if r.counted}
    shown = {f"{value:.1%}" for value in values.values()}
    drawn, wide = _per_layer({"zeros": values}, "zeros in the weight", "sparsity", 1.0)
    alike = f" Each of the {len(values)} layers has {min(shown, default='')} zeros."
    return Section(
        "sparsity",
        "Sparsity per layer",
        f"{inspection.summary}." + (alike if len(shown) == 1 < len(values) else ""),
        drawn if len(shown) > 1 else (),
        wide,
        tables=layer_tables(inspection.columns, inspection.rows(), "Layers"),
    )


def masks(model: nn.Module, inspection: Inspection, plan: Plan | None) -> Section | None:
    """A corner of the mask of a few layers, one of each kind."""
    wanted = [r.layer for r in inspection.layers if 0 < r.zeros < 1 and r.counted]
    if plan is not None:
        wanted = [name for name in wanted if name in plan.layers]
    if not wanted:
        return None
    modules = _layers.layers_of(model)
    pictures = []
    with torch.no_grad():
        for name in _one_of_each_kind(wanted)[:PICTURES]:
            pattern = plan.layers[name] if plan is not None else None
            pictures.append(picture(name, pattern, _layers.matrix(modules[name]) != 0))
    return Section(
        "masks",
        "What the masks look like",
        "The top left corner of some weights, a cell for each weight: dark is kept, light is zero. "
        "Rows are outputs, columns are inputs; fine lines part the pattern's groups or tiles.",
        [
            Figure(
                p.svg,
                f"{p.pattern + ', ' if p.pattern else ''}{p.rows} x {p.columns} of "
                f"{p.shape[0]} x {p.shape[1]} weights; {p.zeros:.1%} of the layer is zero.",
                p.layer,
            )
            for p in pictures
        ],
    )


def errors(reports: Sequence[PruneReport]) -> Section:
    """The share of its output that each layer lost, by method."""
    series = {
        report.method: {r.layer: r.error for r in report.layers if r.error is not None}
        for report in reports
    }
    series = {method: values for method, values in series.items() if values}
    tables = [
        table
        for report in reports
        for table in layer_tables(
            report.columns, report.rows(), report.method, closed=len(reports) > 1
        )
    ]
    if not series:
        missing = "These methods do not gather what it takes to know a layer's output error."
        return Section("errors", "What pruning did", missing, tables=tables)
    return Section(
        "errors",
        "Error per layer",
        "The share of each layer's output energy that is lost on the calibration inputs, "
        "||(W - W')X||² / ||WX||²: 0 is unchanged, 1 is as bad as no layer at all.",
        *_per_layer(series, "share of the output lost", "errors", None),
        legend=_legend(series) if len(series) > 1 else (),
        tables=tables,
    )


def dispatch(report: AccelerateReport) -> Section:
    """What was measured and what runs, and why the other layers stay dense."""
    figures = []
    for tokens in report.tokens:
        ratios = {
            f"{r.layer} ({r.shape[0]}x{r.shape[1]})": m.ratio
            for r in report.layers
            for m in r.measured
            if r.layer == r.measured_on and m.tokens == tokens and m.ratio > 0
        }
        if ratios:
            shown = dict(sorted(ratios.items(), key=lambda item: -item[1])[:BARS_DRAWN])
            svg = plots.bars(
                shown, "times as fast as dense", key=f"dispatch{tokens}", line=1.0, unit="{:.2f}x"
            )
            caption = "Right of the dashed line the fastest sparse way beats dense."
            figures.append(Figure(svg, caption, f"{tokens} token{'s' * (tokens != 1)} a call."))
    why: dict[tuple[str, str], int] = {}
    for layer in report.layers:
        key = (layer.format, layer.reason)
        why[key] = why.get(key, 0) + 1
    reasons = [(runs, f"{count}", reason) for (runs, reason), count in why.items()]
    return Section(
        "dispatch",
        "Speed",
        f"{report.headline[:1].upper()}{report.headline[1:]}. Measured on {report.device}, "
        f"{report.threads} threads; every layer against dense, and dense stays where dense wins."
        + (f" {report.coverage[:1].upper()}{report.coverage[1:]}." if report.coverage else "")
        + (f" {report.advice[:1].upper()}{report.advice[1:]}." if report.advice else ""),
        figures,
        tables=[
            Table(("runs", "layers", "why"), reasons),
            *layer_tables(
                report.columns, report.distinct_rows(), "Measurements, microseconds a call"
            ),
        ],
    )


def file_sizes(sizes: Mapping[str, int]) -> Section:
    """Bytes of each form on disk."""
    largest = max(sizes.values())
    unit, scale = next(
        (u, s)
        for u, s in (("GB", 10**9), ("MB", 10**6), ("kB", 1000), ("B", 1))
        if largest >= s or s == 1
    )
    values = {name: count / scale for name, count in sizes.items()}
    drawn = plots.bars(
        values, f"size, {unit}", key="sizes", baseline=dense_of(values), unit="{:.4g}"
    )
    return Section(
        "sizes",
        "File sizes",
        "Zeros in a dense file take as much room as other weights: only a packed form is smaller.",
        [Figure(drawn, _dashed(values))] if len(sizes) > 1 else (),
        tables=[Table(("form", "size"), [(name, as_bytes(n)) for name, n in sizes.items()])],
    )


def sensitivity(found: Sensitivity) -> Section:
    """How the loss rises when one layer alone is pruned."""
    ticks = sorted(found.patterns, key=lambda text: parse_choice(text).sparsity)
    measured = {
        name: {p: value for p, value in increase.items() if value is not None}
        for name, increase in found.increase.items()
    }
    lines = {name: increase for name, increase in measured.items() if increase}
    figures: list[Figure] = []
    if lines:
        svg = plots.curves(lines, ticks, "increase of the loss", key="sensitivity")
        steep = "The layers that lose most are in colour and named above, the others grey."
        figures.append(Figure(svg, steep))
        hardest = ticks[-1]
        at = {name: increase[hardest] for name, increase in lines.items() if hardest in increase}
        strips, _ = _per_layer({hardest: at}, "increase of the loss", "sensitive", None)
        figures += [replace(strip, name=f"At {hardest}.") for strip in strips]
    return Section(
        "sensitivity",
        "Sensitivity",
        f"By how much the loss rises over the dense model's {found.loss:.4f} when one layer alone "
        f"is pruned by {found.criterion}. Layers that rise steeply should keep more weights.",
        figures,
        wide=True,
        legend=[
            Mark(f"var(--series-{i + 1})", MARKS[i], name)
            for i, name in enumerate(plots.highest(lines))
        ],
        tables=layer_tables(found.columns, found.rows(), "Increases of the loss"),
    )


def allocation(found: Allocation) -> Section:
    """What budgets buy, and what each layer got within the chosen one."""
    svg = plots.front(
        [(point.cost, point.increase) for point in found.front],
        (found.best.cost, found.best.increase),
        found.budget,
        (found.unit, "increase of the loss"),
        key="allocation",
    )
    caption = (
        "Each point is the best found at its cost; the large one is chosen, dashed the budget."
    )
    return Section(
        "allocation",
        "Allocation",
        f"Within {figure(found.budget)} {found.unit}, of {figure(found.dense)} dense. Increases of "
        "the loss are those of layers taken one by one, added up.",
        [Figure(svg, caption)],
        wide=True,
        tables=[
            Table(found.columns, found.rows()),
            *layer_tables(("layer", "pattern"), list(found.best.choices.items()), "Chosen layers"),
        ],
    )


def planned(plan: Plan) -> Section:
    """Which layer gets which pattern, and which are left alone."""
    tables = layer_tables(plan.columns, plan.rows(), "Planned layers")
    if plan.skipped:
        tables.append(Table(("left alone", "why"), list(plan.skipped.items())))
    told = f"{plan.coverage[:1].upper()}{plan.coverage[1:]}." if plan.left else ""
    lead = f"Which layer gets which pattern. {told}".strip()
    return Section("plan", "Plan", lead, tables=tables)


def dense_of(values: Mapping[str, object]) -> str | None:
    """The name of the dense model among those compared, if it is there."""
    return next((name for name in values if name.lower().startswith("dense")), None)


def _cell(name: str, value: float | None) -> str:
    return "-" if value is None else metric(name).text.format(value)


def _dashed(values: Mapping[str, float]) -> str:
    return "The dashed line is dense." if dense_of(values) is not None else ""


def _legend(series: Mapping[str, object]) -> list[Mark]:
    return [
        Mark(f"var(--series-{i % len(plots.SERIES) + 1})", "■", name)
        for i, name in enumerate(series)
    ]


def _per_layer(
    series: Mapping[str, Mapping[str, float]], label: str, key: str, top: float | None
) -> tuple[list[Figure], bool]:
    """Strips over the blocks if layers are in blocks, else bars; and whether they are wide."""
    by_method = {method: by_kind(values) for method, values in series.items()}
    kinds = list(dict.fromkeys(kind for named, _ in by_method.values() for kind in named))
    prefix = next((p for _, p in by_method.values() if p), "")
    figures = []
    if kinds:
        every = _alike({k: [named.get(k, {}) for named, _ in by_method.values()] for k in kinds})
        drawn = dict(list(every.items())[:KINDS_DRAWN])
        under = f"One strip for each kind of layer in {prefix}" if prefix else "One strip a kind"
        more = f", the first {KINDS_DRAWN} of {len(every)}" if len(every) > KINDS_DRAWN else ""
        svg = plots.strips(drawn, f"block number (bars: {label})", key=key, top=top)
        figures.append(
            Figure(svg, f"{under}{more}; one bar a block, from the first (left) to the last.")
        )
        return figures, True
    for i, (method, values) in enumerate(series.items()):
        shown = dict(list(values.items())[:BARS_DRAWN])
        more = (
            f"The first {len(shown)} of {len(values)} layers." if len(values) > len(shown) else ""
        )
        svg = plots.bars(shown, label, key=f"{key}{i}", unit="{:.1%}")
        figures.append(Figure(svg, more, method if len(series) > 1 else ""))
    return figures, False


def _alike(
    kinds: Mapping[str, list[dict[int, float]]],
) -> dict[str, list[dict[int, float]]]:
    """The kinds; those whose values look the same are one, under all their names."""
    named: dict[str, list[str]] = {}
    for kind, values in kinds.items():
        look = repr([{block: f"{v:.3g}" for block, v in found.items()} for found in values])
        named.setdefault(look, []).append(kind)
    return {
        ", ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more": kinds[
            names[0]
        ]
        for names in named.values()
    }


def _one_of_each_kind(names: Sequence[str]) -> list[str]:
    """The middle layer of each kind, in the order of the kinds."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
        kinds.setdefault((*parts[:place], *parts[place + 1 :]), []).append(name)
    return [members[len(members) // 2] for members in kinds.values()]
