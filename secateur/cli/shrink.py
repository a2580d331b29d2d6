"""`secateur shrink`: a model with fewer heads, hidden units, experts or blocks."""

from typing import Annotated

import typer

from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import emit, say, table
from secateur.cli.groups import Data, HeldOut, Loading, Out
from secateur.cli.methods import find_criterion
from secateur.cli.quality import quality
from secateur.prune.shrink import shrink_
from secateur.report.content import metric


@command()
def shrink(
    *,
    model: o.Folder,
    out: Out,
    width: Annotated[
        float, typer.Option(help="The share of an MLP's hidden units that goes, as 0.25.")
    ] = 0.0,
    heads: Annotated[
        float,
        typer.Option(help="The share of heads that goes; with grouped queries, of their groups."),
    ] = 0.0,
    experts: Annotated[
        float, typer.Option(help="The share of each mixture's experts that goes.")
    ] = 0.0,
    blocks: Annotated[float, typer.Option(help="The share of whole blocks that goes.")] = 0.0,
    method: Annotated[
        str, typer.Option("--method", "-m", help="A criterion: which units and heads go.")
    ] = "wanda",
    refit: Annotated[
        bool, typer.Option(help="Refit the layers that read what goes on what is left.")
    ] = True,
    data: Data,
    held_out: HeldOut,
    loading: Loading,
    json: o.Json = False,
) -> None:
    """Write a physically smaller model, which transformers loads as any other.

    Shapes shrink, config.json says the new sizes, and the model has to return the same when it is
    made anew from them. What a config cannot say is refused.
    """
    criterion, eval_data = find_criterion(method), held_out.beside(data)
    out.require_writable()
    batches = data.read(model)
    test = eval_data.read(model) if eval_data.given else []
    source = loading.source(str(model))
    before = quality(source.model, None, test)
    report = shrink_(
        source.model, batches, width=width, heads=heads, experts=experts, blocks=blocks,
        criterion=criterion.function, refit=refit,
    )  # fmt: skip
    out.write(source, None, [report])
    after = quality(source.model, loading.model(model), test)
    if json:
        where = str(out.folder)
        emit({"report": report.to_dict(), "before": before, "after": after, "output": where})
        return
    table(report.columns, report.rows())
    if test:
        shown = [(n, *(metric(n).text.format(v) for v in (before[n], after[n]))) for n in before]
        table(("", "before", "after"), shown)
    say(report.summary, f"written to {out.folder}")
