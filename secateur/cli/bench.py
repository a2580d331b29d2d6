"""`secateur bench`: every layer timed on this machine, dense and sparse."""

from typing import Annotated

import typer

from secateur.accelerate.choices import Policy
from secateur.accelerate.report import AccelerateReport
from secateur.accelerate.verb import accelerate_
from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import emit, say, table
from secateur.cli.groups import Loading
from secateur.cli.source import STORED
from secateur.cli.wording import in_options
from secateur.model.layers import select

# The columns without --full.
SHOWN = ("layer", "tokens", "runs", "eager us", "prepacked us", "sparse us")
# Speed is measured in the dtype that the model is used in.
AS_STORED = Loading(dtype=STORED)


@command()
def bench(
    *,
    folder: o.Folder,
    tokens_per_call: o.TokensPerCall = "1,16,128",
    formats: Annotated[
        str | None,
        typer.Option(
            help="Formats to try, separated by commas: semi24,block:64x64,bitmap,csr; "
            "semi24_int4,semi24_int8,semi24_fp8 also round weights; semi24_int8_dynamic,"
            "semi24_fp8_dynamic,int8_dynamic,fp8_dynamic (the last two dense) inputs, too.",
            show_default=False,
        ),
    ] = None,
    layers: o.Layers = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail if no layer is faster sparse.")
    ] = False,
    policy: Annotated[
        Policy,
        typer.Option(
            help="memory: each weight is held once; fastest: further copies may be held where "
            "they make it faster."
        ),
    ] = "memory",
    loading: Loading = AS_STORED,
    full: o.Full = False,
    json: o.Json = False,
) -> None:
    """Measure every layer dense and sparse on this machine, at each number of tokens a call.

    No model is written. The measurements are kept for this machine, and `sc.accelerate_` makes the
    same choice from them where the model is used.
    """
    counts = o.token_counts(tokens_per_call or "")
    tried = formats.split(",") if formats else None
    model = loading.model(folder)
    chosen = list(select(model, layers).layers) if layers else None
    report = accelerate_(model, counts, tried, chosen, strict, policy, remeasure=True)
    if json:
        emit(report.to_dict())
    else:
        _show(report, full)


def _show(report: AccelerateReport, full: bool) -> None:
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
