"""What the command line prints, and how it ends: tables, JSON, one-line errors, exit codes."""

import contextlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from secateur.cli.wording import in_options
from secateur.core.memory import is_out_of_memory
from secateur.core.tables import printable
from secateur.report.rows import Row, fold, numeric_columns

FAILED_CHECK, FAILED, INTERRUPTED = 1, 2, 130
# Output to a file or a pipe, which have no width, is not wrapped.
UNWRAPPED = 10_000
# Characters of an error; a list of every layer of a large model would hide the advice after it.
LONGEST = 800

# Cells of at most this many characters are not broken in a narrow terminal.
SHORT = 14
# Reasons for leaving layers alone that are spelt out; further ones are only counted.
REASONS_SHOWN = 6


def console(stderr: bool = False) -> Console:
    """A console on the current stream, wide if that is no terminal."""
    found = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not found.is_terminal:
        found = Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=UNWRAPPED)
    return found


def plain(text: str, style: str = "") -> Text:
    """The text without markup or anything else that a terminal would obey."""
    return Text(printable(text), style=style)


def say(*lines: str, style: str = "") -> None:
    """Print lines as they are, without markup, on stdout."""
    for line in lines:
        console().print(plain(line, style), soft_wrap=True)


def aside(*lines: str) -> None:
    """Print lines as they are on stderr, beside a result that is alone on stdout."""
    for line in lines:
        console(stderr=True).print(plain(line), soft_wrap=True)


def table(columns: Sequence[str], rows: Sequence[Row], *, full: bool = False) -> None:
    """Print a table; rows of layers that differ only in a number share a line, unless `full`."""
    shown = list(rows) if full or columns[0] != "layer" else fold(rows)
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    right = numeric_columns(columns, shown)
    widest = [max((len(row[i]) for row in shown), default=0) for i in range(len(columns))]
    width = console().width
    # If the other columns leave no room for the name of a row, all of them are broken.
    room = width - sum(min(w, SHORT) + 2 for w in widest[1:]) >= SHORT
    for i, name in enumerate(columns):
        whole = room and widest[i] <= (width // 2 if i == 0 else SHORT)
        side: Literal["left", "right"] = "right" if right[i] else "left"
        drawn.add_column(name, justify=side, overflow="fold", no_wrap=whole)
    for row in shown:
        drawn.add_row(*map(plain, row))
    console().print(drawn)


def left_alone(reasons: Mapping[str, str]) -> list[str]:
    """A line for each reason why layers are left alone."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in list(by_reason.items())[:REASONS_SHOWN]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"left alone: {names[0]}{more}: {reason}")
    if len(by_reason) > REASONS_SHOWN:
        lines.append(f"... and {len(by_reason) - REASONS_SHOWN} more reasons")
    return lines


def emit(data: object) -> None:
    """Print plain data as JSON, alone on stdout."""
    typer.echo(json.dumps(_finite(data), indent=2, default=str))


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show on stderr that something takes its time, if that is a terminal."""
    shown = console(stderr=True)
    with shown.status(plain(what)) if shown.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def failures(debug: bool, checkpoint: Path | None = None) -> Iterator[None]:
    """Turn errors that the user can repair into a line on stderr and exit code 2; Ctrl-C exits 130.

    `checkpoint` is where finished work is kept after an interruption. Warnings become a line on
    stderr, too.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("always", module=r"secateur\b")
            warnings.showwarning = _warn  # type: ignore[assignment]
            yield
    except KeyboardInterrupt:
        kept = f": what is finished is kept in {checkpoint}, the same command goes on from there"
        left = kept if checkpoint is not None and checkpoint.exists() else ": nothing was changed"
        line = plain(f"interrupted{left}", "yellow")
        console(stderr=True).print("\n", line, sep="", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, OSError) as error:
        if debug:
            raise
        complain(_one_line(error))
        raise typer.Exit(FAILED) from None
    except (RuntimeError, MemoryError) as error:
        if debug or not is_out_of_memory(error):
            raise
        elsewhere = ", or --device cpu" if isinstance(error, torch.OutOfMemoryError) else ""
        told = error.__cause__ is not None  # by layer, with what needs less
        less = "" if told else f": use a smaller --batch or --length{elsewhere}"
        complain(f"out of memory: {_one_line(error)}{less}")
        raise typer.Exit(FAILED) from None


def _warn(message: Warning | str, *_: object) -> None:
    """Print a warning of the library as one line; stands in for `warnings.showwarning`."""
    caution(in_options(" ".join(str(message).split())))


def complain(message: str) -> None:
    """Print a red line on stderr."""
    line = Text.assemble(("error: ", "bold red"), plain(message, "red"))
    console(stderr=True).print(line, soft_wrap=True)


def caution(message: str) -> None:
    """Print a yellow line on stderr; the work goes on."""
    line = Text.assemble(("warning: ", "bold yellow"), plain(message, "yellow"))
    console(stderr=True).print(line, soft_wrap=True)


def _one_line(error: Exception) -> str:
    """The error in words of the command line; if very long, its beginning and its advice."""
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} does not exist"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    line = " ".join(str(error).split()) or type(error).__name__
    line = in_options(line)
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]} (--debug shows all)"
    return line


def _finite(data: object) -> Any:
    """The data with null for infinite and undefined numbers, for which JSON has no words."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
