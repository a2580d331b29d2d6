"""`secateur recover`: kept weights trained while the zeros hold."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import emit, say, table
from secateur.cli.groups import Data, HeldOut, Out
from secateur.cli.quality import quality
from secateur.cli.source import open_folder, recorded_reports
from secateur.formats import unpack_
from secateur.integrations.transformers import CAUSAL_ENDINGS, class_name, read_config
from secateur.prune.verbs import check
from secateur.report.content import metric
from secateur.train.distil import distil_
from secateur.train.loss import WithTask

# Small steps are lost in 16 bits.
TRAINED = "float32"

TaskShare = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="How much the next tokens of the text itself count, beside what the dense model "
        "predicts. Papers take a third.",
    ),
]


@command(kept="checkpoint")
def recover(
    *,
    model: o.Folder,
    out: Out,
    teacher: Annotated[
        Path, typer.Option(help="The dense model's folder, to learn from.", show_default=False)
    ],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Of the optimizer.")] = 3e-4,
    data: Data,
    held_out: HeldOut,
    sample: o.Sample = 0,
    task_share: TaskShare = 0.0,
    seed: Annotated[int, typer.Option(help="Of the order of the batches.")] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Keep the progress in this folder, to go on there.", show_default=False),
    ] = None,
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """Train the kept weights to answer as the dense model does, while every zero holds.

    It trains in float32 and writes the dtype that the folder has.
    """
    eval_data = held_out.beside(data)
    _require_task(model, task_share)
    out.require_writable()
    plan, reports = recorded_reports(model)
    dense = open_folder(teacher, TRAINED, device).model
    batches = data.and_sampled(model, dense, sample)
    test = eval_data.read(model) if eval_data.given else []
    source = open_folder(model, TRAINED, device)
    unpack_(source.model)  # packed weights are frozen
    student = source.model
    before = quality(student, dense, test)
    report = distil_(
        student, dense, batches, steps=steps, learning_rate=learning_rate, seed=seed,
        checkpoint=checkpoint, loss=WithTask(task_share) if task_share else None,
    )  # fmt: skip
    if plan is not None:
        check(student, plan)
    out.write(source, plan, [*reports, report])
    after = quality(student, dense, test)
    if json:
        where = str(out.folder)
        emit({"report": report.to_dict(), "before": before, "after": after, "output": where})
        return
    table(report.columns, report.rows())
    if test:
        shown = [(n, *(metric(n).text.format(v) for v in (before[n], after[n]))) for n in before]
        table(("", "before", "after"), shown)
    say(f"written to {out.folder}" + ("; every zero of the plan checked" if plan else ""))


def _require_task(folder: Path, share: float) -> None:
    name = class_name(read_config(folder), folder)
    if share and not name.endswith(CAUSAL_ENDINGS):
        raise ValueError(
            f"--task-share {share:g} needs a model that predicts the next token, {name} does not: "
            "leave it out"
        )
