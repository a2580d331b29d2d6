"""What a format for each layer is chosen by, and how the choice is shown."""

from dataclasses import dataclass
from typing import Annotated

import typer
from torch import nn

from secateur.accelerate.choices import Policy
from secateur.accelerate.report import AccelerateReport
from secateur.accelerate.verb import accelerate_
from secateur.cli import options as o
from secateur.cli.console import say, table
from secateur.cli.wording import in_options
from secateur.model.layers import select

# The columns without --full.
SHOWN = ("layer", "tokens", "runs", "eager us", "prepacked us", "sparse us")


@dataclass(frozen=True)
class Choice:
    """What a format for each layer is chosen by."""

    tokens_per_call: o.TokensPerCall = "1,16,128"
    formats: o.Formats = None
    layers: o.Layers = None
    policy: Annotated[
        Policy,
        typer.Option(
            help="memory: each weight is held once; fastest: further copies may be held where "
            "they make it faster."
        ),
    ] = "memory"

    def require_valid(self) -> None:
        """Raise ValueError if the numbers of tokens are none, before a model is loaded."""
        o.token_counts(self.tokens_per_call or "")

    def made_for(self, model: nn.Module, strict: bool = False) -> AccelerateReport:
        """What `accelerate_` chose for the model, which it has changed, by new measurements."""
        counts = o.token_counts(self.tokens_per_call or "")
        tried = self.formats.split(",") if self.formats else None
        chosen = list(select(model, self.layers).layers) if self.layers else None
        return accelerate_(model, counts, tried, chosen, strict, self.policy, remeasure=True)


BY_DEFAULT = Choice()


def show_choices(report: AccelerateReport, full: bool) -> None:
    """What was measured, what runs, and why; without `full`, one line for layers that are alike."""
    columns, measured = report.columns, report.rows()
    if not full:  # the rest makes it wider than a terminal
        columns, places = SHOWN, [report.columns.index(name) for name in SHOWN]
        measured = [tuple(row[i] for i in places) for row in report.distinct_rows()]
    table(columns, measured, full=full)
    why: dict[tuple[str, str], list[str]] = {}
    for layer in report.layers:
        why.setdefault((layer.format, layer.reason), []).append(layer.layer)
    rows = [(runs, str(len(names)), in_options(told)) for (runs, told), names in why.items()]
    table(("runs", "layers", "why"), rows)
    say(f"measured on {report.device}, {report.threads} threads", report.headline)
    say(
        *map(
            in_options, filter(None, (report.coverage, report.advice, report.given_up, report.gain))
        )
    )
