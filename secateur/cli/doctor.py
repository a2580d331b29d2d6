"""`secateur doctor`: what this machine offers."""

from dataclasses import asdict
from typing import Annotated

import typer

from secateur.accelerate.doctor import digest
from secateur.accelerate.doctor import doctor as examine
from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import emit, say, table


@command()
def doctor(
    *,
    everything: Annotated[
        bool, typer.Option("--all", help="A line for every format and what can multiply it.")
    ] = False,
    json: o.Json = False,
) -> None:
    """What this machine offers: what runs here, what does not, and what to install for more."""
    findings = examine()
    if json:
        emit([asdict(finding) for finding in findings])
    elif everything:
        rows = [(f.capability, f.state, f.detail) for f in findings]
        table(("capability", "state", "detail"), rows)
    else:
        say(*(f"{what + ':':14}{told}" for what, told in digest(findings)))
        say("`secateur doctor --all` has a line for every format and what can multiply it")
