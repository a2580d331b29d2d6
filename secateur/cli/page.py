"""`secateur report` and `secateur demo`: what is shown as a page."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options as o
from secateur.cli.console import failures, say
from secateur.cli.measure import Baseline, TokensPerCall, require_place, token_counts
from secateur.cli.quality import quality
from secateur.cli.recorded import prune_reports, recorded_reports
from secateur.cli.source import AUTO, STORED, Data, model_files, open_folder
from secateur.replay import Batch

NOT_MEASURED = "Speed was not measured for this page: zeros alone are not faster."


def report(
    folder: o.Folder,
    out: Annotated[Path, typer.Option("--output", "-o", help="The .html file to write.")] = Path(
        "report.html"
    ),
    baseline: Baseline = None,
    text: o.TextFile = None,
    tokens: o.TokenFile = None,
    rows: o.Rows = 64,
    length: o.Length = None,
    batch: o.Batch = 8,
    sensitivity: Annotated[
        Path | None,
        typer.Option(help="Curves that `secateur sense -o` wrote.", show_default=False),
    ] = None,
    tokens_per_call: TokensPerCall = None,
    title: Annotated[str | None, typer.Option(help="The page's title.", show_default=False)] = None,
    device: o.Device = "auto",
    debug: o.Debug = False,
) -> None:
    """Write one HTML file: accuracy, zeros, mask pictures, errors, speed, sizes and the plan.

    Accuracy is measured if --text or --tokens is given, speed if --tokens-per-call is.
    """
    with failures(debug):
        from secateur.accelerate import accelerate_
        from secateur.allocation.sensitivity import read_sensitivity
        from secateur.report import write_html

        require_place(out)
        counts = token_counts(tokens_per_call) if tokens_per_call else None
        curves = read_sensitivity(sensitivity) if sensitivity is not None else None
        data = Data(text, tokens, rows, length, batch)
        batches = data.read(folder) if data.given else []
        plan, recorded = recorded_reports(folder)
        evaluations = _evaluations(folder, baseline, batches, device) if batches else {}
        measured = None
        if counts:
            measured = accelerate_(open_folder(folder, STORED, device).model, counts)
        source = open_folder(folder, STORED, device)
        sizes = {folder.name: source.size}
        if baseline is not None:
            sizes = {"dense": sum(f.stat().st_size for f in model_files(baseline)), **sizes}
        write_html(
            out,
            title=title or folder.name,
            plan=plan,
            prune=prune_reports(recorded),
            evaluations=evaluations,
            accelerate=measured,
            sensitivity=curves,
            model=source.model,
            sizes=sizes,
            notes=() if measured else (NOT_MEASURED,),
        )
        say(f"written to {out}")


def _evaluations(
    folder: Path, baseline: Path | None, batches: list[Batch], device: str
) -> dict[str, dict[str, float]]:
    """The measures of the model and of its baseline, by name; only those that there are."""
    model = open_folder(folder, AUTO, device).model
    dense = None if baseline is None else open_folder(baseline, AUTO, device).model
    found = {folder.name: quality(model, dense, batches)}
    if dense is not None:
        found = {"dense": quality(dense, None, batches), **found}
    return {who: measures for who, measures in found.items() if measures}


def demo(
    out: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")] = Path(
        "demo"
    ),
    model: Annotated[
        Path | None,
        typer.Option(
            help="A language model's folder with a tokens.safetensors; default: a small encoder.",
            show_default=False,
        ),
    ] = None,
    debug: o.Debug = False,
) -> None:
    """The whole job on a small model: prune, evaluate, recover, pack, measure, and a report."""
    with failures(debug):
        from secateur.demo import run

        run(out, model)
