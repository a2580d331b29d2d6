"""What `secateur allocate` weighs curves against: a budget, in one of the units."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from secateur.allocation import Allocation, equalize
from secateur.allocation import allocate as least_increase
from secateur.allocation.costs import (
    allocate_milliseconds,
    dense_milliseconds,
    milliseconds,
    nbytes,
    parameters,
)
from secateur.allocation.sensitivity import Sensitivity, read_sensitivity
from secateur.cli import options as o

BUDGETS = {"budget": least_increase, "equalize": equalize}
MS = "ms"
UNITS = ("parameters", "bytes", MS)


@dataclass(frozen=True)
class Budget:
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
        str,
        typer.Option(
            help="What is paid in: parameters that are not zero, bytes, or ms, measured here at "
            "--tokens-per-call."
        ),
    ] = "parameters"
    tokens_per_call: o.TokensPerCall = None
    formats: o.Formats = None

    def require_valid(self, by: str) -> None:
        """Check the options, before a model is loaded.

        Raises:
            ValueError: if one is missing or wrong.
        """
        if self.sensitivity is None or self.budget is None:
            raise ValueError(
                f"--by {by} needs --sensitivity FILE and --budget 50%: `secateur sensitivity -o "
                "FILE` measures the curves; --by erk needs none"
            )
        if self.unit not in UNITS:
            raise ValueError(f"--unit is one of {', '.join(UNITS)}, got {self.unit!r}")
        _amount(self.budget, 1.0)
        if self.unit == MS and self.tokens_per_call is None:
            raise ValueError(
                "--unit ms needs --tokens-per-call, such as --tokens-per-call 1,16,128"
            )
        if self.unit != MS and (self.tokens_per_call or self.formats):
            raise ValueError("--tokens-per-call and --formats go with --unit ms")
        if self.tokens_per_call:
            self._tokens()

    def allocation(self, by: str, model: nn.Module) -> Allocation:
        """The best choices within the budget.

        Raises:
            ValueError: if no choice keeps to the budget.
        """
        assert self.sensitivity is not None and self.budget is not None, "asked before"
        curves = read_sensitivity(self.sensitivity)
        if self.unit == MS:
            found = self._in_milliseconds(by, model, curves)
        else:
            costs = parameters(curves) if self.unit == "parameters" else nbytes(model, curves)
            found = BUDGETS[by](curves, costs, _amount(self.budget, costs.dense))
        if not found.by_grid:
            raise ValueError(f"--budget {self.budget} leaves every layer dense: give a smaller one")
        return found

    def _in_milliseconds(self, by: str, model: nn.Module, curves: Sensitivity) -> Allocation:
        """The same in time: for `budget` of the layers together, else of each on its own."""
        assert self.budget is not None, "asked before"
        tokens, formats = self._tokens(), self.formats.split(",") if self.formats else None
        if by != "budget":
            costs = milliseconds(model, curves, tokens, formats)
            return BUDGETS[by](curves, costs, _amount(self.budget, costs.dense))
        dense = dense_milliseconds(model, curves, tokens)
        budget = _amount(self.budget, dense)
        return allocate_milliseconds(model, curves, budget, tokens, formats, dense=dense)

    def _tokens(self) -> tuple[int, ...]:
        tokens = o.token_counts(self.tokens_per_call or "")
        if not isinstance(tokens, tuple):
            raise ValueError("--unit ms needs numbers of tokens alone, as --tokens-per-call 1,16")
        return tokens


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
