"""`secateur stream`: `secateur prune` for a model larger than memory."""

from typing import Annotated

import typer

from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import emit, say, table
from secateur.cli.groups import Choice, Data, How
from secateur.cli.source import find_device
from secateur.files.stream import reconstruct_folder
from secateur.integrations.transformers import hollow


@command(kept="out")
def stream(
    *,
    folder: o.Folder,
    out: o.Output,
    choice: Choice,
    keep_zeros: o.KeepZeros = False,
    method: Annotated[
        str, typer.Option("--method", "-m", help="As for `secateur prune`.")
    ] = "sparsegpt",
    how: How,
    data: Data,
    device: o.Device = "auto",
    json: o.Json = False,
    full: o.Full = False,
) -> None:
    """Write a pruned model, of which one block at a time is in memory.

    The result is that of `secateur prune` in the stored dtype. Until it is there, the output folder
    holds finished layers: after an interruption or a kill the same command goes on.
    """
    chosen = how.method(method)
    plan = choice.for_model(hollow(folder))
    report = reconstruct_folder(
        folder,
        out,
        plan,
        chosen.function,
        data.read(folder),
        keep_zeros=keep_zeros,
        device=find_device(device),
    )
    if json:
        emit(report.to_dict())
    else:
        table(report.columns, report.rows(), full=full)
        say(f"{report.summary}; written to {out}")
