"""`secateur allocate`: how many zeros each layer gets, as a plan file."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.allocation import Allocation
from secateur.cli import options as o
from secateur.cli.budget import BUDGETS, MS, Budget
from secateur.cli.command import command
from secateur.cli.console import emit, left_alone, say, table
from secateur.cli.formula import FORMULAS, Formula
from secateur.cli.groups import Data, Loading
from secateur.cli.source import Opened, open_source
from secateur.model.layers import Selector
from secateur.model.plan import Plan
from secateur.model.plan import plan as plan_of
from secateur.patterns import Pattern


@command()
def allocate(
    *,
    model: o.Model,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the plan: .yaml, or .json.", show_default=False),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            help="budget: the least sum of the curves within it; equalize: one threshold for all "
            "curves; erk: by shapes; owl: by outliers of the activations, which needs data; "
            "threshold: one for the scores of all layers."
        ),
    ] = "budget",
    budget: Budget,
    formula: Formula,
    data: Data,
    loading: Loading,
    full: o.Full = False,
    json: o.Json = False,
) -> None:
    """How many zeros each layer gets: fewer where they cost more.

    The plan is given to `secateur prune --plan`. Curves are measured with `secateur sensitivity`.
    """
    o.require_place(out, ".yaml", ".yml", ".json")
    _require_valid(by, budget, formula, data)
    # Bytes are those on the disk; only what is run is loaded for it.
    runs = by in ("owl", "threshold") or (by in BUDGETS and budget.unit == MS)
    source = loading.source(model) if runs else open_source(model)
    found = budget.allocation(by, source.model) if by in BUDGETS else None
    patterns = formula.patterns(by, source, data) if found is None else _zeros_alone(found)
    chosen: dict[Selector, Pattern | str] = dict(patterns.items())
    decided = plan_of(source.model, chosen)
    if out is not None:
        decided.write(out)
    if json:
        emit({"plan": decided.to_dict(), "front": [] if found is None else _front(found)})
        return
    _show(source, decided, found, full)
    if out is not None:
        how = formula.followed_by(by, data)
        say(f"written to {out}", f"next: `secateur prune {model} --plan {out}{how} -o OUT`")


def _require_valid(by: str, budget: Budget, formula: Formula, data: Data) -> None:
    """Raise ValueError if options are missing, wrong or not for this way."""
    if by not in (*BUDGETS, *FORMULAS):
        raise ValueError(f"--by is one of {', '.join((*BUDGETS, *FORMULAS))}, got {by!r}")
    if by in FORMULAS:
        formula.require_valid(by, data)
        return
    budget.require_valid(by)
    if formula.pattern or formula.layers or formula.ignore or data.given:
        raise ValueError(
            f"--by {by} takes layers and patterns from the curves, which were measured on data: "
            "leave out --pattern, --layers, --ignore, --text and --tokens"
        )


def _zeros_alone(found: Allocation) -> dict[str, Pattern]:
    """The patterns of an allocation, as a plan file holds them.

    Raises: ValueError if a layer is to be rounded as well.
    """
    for grid, layers in found.by_grid.items():
        if grid is not None:
            raise ValueError(
                f"a plan file holds zeros alone, and {next(iter(layers))} is to be rounded to "
                f"{grid!r}: measure curves of patterns without a grid, or allocate in Python"
            )
    return found.patterns


def _front(found: Allocation) -> list[dict[str, object]]:
    """What each budget would give, as plain data."""
    return [
        {"cost": one.cost, "of dense": one.cost / found.dense, "increase": one.increase}
        for one in found.front
    ]


def _show(source: Opened, decided: Plan, found: Allocation | None, full: bool) -> None:
    """Print what was chosen."""
    if source.state_dict is None:
        say(decided.coverage)
    if found is not None:
        table(found.columns, found.rows(), full=full)
        say(str(found.paragraphs[-1]), "")
    table(decided.columns, decided.rows(), full=full)
    say(f"{len(decided.layers)} layers, {decided.weights:,} weights")
    say(*left_alone({**decided.skipped, **source.left_alone}))
