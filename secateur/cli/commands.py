"""All commands, in the order in which the help shows them."""

from typing import Annotated

import typer

from secateur.cli.accelerate import accelerate
from secateur.cli.allocate import allocate
from secateur.cli.bench import bench
from secateur.cli.check import check
from secateur.cli.demo import demo
from secateur.cli.doctor import doctor
from secateur.cli.eval import evaluate
from secateur.cli.export import export
from secateur.cli.generate import generate
from secateur.cli.inspect import inspect
from secateur.cli.migrate import migrate
from secateur.cli.plan import plan
from secateur.cli.prune import prune
from secateur.cli.recover import recover
from secateur.cli.report import report
from secateur.cli.sensitivity import sensitivity
from secateur.cli.serve import serve
from secateur.cli.shrink import shrink
from secateur.cli.stream import stream
from secateur.cli.tune import tune

LOOK, WORK, MEASURE, RUN, SHOW = "Look", "Prune", "Measure", "Run", "Show"

app = typer.Typer(
    name="secateur",
    help="Find sparse weights and make them fast.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)


def _version(wanted: bool) -> bool:
    if wanted:
        from secateur.core.version import VERSION

        typer.echo(f"secateur {VERSION}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Find sparse weights and make them fast."""


app.command(rich_help_panel=LOOK)(doctor)
app.command(rich_help_panel=LOOK)(inspect)
app.command(rich_help_panel=WORK)(plan)
app.command(rich_help_panel=WORK)(allocate)
app.command(rich_help_panel=WORK)(prune)
app.command(rich_help_panel=WORK)(stream)
app.command(rich_help_panel=WORK)(shrink)
app.command(rich_help_panel=WORK)(recover)
app.command(rich_help_panel=WORK)(export)
app.command(rich_help_panel=WORK)(migrate)
app.command(rich_help_panel=MEASURE)(check)
app.command("eval", rich_help_panel=MEASURE)(evaluate)
app.command(rich_help_panel=MEASURE)(sensitivity)
app.command(rich_help_panel=MEASURE)(bench)
app.command(rich_help_panel=MEASURE)(tune)
app.command(rich_help_panel=RUN)(accelerate)
app.command(rich_help_panel=RUN)(generate)
app.command(rich_help_panel=RUN)(serve)
app.command(rich_help_panel=SHOW)(report)
app.command(rich_help_panel=SHOW)(demo)
