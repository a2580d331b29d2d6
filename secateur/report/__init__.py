"""The HTML report: one file that shows what pruning changed, cost and gained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from torch import nn

from secateur.accelerate.report import AccelerateReport
from secateur.allocation import Allocation, Sensitivity
from secateur.core.disk.atomic import write_whole
from secateur.core.tables import as_bytes, printable
from secateur.model.plan import Plan
from secateur.prune.verbs import PruneReport
from secateur.report import sections
from secateur.report.content import Section, Tile, metric, provenance
from secateur.report.inspection import Inspection, inspect

__all__ = ["write_html"]


def write_html(
    path: str | Path,
    *,
    title: str,
    plan: Plan | None = None,
    prune: PruneReport | Sequence[PruneReport] | None = None,
    evaluations: Mapping[str, Mapping[str, float]] | None = None,
    accelerate: AccelerateReport | None = None,
    sensitivity: Sensitivity | None = None,
    allocation: Allocation | None = None,
    model: nn.Module | None = None,
    sizes: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write one HTML file that needs no other: tables, plots and mask pictures of what is given.

    `evaluations` are {name of the weights: {measure: value}}, such as
    `{"dense": {"perplexity": 5.07}, "2:4 wanda": {"perplexity": 7.0, "KL to dense": 0.1}}`, and
    `sizes` {name of the form: bytes}; others are compared with the name that begins with "dense".
    `model` is read for its zeros. Whatever is None has no section.

    Raises:
        ValueError: if matplotlib or jinja2 is not installed.
    """
    template = _template()
    reports = [prune] if isinstance(prune, PruneReport) else list(prune or ())
    inspection = inspect(model) if model is not None else None
    found = [
        sections.accuracy(evaluations) if evaluations else None,
        sections.sparsity(inspection) if inspection else None,
        sections.masks(model, inspection, plan) if model is not None and inspection else None,
        sections.errors(reports) if reports else None,
        sections.dispatch(accelerate) if accelerate else None,
        sections.file_sizes(sizes) if sizes else None,
        sections.sensitivity(sensitivity) if sensitivity else None,
        sections.allocation(allocation) if allocation else None,
        sections.planned(plan) if plan else None,
    ]
    shown: list[Section] = [section for section in found if section is not None]
    page = template.render(
        title=title,
        subtitle=_subtitle(plan, reports),
        tiles=_tiles(inspection, plan, evaluations, accelerate, sizes),
        notes=list(notes),
        sections=shown,
        provenance=provenance(),
    )
    write_whole(Path(path), printable(page, keep="\n"))


def _template() -> Any:
    """The page's template; text is escaped unless the template marks it as safe."""
    try:
        import jinja2
        import matplotlib  # noqa: F401  (so that it is missed here, before anything is drawn)
    except ImportError as error:
        raise ValueError(
            f"the report needs {error.name}, which is not installed: pip install 'secateur[report]'"
        ) from None
    source = resources.files("secateur.report").joinpath("template.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)


def _subtitle(plan: Plan | None, reports: Sequence[PruneReport]) -> str:
    parts = []
    if reports:
        parts.append("method " + ", ".join(dict.fromkeys(report.method for report in reports)))
    if plan is not None:
        patterns = list(dict.fromkeys(str(pattern) for pattern in plan.layers.values()))
        listed = ", ".join(patterns[:4]) + (" and others" if len(patterns) > 4 else "")
        total = len(plan.layers) + len(plan.skipped)
        parts += [f"pattern {listed}", f"{len(plan.layers)} of {total} layers"]
    return " · ".join(parts)


def _tiles(
    inspection: Inspection | None,
    plan: Plan | None,
    evaluations: Mapping[str, Mapping[str, float]] | None,
    accelerate: AccelerateReport | None,
    sizes: Mapping[str, int] | None,
) -> list[Tile]:
    tiles = []
    if inspection is not None:
        counted = [layer for layer in inspection.layers if layer.counted]
        if plan is not None:
            counted = [layer for layer in inspection.layers if layer.layer in plan.layers]
        zeros = Inspection(tuple(replace(layer, skipped="") for layer in counted)).zeros
        which = "planned layers" if plan is not None else "layers"
        tiles.append(Tile("Zeros", f"{zeros:.1%}", f"of the weights of {len(counted)} {which}"))
    if evaluations:
        tiles += _evaluation_tiles(evaluations)
    if accelerate is not None:
        counts = ", ".join(map(str, accelerate.tokens))
        value = f"{len(accelerate.sparse)} of {len(accelerate.layers)}"
        tiles.append(Tile("Layers faster sparse", value, f"measured at {counts} tokens a call"))
    if sizes:
        *_, (form, size) = sizes.items()
        dense = sections.dense_of(sizes)
        detail = f"{form}; dense {as_bytes(sizes[dense])}" if dense and dense != form else form
        tiles.append(Tile("File size", as_bytes(size), detail))
    return tiles


def _evaluation_tiles(evaluations: Mapping[str, Mapping[str, float]]) -> list[Tile]:
    """The first two measures of the last weights, beside the dense model's."""
    tiles: list[Tile] = []
    dense = sections.dense_of(evaluations)
    pruned = [item for item in evaluations.items() if item[0] != dense]
    if not pruned:
        return tiles
    name, measured = pruned[-1]
    for what, value in list(measured.items())[:2]:
        how = metric(what)
        detail = name
        if dense is not None and what in evaluations[dense]:
            detail = f"{name}; dense {how.text.format(evaluations[dense][what])}"
        tiles.append(Tile(what[:1].upper() + what[1:], how.text.format(value), detail))
    return tiles
