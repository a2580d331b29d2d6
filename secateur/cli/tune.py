"""`secateur tune`: the fastest launch config of the GPU kernel here, measured and remembered."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import INTERRUPTED, console, emit, plain, say, table
from secateur.cli.source import find_device
from secateur.files.state_dict import linear_shapes
from secateur.formats.kernels.decode24.arrange import FORMATS
from secateur.formats.kernels.decode24.choose import choose, own_table, remember
from secateur.formats.kernels.decode24.config import Case
from secateur.formats.kernels.decode24.multiply import why_not
from secateur.formats.kernels.decode24.tune import MOST_CONFIGS, Timed
from secateur.formats.kernels.decode24.tune import tune as measure
from secateur.formats.kernels.measured import chip
from secateur.report.rows import Row

COLUMNS = ("layer", "tokens", "config", "us", "TB/s", "second best", "its us")
DTYPE = torch.bfloat16  # a launch config serves float16 as well: the same bytes move

# Each case with the launch configs that were timed for it, fastest first.
Measurements = list[tuple[Case, list[Timed]]]


@command()
def tune(
    *,
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A folder or file of dense safetensors, of which the linear layers are taken.",
            show_default=False,
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            help="out_features x in_features, as 14336x4096; repeat it for more.",
            show_default=False,
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help=f"{', '.join(FORMATS)}; repeat it for more. Default: semi24.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Tokens in one call of the model; repeat it for more. Default: 1 and 16.",
            show_default=False,
        ),
    ] = None,
    cuts: Annotated[
        int, typer.Option(min=1, help="Launch configs to try for each layer.")
    ] = MOST_CONFIGS,
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """Measure launch configs of the GPU kernel for packed layers, and remember the fastest.

    The kernel runs without this too, by a cost model. What is found lies beside the compiled
    kernels and serves every process that this user starts from then on.
    """
    place = _gpu(device)
    cases = _cases(_shapes(model, shapes), formats or ["semi24"], tokens or [1, 16], place)
    found = Measurements()
    try:
        _measure(cases, place, cuts, found)
    except KeyboardInterrupt:
        kept = f"interrupted: {len(found)} of {len(cases)} layers are kept in {own_table()}"
        console(stderr=True).print("\n", plain(kept, "yellow"), sep="", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    if json:
        emit([_entry(case, timed) for case, timed in found])
        return
    table(COLUMNS, [_row(case, timed) for case, timed in found])
    say(f"kept in {own_table()}")


def _gpu(device: str) -> torch.device:
    place = find_device(device)
    if place.type != "cuda":
        raise ValueError(
            f"tuning needs a CUDA GPU, got {place.type}: run it where the model will run"
        )
    return place


def _measure(cases: Sequence[Case], device: torch.device, most: int, found: Measurements) -> None:
    """Add each case to `found` once its fastest launch config is written down."""
    # What runs today is measured too, so that it is only ever exchanged for something faster
    known = {case: [choose(case, device)] for case in cases}
    for case, timed in measure(cases, device, most, known=known):
        if timed:
            remember(own_table(), chip(device), case, timed[0].config)
        found.append((case, timed))


def _shapes(model: Path | None, shapes: Sequence[str] | None) -> list[tuple[int, int]]:
    if (model is None) == (not shapes):
        given = "both" if shapes else "neither"
        raise ValueError(f"tune needs a model or --shape, got {given}: name one of them")
    if model is not None:
        return list(linear_shapes(model))
    found = list[tuple[int, int]]()
    for text in shapes or ():
        sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if sizes is None:
            raise ValueError(
                f"--shape needs out_features x in_features, got {text!r}: write 14336x4096"
            )
        found.append((int(sizes[1]), int(sizes[2])))
    return found


def _cases(
    shapes: Sequence[tuple[int, int]],
    formats: Sequence[str],
    tokens: Sequence[int],
    device: torch.device,
) -> list[Case]:
    """The distinct cases to measure: numbers of tokens that share a kernel share its config.

    Raises: ValueError if the kernel has no such format, or cannot run a shape here.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(
            f"tune needs formats of 2:4 or 4:8 weights, got {unknown[0]!r}: choose from "
            f"{', '.join(FORMATS)}"
        )
    for shape in shapes:
        problem = why_not(shape, DTYPE, device, max(tokens))
        if problem is not None:
            raise ValueError(f"{shape[0]}x{shape[1]} cannot be tuned: {problem}")
    cases = [
        Case(*FORMATS[name], DTYPE, *shape, count).widest
        for name in formats
        for shape in shapes
        for count in tokens
    ]
    return list(dict.fromkeys(cases))


def _row(case: Case, timed: Sequence[Timed]) -> Row:
    layer, tokens = case.weight, f"<={case.tokens}"
    if not timed:
        return layer, tokens, "none is right: the cost model stays", *["-"] * 4
    best = timed[0]
    second = (str(timed[1].config), f"{timed[1].us:.2f}") if len(timed) > 1 else ("-", "-")
    rate = f"{_terabytes_per_s(case, best):.2f}"
    return layer, tokens, str(best.config), f"{best.us:.2f}", rate, *second


def _entry(case: Case, timed: Sequence[Timed]) -> dict[str, Any]:
    measured = [
        {"config": str(one.config), "us": one.us, "tb_per_s": _terabytes_per_s(case, one)}
        for one in timed
    ]
    return {"layer": case.weight, "most_tokens": case.tokens, "measured": measured}


def _terabytes_per_s(case: Case, timed: Timed) -> float:
    """The rate at which the weights are read, each once."""
    return case.row_tiles * case.units * case.unit_bytes / timed.us / 1e6
