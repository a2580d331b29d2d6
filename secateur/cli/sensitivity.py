"""`secateur sensitivity`: how sensitive each layer is to pruning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor, nn

from secateur.allocation.sensitivity import sensitivity as measure
from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import emit, say, table
from secateur.cli.groups import Data, Loading
from secateur.cli.methods import criteria_by_name, find_criterion
from secateur.cli.quality import is_causal
from secateur.model.blocks import Batch
from secateur.model.evaluate import perplexity
from secateur.report import write_html

TRIED = ["unstructured:0.3", "unstructured:0.5", "unstructured:0.7", "2:4"]
# The model runs on all rows once for each layer and pattern.
FEW = Data(rows=16)


@command(kept="checkpoint")
def sensitivity(
    *,
    folder: o.Folder,
    patterns: Annotated[
        list[str], typer.Option("--pattern", "-p", help="A pattern to try; repeat it for more.")
    ] = TRIED,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the curves as JSON.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a report with the plots.", show_default=False)
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method", "-m", help=f"How weights are scored: {', '.join(criteria_by_name())}."
        ),
    ] = "magnitude",
    trust_code: o.TrustCode = False,
    layers: o.Layers = None,
    ignore: o.Ignore = None,
    data: Data = FEW,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Keep what is measured in this file, to go on there.", show_default=False
        ),
    ] = None,
    loading: Loading,
    full: o.Full = False,
    json: o.Json = False,
) -> None:
    """How much the loss rises when one layer alone is pruned, for each layer and pattern."""
    chosen = find_criterion(method, trust_code=trust_code)
    batches = data.read(folder)
    o.require_place(out, ".json")
    o.require_place(html, *o.HTML)
    model = loading.model(folder)
    if not is_causal(model):
        raise ValueError(
            f"sensitivity needs a language model, got a {type(model).__name__}: `secateur allocate "
            "--by erk` and `--by owl` make a plan without curves"
        )
    found = measure(
        model, patterns, lambda pruned: _loss(pruned, batches), layers=layers or None,
        ignore=ignore or (), criterion=chosen.function,
        batches=batches if chosen.needs else None, checkpoint=checkpoint,
    )  # fmt: skip
    if out is not None:
        found.write(out)
    if html is not None:
        write_html(html, title=f"Sensitivity of {folder.name}", sensitivity=found)
    if json:
        emit(found.to_dict())
        return
    table(found.columns, found.rows(), full=full)
    say(*(f"written to {target}" for target in (out, html) if target is not None))
    if out is not None:
        say(f"next: `secateur allocate {folder} --sensitivity {out} --budget 50% -o plan.yaml`")


def _loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    return perplexity(model, [batch for batch in batches if isinstance(batch, Tensor)]).nll
