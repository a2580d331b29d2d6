"""`secateur prune`: zeros into a model on disk."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import caution, emit
from secateur.cli.groups import Choice, Data, HeldOut, How, Loading, Out
from secateur.cli.methods import ChosenMethod, method_help
from secateur.cli.quality import quality
from secateur.cli.source import Opened
from secateur.cli.summary import Summary, summarize
from secateur.formats import SparseLinear
from secateur.prune.verbs import check


@command(kept="checkpoint")
def prune(
    *,
    model: o.Model,
    out: Out,
    choice: Choice,
    keep_zeros: o.KeepZeros = False,
    method: Annotated[str, typer.Option("--method", "-m", help=method_help())] = "magnitude",
    how: How,
    data: Data,
    sample: o.Sample = 0,
    held_out: HeldOut,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Keep finished layers in this folder: the same command goes on where it stopped.",
            show_default=False,
        ),
    ] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep activations between blocks in CPU memory.")
    ] = False,
    loading: Loading,
    json: o.Json = False,
) -> None:
    """Write a pruned model: exact zeros by a pattern, in a folder that any loader reads.

    The result has the names, shapes and dtypes of the dense model. Zeros alone make nothing faster
    or smaller: `secateur bench` measures speed, and `secateur export --to packed` saves room.
    """
    chosen, eval_data = (
        how.method(method),
        held_out.beside(data),
    )
    _require_data(chosen, data, sample)
    out.require_writable()
    loading = loading.for_grid() if how.on_grid else loading
    source = loading.source(model)
    _require_runnable(source, bool(chosen.needs) or eval_data.given)
    plan = choice.for_model(source.model)
    batches = data.and_sampled(source.path, source.model, sample) if chosen.needs else None
    test = eval_data.read(source.path) if eval_data.given else []
    before = after = quality(source.model, None, test)
    report = chosen(
        source.model, plan, batches, keep_zeros=keep_zeros, offload=offload, checkpoint=checkpoint
    )
    check(source.model, plan)
    out.write(source, plan, [report])
    if test:
        after = quality(source.model, loading.model(source.path), test)
    summary = Summary(
        source, out.folder, plan, report, batches or [], before, after, eval_data.name, test
    )
    if json:
        emit(summary.to_dict())
    else:
        summarize(summary)


def _require_data(method: ChosenMethod, data: Data, sample: int) -> None:
    """Check that the method has the data it needs; data that it does not need is said on stderr."""
    if sample and not method.needs:
        raise ValueError(
            f"--sample {sample} needs a method that calibrates, {method.name!r} needs no data: "
            "leave --sample out, or use --method thorough"
        )
    if method.needs and not data.given:
        raise ValueError(
            f"method {method.name!r} needs calibration data ({', '.join(method.needs)}): give "
            "--text FILE or --tokens FILE:KEY, or use --method magnitude"
        )
    if data.given and not method.needs:
        data.require_readable()
        caution(f"{data.named} is not read: method {method.name!r} needs no data")


def _require_runnable(source: Opened, runs: bool) -> None:
    if any(isinstance(module, SparseLinear) for module in source.model.modules()):
        raise ValueError(
            f"{source.path} is in packed form, whose weights are frozen: write it with `secateur "
            "export --to dense` first"
        )
    if source.state_dict and runs:
        raise ValueError(
            f"{source.path} is a bare state dict, which cannot be run on data: name the model's "
            "folder, or use --method magnitude and no --eval-text or --eval-tokens"
        )
