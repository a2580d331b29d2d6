"""The verbs that write a model again: `recover` and `export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from secateur.cli import options as o
from secateur.cli.console import emit, failures, say, table, working
from secateur.cli.packing import formats_for, slower_here
from secateur.cli.quality import quality
from secateur.cli.recorded import recorded_reports
from secateur.cli.source import Data, model_files, open_folder
from secateur.prune.verbs import check
from secateur.report.content import as_bytes, metric

# Small steps are lost in 16 bits.
TRAINED = "float32"


def recover(
    folder: o.Folder,
    out: o.Output,
    teacher: Annotated[
        Path, typer.Option(help="The dense model's folder, to learn from.", show_default=False)
    ],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Of the optimizer.")] = 3e-4,
    text: o.TextFile = None,
    tokens: o.TokenFile = None,
    rows: o.Rows = 128,
    length: o.Length = None,
    batch: o.Batch = 8,
    eval_text: o.EvalText = None,
    eval_tokens: o.EvalTokens = None,
    eval_rows: o.EvalRows = 64,
    seed: Annotated[int, typer.Option(help="Of the order of the batches.")] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Keep the progress in this folder, to go on there.", show_default=False),
    ] = None,
    device: o.Device = "auto",
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Train the kept weights to answer as the dense model does, while every zero holds.

    It trains in float32 and writes the dtype that the folder has.
    """
    with failures(debug, checkpoint):
        from secateur.files.save import require_writable
        from secateur.formats import unpack_
        from secateur.train.distil import distil_

        data = Data(text, tokens, rows, length, batch)
        held_out = Data(eval_text, eval_tokens, eval_rows, length, batch, "--eval-")
        require_writable(out, overwrite=overwrite)
        plan, reports = recorded_reports(folder)
        batches = data.read(folder)
        test = held_out.read(folder) if held_out.given else []
        source = open_folder(folder, TRAINED, device)
        unpack_(source.model)  # packed weights are frozen
        student, dense = source.model, open_folder(teacher, TRAINED, device).model
        before = quality(student, dense, test)
        report = distil_(
            student, dense, batches, steps=steps, learning_rate=learning_rate, seed=seed,
            checkpoint=checkpoint,
        )  # fmt: skip
        if plan is not None:
            check(student, plan)
        with working(f"writing {out}"):
            source.write(out, plan=plan, reports=[*reports, report], overwrite=overwrite)
        after = quality(student, dense, test)
        if json:
            emit({"report": report.to_dict(), "before": before, "after": after, "output": str(out)})
            return
        table(report.columns, report.rows())
        if test:
            shown = [
                (n, metric(n).text.format(v), metric(n).text.format(after[n]))
                for n, v in before.items()
            ]
            table(("", "before", "after"), shown)
        say(f"written to {out}" + ("; every zero of the plan checked" if plan else ""))


def export(
    folder: o.Folder,
    out: o.Output,
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
            help="semi24, block:64x64, bitmap or csr for packed; semi24_int4, semi24_int8 or "
            "semi24_fp8 to round weights too, with _dynamic behind the last two, or alone as "
            "int8_dynamic or fp8_dynamic (dense), inputs as well; default: what fits the plan.",
            show_default=False,
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Write a pruned model in another form: dense for every loader, or packed to save room."""
    with failures(debug):
        from secateur.files.save import require_writable
        from secateur.formats import pack_, unpack_

        if to == "dense" and format is not None:
            raise ValueError("--format goes with --to packed: the dense form has one format")
        require_writable(out, overwrite=overwrite)
        source = open_folder(folder)
        plan, reports = recorded_reports(folder)
        unpack_(source.model)
        rounded, slower = 0.0, list[str]()
        if to == "packed":
            for name, layers in formats_for(source.model, plan, format).items():
                report = pack_(source.model, name, layers=layers)
                rounded = max(rounded, report.weight_error)
            slower = slower_here(source.model)
        with working(f"writing {out}"):
            source.write(out, plan=plan, reports=reports, overwrite=overwrite)
        written = sum(file.stat().st_size for file in model_files(out))
        if json:
            emit({"output": str(out), "form": to, "bytes": [source.size, written]})
        else:
            before = as_bytes(source.size)
            say(f"{to} form written to {out}: {as_bytes(written)}, {folder} has {before}")
            if rounded:
                say(f"{format} rounds weights: those of a layer are off by up to {rounded:.1%}")
            if to == "packed":
                say(*slower, "it loads with sc.load")
