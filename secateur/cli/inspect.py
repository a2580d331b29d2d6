"""`secateur inspect`: the layers of a model and their zeros."""

from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import emit, left_alone, say, table, working
from secateur.cli.source import open_source
from secateur.report.inspection import inspect as examine
from secateur.report.rows import without_empty


@command()
def inspect(*, model: o.Model, full: o.Full = False, json: o.Json = False) -> None:
    """The layers of a model: shapes, zeros, which patterns they hold or cannot hold."""
    source = open_source(model)
    with working("counting zeros"):
        found = examine(source.model)
    reasons = {layer.layer: layer.skipped for layer in found.layers if layer.skipped}
    reasons |= source.left_alone
    if json:
        emit({**found.to_dict(), "left_alone": reasons})
        return
    # The reasons are sentences: below the table they do not make it too wide.
    rows = [row[:-1] for row in found.rows()]
    table(*without_empty(found.columns[:-1], rows), full=full)
    say(found.summary, *left_alone(reasons))
