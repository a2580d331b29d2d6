"""`secateur allocate`: how many zeros each layer gets, as a plan file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from secateur.allocation import Allocation, equalize, erk, owl
from secateur.allocation import allocate as least_increase
from secateur.allocation.costs import nbytes, parameters
from secateur.allocation.sensitivity import read_sensitivity
from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import emit, left_alone, say, table
from secateur.cli.groups import Data, Loading
from secateur.cli.source import Opened, open_source
from secateur.model.layers import Selector
from secateur.model.plan import Plan
from secateur.model.plan import plan as plan_of
from secateur.patterns import Pattern

BUDGETS = {"budget": least_increase, "equalize": equalize}
FORMULAS = ("erk", "owl")
UNITS = ("parameters", "bytes")


@dataclass(frozen=True)
class Asked:
    """Curves and a budget, for the ways that weigh one against the other."""

    sensitivity: Annotated[
        Path | None,
        typer.Option(help="Curves that `secateur sensitivity -o` wrote.", show_default=False),
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="What the layers may cost: 50% of what they cost dense, or a number of the unit.",
            show_default=False,
        ),
    ] = None
    unit: Annotated[
        str, typer.Option(help="What is paid in: parameters that are not zero, or bytes.")
    ] = "parameters"

    def allocation(self, by: str, model: nn.Module) -> Allocation:
        """The best choices within the budget.

        Raises:
            ValueError: if an option is missing or wrong, or no choice keeps to the budget.
        """
        if self.sensitivity is None or self.budget is None:
            raise ValueError(
                f"--by {by} needs --sensitivity FILE and --budget 50%: `secateur sensitivity -o "
                "FILE` measures the curves; --by erk needs none"
            )
        if self.unit not in UNITS:
            raise ValueError(f"--unit is one of {', '.join(UNITS)}, got {self.unit!r}")
        curves = read_sensitivity(self.sensitivity)
        costs = parameters(curves) if self.unit == "parameters" else nbytes(model, curves)
        found = BUDGETS[by](curves, costs, _amount(self.budget, costs.dense))
        if not found.patterns:
            raise ValueError(f"--budget {self.budget} leaves every layer dense: give a smaller one")
        return found


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
            "curves; erk: by shapes; owl: by outliers of the activations, which needs data."
        ),
    ] = "budget",
    asked: Asked,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern",
            "-p",
            help="For erk and owl: what all weights together get, such as unstructured:0.7.",
            show_default=False,
        ),
    ] = None,
    layers: o.Layers = None,
    ignore: o.Ignore = None,
    data: Data,
    loading: Loading,
    full: o.Full = False,
    json: o.Json = False,
) -> None:
    """How many zeros each layer gets: fewer where they cost more.

    The plan is given to `secateur prune --plan`. Curves are measured with `secateur sensitivity`.
    """
    if by not in (*BUDGETS, *FORMULAS):
        raise ValueError(f"--by is one of {', '.join((*BUDGETS, *FORMULAS))}, got {by!r}")
    o.require_place(out, ".yaml", ".yml", ".json")
    # Bytes are those on the disk; only what is run is loaded for it.
    source = loading.source(model) if by == "owl" else open_source(model)
    found: Allocation | None = None
    if by in FORMULAS:
        patterns = _by_formula(by, source, pattern, layers, ignore, data)
    else:
        if pattern or layers or ignore or data.given:
            raise ValueError(
                f"--by {by} takes layers and patterns from the curves, which were measured on "
                "data: leave out --pattern, --layers, --ignore, --text and --tokens"
            )
        found = asked.allocation(by, source.model)
        patterns = found.patterns
    chosen: dict[Selector, Pattern | str] = dict(patterns.items())
    decided = plan_of(source.model, chosen)
    if out is not None:
        decided.write(out)
    if json:
        emit({"plan": decided.to_dict(), "front": [] if found is None else _front(found)})
    else:
        _show(source, decided, found, out, full)


def _by_formula(
    by: str,
    source: Opened,
    pattern: str | None,
    layers: list[str] | None,
    ignore: list[str] | None,
    data: Data,
) -> dict[str, Pattern]:
    """The patterns by ERK or OWL."""
    if pattern is None:
        raise ValueError(f"--by {by} needs --pattern, such as --pattern unstructured:0.7")
    if by == "erk":
        return erk(source.model, pattern, layers=layers or None, ignore=ignore or ())
    if source.state_dict:
        raise ValueError(
            f"{source.path} is a bare state dict, which cannot be run on data: name the model's "
            "folder, or use --by erk"
        )
    batches = data.read(source.path)
    return owl(source.model, pattern, batches, layers=layers or None, ignore=ignore or ())


def _amount(budget: str, dense: float) -> float:
    """The budget in the unit of its costs: a share of dense, or a number."""
    number, percent, rest = budget.partition("%")
    try:
        amount = float(number.replace(",", "")) * (dense / 100 if percent else 1)
    except ValueError:
        amount = -1.0
    if rest or not amount > 0:
        raise ValueError(
            f"--budget is a share such as 50%, or a number of the unit, got {budget!r}"
        )
    return amount


def _front(found: Allocation) -> list[dict[str, object]]:
    """What each budget would give, as plain data."""
    return [
        {"cost": one.cost, "of dense": one.cost / found.dense, "increase": one.increase}
        for one in found.front
    ]


def _show(
    source: Opened, decided: Plan, found: Allocation | None, out: Path | None, full: bool
) -> None:
    """Print what was chosen."""
    if source.state_dict is None:
        say(decided.coverage)
    if found is not None:
        table(found.columns, found.rows(), full=full)
        say(str(found.paragraphs[-1]), "")
    table(decided.columns, decided.rows(), full=full)
    say(f"{len(decided.layers)} layers, {decided.weights:,} weights")
    say(*left_alone({**decided.skipped, **source.left_alone}))
    if out is not None:
        say(f"written to {out}", f"next: `secateur prune {source.path} --plan {out} -o OUT`")
