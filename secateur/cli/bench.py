"""`secateur bench`: every layer timed on this machine, dense and sparse."""

from typing import Annotated

import typer

from secateur.cli import options as o
from secateur.cli.choices import BY_DEFAULT, Choice, show_choices
from secateur.cli.command import command
from secateur.cli.console import emit
from secateur.cli.groups import Loading
from secateur.cli.source import STORED

# Speed is measured in the dtype that the model is used in.
AS_STORED = Loading(dtype=STORED)


@command()
def bench(
    *,
    folder: o.Folder,
    choice: Choice = BY_DEFAULT,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail if no layer is faster sparse.")
    ] = False,
    loading: Loading = AS_STORED,
    full: o.Full = False,
    json: o.Json = False,
) -> None:
    """Measure every layer dense and sparse on this machine, at each number of tokens a call.

    No model is written; `secateur accelerate` writes it. The measurements are kept for this
    machine, and `sc.accelerate_` makes the same choice from them where the model is used.
    """
    choice.require_valid()
    report = choice.made_for(loading.model(folder), strict)
    if json:
        emit(report.to_dict())
    else:
        show_choices(report, full)
