"""`secateur prune`: zeros into a model on disk."""

from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from secateur.cli import options as o
from secateur.cli.console import caution, emit, failures, working
from secateur.cli.methods import Method, find_method, method_help
from secateur.cli.quality import quality
from secateur.cli.source import AUTO, Data, Source, choose_plan, open_folder, open_source
from secateur.cli.summary import Summary, summarize
from secateur.formats import SparseLinear
from secateur.model.blocks import Batch
from secateur.prune.verbs import check


def prune(
    model: o.Model,
    out: o.Output,
    patterns: o.Patterns = None,
    plan: o.PlanFile = None,
    method: Annotated[str, typer.Option("--method", "-m", help=method_help())] = "magnitude",
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="An option of the method, as damping=0.1; repeat it for more.", show_default=False
        ),
    ] = None,
    layers: o.Layers = None,
    ignore: o.Ignore = None,
    text: o.TextFile = None,
    tokens: o.TokenFile = None,
    rows: o.Rows = 128,
    length: o.Length = None,
    batch: o.Batch = 8,
    sample: Annotated[
        int,
        typer.Option(
            min=0,
            help="Rows more that the dense language model writes itself, for methods that need "
            "data: little text then goes far.",
            rich_help_panel=o.DATA,
        ),
    ] = 0,
    eval_text: o.EvalText = None,
    eval_tokens: o.EvalTokens = None,
    eval_rows: o.EvalRows = 64,
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
    dtype: o.Dtype = AUTO,
    device: o.Device = "auto",
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Write a pruned model: exact zeros by a pattern, in a folder that any loader reads.

    The result has the names, shapes and dtypes of the dense model. Zeros alone make nothing faster
    or smaller: `secateur bench` measures speed, and `secateur export --to packed` saves room.
    """
    with failures(debug, checkpoint):
        from secateur.files.save import require_writable

        chosen = find_method(method, option or ())
        data = Data(text, tokens, rows, length, batch)
        held_out = Data(eval_text, eval_tokens, eval_rows, length, batch, "--eval-")
        _require_data(chosen, data, sample)
        if data.given and not chosen.needs:
            data.require()
            caution(f"{data.named} is not read: method {chosen.name!r} needs no data")
        require_writable(out, overwrite=overwrite)
        source = open_source(model, dtype, device)
        _require_runnable(source, bool(chosen.needs) or held_out.given)
        decided = choose_plan(source.model, patterns, plan, layers, ignore)
        batches = _calibration(source, data, sample) if chosen.needs else None
        test = held_out.read(source.path) if held_out.given else []
        before = quality(source.model, None, test)
        report = chosen(source.model, decided, batches, offload=offload, checkpoint=checkpoint)
        check(source.model, decided)
        with working(f"writing {out}"):
            source.write(out, plan=decided, reports=[report], overwrite=overwrite)
        after = before
        if test:
            dense = open_folder(source.path, dtype, device).model
            after = quality(source.model, dense, test)
        summary = Summary(
            source, out, decided, report, batches or [], before, after, held_out, test
        )
        if json:
            emit(summary.to_dict())
        else:
            summarize(summary)


def _calibration(source: Source, data: Data, sample: int) -> list[Batch]:
    """The batches read, and `sample` rows that the model wrote after them."""
    from secateur.integrations.tokens import sampled_rows

    batches = data.read(source.path)
    if not sample:
        return batches
    ids = [batch for batch in batches if isinstance(batch, Tensor)]
    return [*batches, *sampled_rows(source.model, ids, sample)]


def _require_data(method: Method, data: Data, sample: int) -> None:
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


def _require_runnable(source: Source, runs: bool) -> None:
    if any(isinstance(module, SparseLinear) for module in source.model.modules()):
        raise ValueError(
            f"{source.path} is in packed form, whose weights are frozen: write it with `secateur "
            "export --to dense` first"
        )
    if source.bare and runs:
        raise ValueError(
            f"{source.path} is a bare state dict, which cannot be run on data: name the model's "
            "folder, or use --method magnitude and no --eval-text or --eval-tokens"
        )
