"""`secateur generate`: text from a model in a folder, shown as it is written."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from secateur.cli import options as o
from secateur.cli.command import command
from secateur.cli.console import INTERRUPTED, aside, emit
from secateur.cli.groups import Loading
from secateur.cli.running import counted, linear_layers
from secateur.core.memory import is_out_of_memory
from secateur.core.tables import as_bytes, printable
from secateur.integrations.tokens import read_tokenizer
from secateur.integrations.transformers import read_config
from secateur.llm.kernel_steps import steps_of
from secateur.llm.request import Request, Sampling, positions, request
from secateur.llm.steps import Steps
from secateur.llm.text import TextStream, pieces
from secateur.model.outputs import device_of

# Tokens to write where nothing is said, about a paragraph.
TOKENS = 128

PROMPT, CHOICE = "Prompt", "Which tokens"

# Characters that shape a text without moving a terminal's cursor elsewhere: line feeds, tabs, and
# what joins letters and emoji.
SHAPING = "\n\t\u200c\u200d"


@dataclass(frozen=True)
class Prompt:
    """The text to go on with."""

    prompt: Annotated[
        str | None,
        typer.Option(help="The text to go on with.", rich_help_panel=PROMPT, show_default=False),
    ] = None
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the text to go on with, read as it is, in UTF-8.",
            rich_help_panel=PROMPT,
            show_default=False,
        ),
    ] = None

    def read(self) -> str:
        """The text.

        Raises: ValueError if not one of the two is given, or the file is no text.
        """
        text, file = self.prompt, self.prompt_file
        if (text is None) == (file is None):
            found = "neither" if file is None else "both"
            raise ValueError(f"either --prompt TEXT or --prompt-file FILE is needed, got {found}")
        if file is not None:
            try:
                return file.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} cannot be read as text in UTF-8: {error}") from error
        assert text is not None
        return text


@dataclass(frozen=True)
class Drawn:
    """How the next token is chosen."""

    temperature: Annotated[
        float,
        typer.Option(
            help="0 takes the most likely token; above, tokens are drawn, and 1 is the model's own "
            "distribution.",
            rich_help_panel=CHOICE,
        ),
    ] = 0.0
    top_k: Annotated[
        int | None,
        typer.Option(help="Draw among this many.", rich_help_panel=CHOICE, show_default=False),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw among the fewest that have this probability together.",
            rich_help_panel=CHOICE,
            show_default=False,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Repeat the same draws.", rich_help_panel=CHOICE, show_default=False
        ),
    ] = None


@dataclass
class Written:
    """What has been written, and when; times in seconds."""

    tokens: int = 0
    first: float | None = None
    last: float | None = None
    ended: str = ""

    def count(self, tokens: int, seconds: float) -> None:
        """Count tokens that have come."""
        self.tokens += tokens
        self.first = seconds if self.first is None else self.first
        self.last = seconds

    @property
    def per_second(self) -> float | None:
        """Tokens a second after the first one, whose time is that of the prompt."""
        if self.first is None or self.last is None or self.last == self.first:
            return None
        return (self.tokens - 1) / (self.last - self.first)


@command()
def generate(
    *,
    model: o.Folder,
    prompt: Prompt = Prompt(),
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many tokens to write, at most; default: 128, or what the model has room for.",
            show_default=False,
        ),
    ] = None,
    drawn: Drawn = Drawn(),
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="End before this text; repeat it for more.",
            rich_help_panel=CHOICE,
            show_default=False,
        ),
    ] = None,
    loading: Loading,
    json: o.Json = False,
) -> None:
    """Go on with a text, by a dense, a pruned or a packed language model.

    The text goes to stdout as it is written, its speed to stderr. It ends with a token that the
    model's config names as the end of a text, at a --stop, or after --tokens.
    """
    stops = _stops(stop)
    given = prompt.read()
    read_config(model)  # before a tokenizer is missed where there is no model
    tokenizer = read_tokenizer(model, "copy the one that the model was trained with")
    ids = tokenizer.encode(given).ids
    loaded = loading.model(model)
    sampling = Sampling(drawn.temperature, drawn.top_k, drawn.top_p, drawn.seed)
    batch = torch.tensor([ids], dtype=torch.long, device="cpu")
    count = _count(loaded, len(ids)) if tokens is None else tokens
    asked = request(loaded, batch, count, sampling=sampling).to(device_of(loaded))
    steps = steps_of(loaded)
    text = TextStream(tokenizer.decode, ids, stops)
    with _peak_memory(asked.ids.device) as peak, _out_of_memory():
        written = _write(steps, asked, text, shown=not json)
    figures = {
        "prompt_tokens": len(ids), "tokens": written.tokens, "ended": written.ended,
        "first_token_seconds": written.first, "tokens_per_second": written.per_second,
        "peak_bytes": peak[0] if peak else None, "layers": linear_layers(loaded),
        "steps": steps.about,
    }  # fmt: skip
    if json:
        emit({"text": text.text, **figures})
    else:
        aside(*_lines(written, figures))
    if written.ended == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _write(steps: Steps, asked: Request, text: TextStream, shown: bool) -> Written:
    """Write the text, on stdout as it comes if it is `shown`, until it ends or Ctrl-C."""
    written, begun = Written(), time.perf_counter()
    try:
        for piece in pieces(steps, asked, text):
            written.count(piece.tokens, time.perf_counter() - begun)
            written.ended = piece.ended
            _show(piece.text, shown)
    except KeyboardInterrupt:
        written.ended = "interrupted"
        _show(text.rest(), shown)
    _show("" if text.text.endswith("\n") else "\n", shown)
    return written


def _show(text: str, shown: bool) -> None:
    if shown and text:
        obeyed = sys.stdout.isatty()  # a file gets the text as it is
        sys.stdout.write(printable(text, SHAPING) if obeyed else text)
        sys.stdout.flush()


def _lines(written: Written, figures: dict[str, Any]) -> Iterator[str]:
    """The figures, as a person reads them."""
    many = "" if written.tokens == 1 else "s"
    prompt = figures["prompt_tokens"]
    yield f"{written.tokens:,} token{many} after a prompt of {prompt:,}, ended: {written.ended}"
    if written.first is not None:
        yield f"first token after {written.first:.3g} s"
    if written.per_second is not None:
        yield f"{written.per_second:,.1f} tokens/s after it"
    if figures["peak_bytes"] is not None:
        yield f"peak memory {as_bytes(figures['peak_bytes'])}"
    yield counted(figures["layers"])
    yield f"steps: {figures['steps']}"


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """A list that holds the peak of the GPU's memory in bytes, afterwards; empty on a CPU."""
    found = list[int]()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found.append(torch.cuda.max_memory_allocated(device))


@contextmanager
def _out_of_memory() -> Iterator[None]:
    """Say what needs less where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = " ".join(str(error).split()).partition(". ")[0]
        raise torch.OutOfMemoryError(
            f"{first}: write fewer --tokens after a shorter prompt, or give --device cpu"
        ) from error


def _count(model: nn.Module, prompt: int) -> int:
    """Tokens to write after a prompt of this length."""
    limit = positions(model)
    return TOKENS if limit is None else max(1, min(TOKENS, limit - prompt))


def _stops(stop: Sequence[str] | None) -> tuple[str, ...]:
    stops = tuple(stop or ())
    if "" in stops:
        raise ValueError("--stop needs a text of at least 1 character, got none: leave it out")
    return stops
