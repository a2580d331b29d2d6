"""`secateur stream`: reconstruction of a model larger than memory."""

from typing import Annotated

import typer

from secateur.cli import options as o
from secateur.cli.console import emit, failures, say, table
from secateur.cli.methods import find_method
from secateur.cli.source import Data, choose_plan, find_device


def stream(
    folder: o.Folder,
    out: o.Output,
    patterns: o.Patterns = None,
    plan: o.PlanFile = None,
    method: Annotated[
        str, typer.Option("--method", "-m", help="As for `secateur prune`, one that refits.")
    ] = "sparsegpt",
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="An option of the method, as damping=0.1; repeat it for more.", show_default=False
        ),
    ] = None,
    layers: o.Layers = None,
    ignore: o.Ignore = None,
    text: o.TextFile = None,
    tokens: o.TokenFile = None,
    rows: o.Rows = 128,
    length: o.Length = None,
    batch: o.Batch = 8,
    device: o.Device = "auto",
    json: o.Json = False,
    full: o.Full = False,
    debug: o.Debug = False,
) -> None:
    """Write a reconstructed model, of which one block at a time is in memory.

    The result is that of `secateur prune` in the stored dtype. Until it is there, the output folder
    holds finished layers: after an interruption or a kill the same command goes on.
    """
    with failures(debug, out):
        from secateur.files.stream import reconstruct_folder
        from secateur.integrations.transformers import hollow

        chosen = find_method(method, option or ())
        if not chosen.refits:
            raise ValueError(
                f"stream takes a method that refits, {method!r} only scores weights: use `secateur "
                "prune`, or --method sparsegpt"
            )
        decided = choose_plan(hollow(folder), patterns, plan, layers, ignore)
        batches = Data(text, tokens, rows, length, batch).read(folder)
        report = reconstruct_folder(
            folder, out, decided, chosen.function, batches, device=find_device(device)
        )
        if json:
            emit(report.to_dict())
        else:
            table(report.columns, report.rows(), full=full)
            say(f"{report.summary}; written to {out}")
