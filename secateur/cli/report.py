"""`secateur report`: what pruning changed, cost and gained, as a page."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from secateur.accelerate.verb import accelerate_
from secateur.allocation.sensitivity import read_sensitivity
from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import caution, say
from secateur.cli.groups import Data
from secateur.cli.packing import packed_size
from secateur.cli.quality import names_of, quality, require_one_tokenizer
from secateur.cli.source import (
    AUTO,
    STORED,
    Recorded,
    bytes_of,
    model_files,
    open_folder,
    prune_reports,
    recorded_reports,
)
from secateur.model.blocks import Batch
from secateur.model.plan import Plan
from secateur.prune.verbs import PruneReport
from secateur.report import write_html

HELD_OUT = Data(rows=64)
NOT_MEASURED = "Speed was not measured for this page: zeros alone are not faster."

# What each folder's secateur.json has, by the folder's name on the page.
Saved = Mapping[str, tuple[Plan | None, list[Recorded]]]


@command()
def report(
    *,
    folders: o.Folders,
    out: Annotated[Path, typer.Option("--output", "-o", help="The .html file to write.")] = Path(
        "report.html"
    ),
    baseline: o.Baseline = None,
    data: Data = HELD_OUT,
    sensitivity: Annotated[
        Path | None,
        typer.Option(help="Curves that `secateur sensitivity -o` wrote.", show_default=False),
    ] = None,
    tokens_per_call: o.TokensPerCall = None,
    title: Annotated[str | None, typer.Option(help="The page's title.", show_default=False)] = None,
    device: o.Device = "auto",
) -> None:
    """Write one HTML file: accuracy, zeros, mask pictures, errors, speed, sizes and the plan.

    Accuracy is measured if --text or --tokens is given, speed if --tokens-per-call is. Several
    folders are compared by accuracy, errors and sizes.
    """
    o.require_place(out, *o.HTML)
    names = names_of(folders)
    counts = o.token_counts(tokens_per_call) if tokens_per_call else None
    if counts and len(folders) > 1:
        raise ValueError(
            f"--tokens-per-call needs one folder, got {len(folders)}: measure them one by one"
        )
    curves = read_sensitivity(sensitivity) if sensitivity is not None else None
    require_one_tokenizer([*folders, *([] if baseline is None else [baseline])], data)
    batches = data.read(folders[0]) if data.given else []
    saved = {name: recorded_reports(folder) for folder, name in names.items()}
    evaluations = _evaluations(names, baseline, batches, device) if batches else {}
    if batches and not evaluations:
        caution(f"{data.named} is not read: this model has no perplexity, give --baseline DENSE")
    measured = None
    if counts:
        measured = accelerate_(open_folder(folders[0], STORED, device).model, counts)
    sizes, model = _sizes(names, baseline, saved, device)
    write_html(
        out,
        title=title or " and ".join(names.values()),
        plan=_common_plan(saved),
        prune=_prune_reports(saved),
        evaluations=evaluations,
        accelerate=measured,
        sensitivity=curves,
        model=model,
        sizes=sizes,
        notes=() if measured else (NOT_MEASURED,),
    )
    say(f"written to {out}")


def _common_plan(saved: Saved) -> Plan | None:
    """The plan that all folders share."""
    plans = [plan for plan, _ in saved.values()]
    return plans[0] if plans.count(plans[0]) == len(plans) else None


def _prune_reports(saved: Saved) -> list[PruneReport]:
    """What pruned the folders; of several folders, each report bears its folder's name."""
    return [
        replace(found, method=f"{name}: {found.method}") if len(saved) > 1 else found
        for name, (_, recorded) in saved.items()
        for found in prune_reports(recorded)
    ]


def _evaluations(
    names: Mapping[Path, str], baseline: Path | None, batches: list[Batch], device: str
) -> dict[str, dict[str, float]]:
    """The measures of the models and their baseline, by name; models without any are left out."""
    dense = None if baseline is None else open_folder(baseline, AUTO, device).model
    found = {} if dense is None else {"dense": quality(dense, None, batches)}
    for folder, name in names.items():
        found[name] = quality(open_folder(folder, AUTO, device).model, dense, batches)
    return {who: measures for who, measures in found.items() if measures}


def _sizes(
    names: Mapping[Path, str], baseline: Path | None, saved: Saved, device: str
) -> tuple[dict[str, int], nn.Module | None]:
    """Bytes of each folder's weights, and packed; and the model, if there is one folder."""
    sizes, model = dict[str, int](), None
    if baseline is not None:
        sizes["dense"] = bytes_of(model_files(baseline))
    for folder, name in names.items():
        source = open_folder(folder, STORED, device)
        sizes[name] = source.size
        packed = packed_size(source.model, saved[name][0], source.size)
        if packed is not None:
            sizes[f"{name}, if packed"] = packed
        model = source.model if len(names) == 1 else None
    return sizes, model
