"""`secateur plan`: which layers would get which pattern."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import emit, left_alone, say, table
from secateur.cli.groups import Choice
from secateur.cli.source import open_source


@command()
def plan(
    *,
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
) -> None:
    """Which layers would get which pattern, and which are left alone and why.

    The file can be edited and given to `secateur prune --plan`.
    """
    if not patterns:
        raise ValueError("a plan needs --pattern, such as --pattern 2:4")
    source = open_source(model)
    decided = Choice(patterns, None, layers, ignore).for_model(source.model)
    if out is not None:
        decided.write(out)
    if json:
        emit(decided.to_dict())
        return
    if source.state_dict is None:
        say(decided.coverage)
    table(decided.columns, decided.rows(), full=full)
    say(f"{len(decided.layers)} layers, {decided.weights:,} weights")
    say(*left_alone({**decided.skipped, **source.left_alone}))
    if out is not None:
        say(f"written to {out}")
