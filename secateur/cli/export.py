"""`secateur export`: a pruned model in another form."""

from typing import Annotated, Literal

import typer

from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import emit, say
from secateur.cli.groups import Out
from secateur.cli.packing import formats_for, slower_here
from secateur.cli.source import bytes_of, model_files, open_folder, recorded_reports
from secateur.core.tables import as_bytes
from secateur.formats import pack_, unpack_
from secateur.formats.pack import packed_share


@command()
def export(
    *,
    model: o.Folder,
    out: Out,
    to: Annotated[
        Literal["dense", "packed"],
        typer.Option(
            help="dense: zeros among the weights, for any loader; packed: smaller, for sc.load.",
            show_default=False,
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            help="semi24, semi48, block:64x64, bitmap or csr for packed; semi24_int4, semi48_int4, "
            "bitmap_int4, semi24_int8 or semi24_fp8 to round weights too, int4 or int8 to round "
            "dense ones, head and all; with _dynamic behind int8 or fp8 inputs as well; default: "
            "what fits the plan.",
            show_default=False,
        ),
    ] = None,
    json: o.Json = False,
) -> None:
    """Write a pruned model in another form: dense for every loader, or packed to save room."""
    if to == "dense" and format is not None:
        raise ValueError("--format goes with --to packed: the dense form has one format")
    out.require_writable()
    source = open_folder(model)
    plan, reports = recorded_reports(model)
    unpack_(source.model)
    rounded, slower = 0.0, list[str]()
    if to == "packed":
        for name, layers in formats_for(source.model, plan, format).items():
            report = pack_(source.model, name, layers=layers)
            rounded = max(rounded, report.weight_error)
        slower = slower_here(source.model)
    out.write(source, plan, reports)
    written = bytes_of(model_files(out.folder))
    if json:
        emit({"output": str(out.folder), "form": to, "bytes": [source.size, written]})
        return
    before = as_bytes(source.size)
    say(f"{to} form written to {out.folder}: {as_bytes(written)}, {model} has {before}")
    if rounded:
        say(f"{format} rounds weights: those of a layer are off by up to {rounded:.1%}")
    if to == "packed":
        say(packed_share(source.model), *slower, "it loads with sc.load")
