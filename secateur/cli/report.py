"""`secateur report` and `secateur demo`: what is shown as a page."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options as o
from secateur.cli.console import caution, failures, say
from secateur.cli.measure import (
    HTML,
    Baseline,
    TokensPerCall,
    names_of,
    require_one_tokenizer,
    require_place,
    token_counts,
)
from secateur.cli.packing import packed_size
from secateur.cli.quality import quality
from secateur.cli.recorded import prune_reports, recorded_reports
from secateur.cli.source import AUTO, STORED, Data, model_files, open_folder
from secateur.model.blocks import Batch

NOT_MEASURED = "Speed was not measured for this page: zeros alone are not faster."


def report(
    folders: o.Folders,
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

    Accuracy is measured if --text or --tokens is given, speed if --tokens-per-call is. Several
    folders are compared by accuracy, errors and sizes.
    """
    with failures(debug):
        from secateur.accelerate.verb import accelerate_
        from secateur.allocation.sensitivity import read_sensitivity
        from secateur.report import write_html

        require_place(out, *HTML)
        names = names_of(folders)
        counts = token_counts(tokens_per_call) if tokens_per_call else None
        if counts and len(folders) > 1:
            raise ValueError(
                f"--tokens-per-call needs one folder, got {len(folders)}: measure them one by one"
            )
        curves = read_sensitivity(sensitivity) if sensitivity is not None else None
        data = Data(text, tokens, rows, length, batch)
        require_one_tokenizer([*folders, *([] if baseline is None else [baseline])], data)
        batches = data.read(folders[0]) if data.given else []
        saved = {name: recorded_reports(folder) for folder, name in names.items()}
        plans = [plan for plan, _ in saved.values()]
        plan = plans[0] if plans.count(plans[0]) == len(plans) else None
        pruned = [
            replace(found, method=f"{name}: {found.method}") if len(folders) > 1 else found
            for name, (_, recorded) in saved.items()
            for found in prune_reports(recorded)
        ]
        evaluations = _evaluations(names, baseline, batches, device) if batches else {}
        if batches and not evaluations:
            caution(
                f"{data.named} is not read: this model has no perplexity, give --baseline DENSE"
            )
        measured, model = None, None
        if counts:
            measured = accelerate_(open_folder(folders[0], STORED, device).model, counts)
        sizes = {}
        if baseline is not None:
            sizes["dense"] = sum(f.stat().st_size for f in model_files(baseline))
        for folder, name in names.items():
            source = open_folder(folder, STORED, device)
            sizes[name] = source.size
            packed = packed_size(source.model, saved[name][0], source.size)
            if packed is not None:
                sizes[f"{name}, if packed"] = packed
            model = source.model if len(folders) == 1 else None
        write_html(
            out,
            title=title or " and ".join(names.values()),
            plan=plan,
            prune=pruned,
            evaluations=evaluations,
            accelerate=measured,
            sensitivity=curves,
            model=model,
            sizes=sizes,
            notes=() if measured else (NOT_MEASURED,),
        )
        say(f"written to {out}")


def _evaluations(
    names: Mapping[Path, str], baseline: Path | None, batches: list[Batch], device: str
) -> dict[str, dict[str, float]]:
    """The measures of the models and of their baseline, by name; only those that there are."""
    dense = None if baseline is None else open_folder(baseline, AUTO, device).model
    found = {} if dense is None else {"dense": quality(dense, None, batches)}
    for folder, name in names.items():
        found[name] = quality(open_folder(folder, AUTO, device).model, dense, batches)
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
        from secateur.cli.demo import run

        run(out, model)
