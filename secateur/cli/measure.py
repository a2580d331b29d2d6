"""The verbs that measure: `eval`, `sense` and `bench`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor, nn

from secateur.cli import options as o
from secateur.cli.console import emit, failures, say, table
from secateur.cli.methods import criteria_by_name, find_criterion
from secateur.cli.quality import gives_hidden_states, is_causal, quality, tokens_in
from secateur.cli.source import AUTO, STORED, Data, open_folder
from secateur.cli.wording import in_options
from secateur.model.blocks import Batch
from secateur.model.layers import select
from secateur.report.content import metric

# The columns of `bench` without --full.
SHOWN = ("layer", "tokens", "runs", "eager us", "prepacked us", "sparse us")
# Patterns that `sense` tries unless others are named, and the endings of a page's name.
TRIED = ["unstructured:0.3", "unstructured:0.5", "unstructured:0.7", "2:4"]
HTML = (".html", ".htm")

Baseline = Annotated[
    Path | None,
    typer.Option(help="The dense model's folder, to compare with.", show_default=False),
]

TokensPerCall = Annotated[
    str | None,
    typer.Option(help="Tokens in one call of the model, as 1,16,128.", show_default=False),
]


def evaluate(
    folders: o.Folders,
    text: o.TextFile = None,
    tokens: o.TokenFile = None,
    baseline: Baseline = None,
    rows: o.Rows = 64,
    length: o.Length = None,
    batch: o.Batch = 8,
    dtype: o.Dtype = AUTO,
    device: o.Device = "auto",
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """What pruning cost: perplexity, and beside a baseline KL and the same top-1.

    Several folders are compared on the same data. An encoder is compared with its baseline by the
    cosine of their embeddings.
    """
    with failures(debug):
        data = Data(text, tokens, rows, length, batch)
        names = names_of(folders)
        require_one_tokenizer([*folders, *([] if baseline is None else [baseline])], data)
        batches = data.read(folders[0])
        dense = None if baseline is None else open_folder(baseline, dtype, device).model
        measured: dict[str, dict[str, float]] = {}
        for folder, name in names.items():
            model = open_folder(folder, dtype, device).model
            if dense is None and not is_causal(model):
                raise ValueError(
                    f"{type(model).__name__} has no perplexity: compare it by --baseline DENSE"
                )
            if dense is not None and not measured and not gives_hidden_states(model):
                measured["dense"] = quality(dense, None, batches)
            measured[name] = quality(model, dense, batches)
        if json:
            emit({"tokens": tokens_in(batches), "data": data.name, **measured})
            return
        columns = list(dict.fromkeys(what for found in measured.values() for what in found))
        shown = [
            (who, *(metric(n).text.format(found[n]) if n in found else "-" for n in columns))
            for who, found in measured.items()
        ]
        table(("weights", *columns), shown)
        say(f"on {tokens_in(batches):,} tokens of {data.name}")


def sense(
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
    layers: o.Layers = None,
    ignore: o.Ignore = None,
    text: o.TextFile = None,
    tokens: o.TokenFile = None,
    rows: o.Rows = 16,
    length: o.Length = None,
    batch: o.Batch = 8,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Keep what is measured in this file, to go on there.", show_default=False
        ),
    ] = None,
    dtype: o.Dtype = AUTO,
    device: o.Device = "auto",
    full: o.Full = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """How much the loss rises when one layer alone is pruned, for each layer and pattern."""
    with failures(debug, checkpoint):
        from secateur.allocation.sensitivity import sense as measure

        chosen = find_criterion(method)
        data = Data(text, tokens, rows, length, batch)
        batches = data.read(folder)
        require_place(out, ".json")
        require_place(html, *HTML)
        model = open_folder(folder, dtype, device).model
        if not is_causal(model):
            raise ValueError(f"sense needs a language model, got a {type(model).__name__}")
        found = measure(
            model,
            patterns,
            lambda pruned: _loss(pruned, batches),
            layers=layers or None,
            ignore=ignore or (),
            criterion=chosen.function,
            batches=batches if chosen.needs else None,
            checkpoint=checkpoint,
        )
        if out is not None:
            found.write(out)
        if html is not None:
            from secateur.report import write_html

            write_html(html, title=f"Sensitivity of {folder.name}", sensitivity=found)
        if json:
            emit(found.to_dict())
            return
        table(found.columns, found.rows(), full=full)
        say(*(f"written to {target}" for target in (out, html) if target is not None))


def bench(
    folder: o.Folder,
    tokens_per_call: TokensPerCall = "1,16,128",
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
    dtype: o.Dtype = STORED,
    device: o.Device = "auto",
    full: o.Full = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measure every layer dense and sparse on this machine, at each number of tokens a call.

    No model is written. The measurements are kept for this machine, and `sc.accelerate_` makes the
    same choice from them where the model is used.
    """
    with failures(debug):
        from secateur.accelerate.verb import accelerate_

        counts = token_counts(tokens_per_call or "")
        tried = formats.split(",") if formats else None
        model = open_folder(folder, dtype, device).model
        chosen = list(select(model, layers).layers) if layers else None
        report = accelerate_(model, counts, tried, chosen, strict, remeasure=True)
        if json:
            emit(report.to_dict())
            return
        columns, measured = report.columns, report.rows()
        if not full:  # the rest makes it wider than a terminal
            columns, places = SHOWN, [report.columns.index(name) for name in SHOWN]
            measured = [tuple(row[i] for i in places) for row in report.distinct_rows()]
        table(columns, measured, full=full)
        why: dict[tuple[str, str], list[str]] = {}
        for layer in report.layers:
            why.setdefault((layer.format, layer.reason), []).append(layer.layer)
        rows = [(runs, str(len(names)), reason) for (runs, reason), names in why.items()]
        table(("runs", "layers", "why"), rows)
        say(f"measured on {report.device}, {report.threads} threads", report.headline)
        if report.advice:
            say(in_options(report.advice))


def token_counts(text: str) -> tuple[int, ...]:
    """The numbers in `1,16,128`.

    Raises:
        ValueError: if they are not positive numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            f"--tokens-per-call needs numbers of at least 1 separated by commas, got {text!r}"
        )
    return tuple(int(part) for part in parts)


def _loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    from secateur.model.evaluate import perplexity

    return perplexity(model, [batch for batch in batches if isinstance(batch, Tensor)]).nll


def require_place(target: Path | None, *endings: str) -> None:
    """The file can be written, and is what its name says, to be known before the work.

    Raises:
        ValueError: if it cannot, or its name ends in something else.
    """
    if target is None:
        return
    if target.suffix.lower() not in endings:
        raise ValueError(
            f"{target} would not be what its name says, {endings[0]} is written: give it a name "
            f"that ends in {endings[0]}"
        )
    if target.is_dir() or not target.resolve().parent.is_dir():
        raise ValueError(f"{target} cannot be written: name a file in a folder that exists")


def names_of(folders: Sequence[Path]) -> dict[Path, str]:
    """What each folder is called beside the others: its own name, or its path where two have one.

    Raises:
        ValueError: if a folder is named twice.
    """
    twice = [folder for i, folder in enumerate(folders) if folder in folders[:i]]
    if twice:
        raise ValueError(f"{twice[0]} is named twice: name each folder once")
    own = [folder.resolve().name for folder in folders]
    return {f: str(f) if own.count(n) > 1 else n for f, n in zip(folders, own, strict=True)}


def require_one_tokenizer(folders: Sequence[Path], data: Data) -> None:
    """The folders read a text as the same tokens, so that what is measured on it compares.

    Raises:
        ValueError: if they do not.
    """
    if data.text is None:
        return
    files = [file for folder in folders if (file := folder / "tokenizer.json").is_file()]
    others = [file for file in files if file.read_bytes() != files[0].read_bytes()]
    if others:
        raise ValueError(
            f"{others[0]} is another tokenizer than {files[0]}, so a text is other tokens to them: "
            "compare models of one tokenizer"
        )
