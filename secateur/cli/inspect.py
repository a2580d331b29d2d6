"""The verbs that change nothing: `doctor`, `inspect`, `plan` and `check`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options as o
from secateur.cli.console import (
    FAILED_CHECK,
    complain,
    emit,
    failures,
    left_alone,
    say,
    table,
    working,
)
from secateur.cli.source import Source, choose_plan, open_source
from secateur.model.plan import Plan, match
from secateur.prune.verbs import check as check_model
from secateur.report.rows import Row


def doctor(
    everything: Annotated[
        bool, typer.Option("--all", help="A line for every format and what can multiply it.")
    ] = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """What this machine offers: what runs here, what does not, and what to install for more."""
    with failures(debug):
        from secateur.accelerate.doctor import digest
        from secateur.accelerate.doctor import doctor as examine

        findings = examine()
        if json:
            emit([asdict(finding) for finding in findings])
        elif everything:
            rows = [(f.capability, f.state, f.detail) for f in findings]
            table(("capability", "state", "detail"), rows)
        else:
            say(*(f"{what + ':':14}{told}" for what, told in digest(findings)))
            say("`secateur doctor --all` has a line for every format and what can multiply it")


def inspect(
    model: o.Model, full: o.Full = False, json: o.Json = False, debug: o.Debug = False
) -> None:
    """The layers of a model: shapes, zeros, which patterns they hold or cannot hold."""
    with failures(debug):
        from secateur.report.inspection import inspect as examine
        from secateur.report.rows import without_empty

        source = open_source(model)
        with working("counting zeros"):
            found = examine(source.model)
        reasons = {layer.layer: layer.skipped for layer in found.layers if layer.skipped}
        reasons |= source.bare.left_alone if source.bare else {}
        if json:
            emit({**found.to_dict(), "left_alone": reasons})
            return
        # The reasons are sentences: below the table they do not make it too wide.
        rows = [row[:-1] for row in found.rows()]
        table(*without_empty(found.columns[:-1], rows), full=full)
        say(found.summary, *left_alone(reasons))


def plan(
    model: o.Model,
    patterns: o.Patterns = None,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the plan: .yaml, or .json.", show_default=False),
    ] = None,
    layers: o.Layers = None,
    ignore: o.Ignore = None,
    full: o.Full = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Which layers would get which pattern, and which are left alone and why.

    The file can be edited and given to `secateur prune --plan`.
    """
    with failures(debug):
        if not patterns:
            raise ValueError("a plan needs --pattern, such as --pattern 2:4")
        source = open_source(model)
        decided = choose_plan(source.model, patterns, None, layers, ignore)
        if out is not None:
            decided.write(out)
        if json:
            emit(decided.to_dict())
            return
        table(decided.columns, decided.rows(), full=full)
        weights = sum(rows * columns for rows, columns in decided.shapes.values())
        say(f"{len(decided.layers)} layers, {weights:,} weights")
        say(*left_alone({**decided.skipped, **(source.bare.left_alone if source.bare else {})}))
        if out is not None:
            say(f"written to {out}")


def check(
    model: o.Model,
    patterns: o.Patterns = None,
    plan: o.PlanFile = None,
    layers: o.Layers = None,
    ignore: o.Ignore = None,
    full: o.Full = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Whether the zeros are where the pattern wants them: exit code 0 if they are, 1 if not.

    Without --pattern and --plan it is the plan in the folder's secateur.json that counts. Any model
    will do, whoever pruned it.
    """
    with failures(debug):
        from secateur.formats import unpack_

        source = open_source(model)
        if patterns or plan:
            decided = choose_plan(source.model, patterns, plan, layers, ignore)
        else:
            decided = _saved_plan(source.path)
        unpack_(source.model)  # a packed weight counts as the dense one that it holds
        match(source.model, decided)  # a plan for another model is no failed check
        broken = ""
        try:
            check_model(source.model, decided)
        except ValueError as error:
            broken = str(error)
        columns, rows = _verdicts(source, decided)
        if json:
            layers_found = [dict(zip(columns, row, strict=True)) for row in rows]
            emit({"ok": not broken, "error": broken or None, "layers": layers_found})
        else:
            shown = [row for row in rows if row[-1] != "holds"] if broken else rows
            table(columns, shown or rows, full=full)
    if broken:
        bad = sum(row[-1] != "holds" for row in rows)
        complain(f"{bad} of {len(rows)} layers break the plan" if bad else broken)
        raise typer.Exit(FAILED_CHECK)
    if not json:
        say(f"all {len(rows)} layers hold their pattern", style="green")


def _saved_plan(folder: Path) -> Plan:
    from secateur.files.sidecar import SIDECAR, read_sidecar

    if not (folder / SIDECAR).is_file():
        raise ValueError(f"check needs --pattern or --plan: {folder} has no {SIDECAR} with a plan")
    saved = read_sidecar(folder).plan
    if saved is None:
        raise ValueError(f"check needs --pattern or --plan: {folder / SIDECAR} has no plan")
    return saved


def _verdicts(source: Source, decided: Plan) -> tuple[Row, list[Row]]:
    """A row for each planned layer: its sparsity, and `holds` or what breaks its pattern."""
    from secateur.model.layers import matrix

    rows: list[Row] = []
    for name, module in match(source.model, decided).items():
        pattern, mask = decided.layers[name], matrix(module) != 0
        verdict = pattern.violation(mask) or "holds"
        rows.append((name, str(pattern), f"{float((~mask).float().mean()):.2%}", verdict))
    return ("layer", "pattern", "zeros", "verdict"), rows
