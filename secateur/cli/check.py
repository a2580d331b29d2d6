"""`secateur check`: whether the zeros are where the pattern wants them."""

from pathlib import Path

import typer

from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import FAILED_CHECK, complain, emit, say, table
from secateur.cli.groups import Choice
from secateur.cli.source import Opened, open_source
from secateur.files.sidecar import SIDECAR, read_sidecar
from secateur.formats import unpack_
from secateur.model.layers import matrix
from secateur.model.plan import Plan, match
from secateur.prune.verbs import check as check_model
from secateur.report.rows import Row


@command()
def check(*, model: o.Model, choice: Choice, full: o.Full = False, json: o.Json = False) -> None:
    """Whether the zeros are where the pattern wants them: exit code 0 if they are, 1 if not.

    Without --pattern and --plan it is the plan in the folder's secateur.json that counts. Any model
    will do, whoever pruned it.
    """
    source = open_source(model)
    if choice.patterns or choice.plan:
        decided = choice.for_model(source.model)
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
    bad = [row for row in rows if row[-1] != "holds"]
    if json:
        layers = [dict(zip(columns, row, strict=True)) for row in rows]
        emit({"ok": not broken, "error": broken or None, "layers": layers})
    else:
        table(columns, bad if broken and bad else rows, full=full)
    if broken:
        complain(f"{len(bad)} of {len(rows)} layers break the plan" if bad else broken)
        raise typer.Exit(FAILED_CHECK)
    if not json:
        say(f"all {len(rows)} layers hold their pattern", style="green")


def _saved_plan(folder: Path) -> Plan:
    if not (folder / SIDECAR).is_file():
        raise ValueError(f"check needs --pattern or --plan: {folder} has no {SIDECAR} with a plan")
    saved = read_sidecar(folder).plan
    if saved is None:
        raise ValueError(f"check needs --pattern or --plan: {folder / SIDECAR} has no plan")
    return saved


def _verdicts(source: Opened, decided: Plan) -> tuple[Row, list[Row]]:
    """A row for each planned layer: its sparsity, and `holds` or what breaks its pattern."""
    rows: list[Row] = []
    for name, module in match(source.model, decided).items():
        pattern, mask = decided.layers[name], matrix(module) != 0
        verdict = pattern.violation(mask) or "holds"
        rows.append((name, str(pattern), f"{float((~mask).float().mean()):.2%}", verdict))
    return ("layer", "pattern", "zeros", "verdict"), rows
