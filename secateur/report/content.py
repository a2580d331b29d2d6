"""The report's content as plain data: sections, tables, figures and headline numbers."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from secateur.core.processor import processor
from secateur.core.version import VERSION
from secateur.report.rows import Row, fold, numeric_columns, without_empty

MARKS = ("●", "■", "▲", "◆", "▼", "✚")
# A table of more rows than this is closed until the reader opens it.
OPEN_ROWS = 14
# Folding is worth it if it leaves fewer lines than this share of the layers.
MOSTLY_DIFFERENT = 0.6


@dataclass(frozen=True)
class Table:
    """A table; with a `summary` it is closed until opened."""

    columns: tuple[str, ...]
    rows: Sequence[Row]
    caption: str = ""
    summary: str = ""

    @property
    def numeric(self) -> list[bool]:
        return numeric_columns(self.columns, self.rows)


@dataclass(frozen=True)
class Figure:
    """A drawing, which is trusted markup, with a caption, which is text."""

    svg: str
    caption: str
    name: str = ""


@dataclass(frozen=True)
class Mark:
    """An entry of a legend: a colour of the page, a mark in it, and their meaning."""

    colour: str
    mark: str
    label: str


@dataclass(frozen=True)
class Section:
    """A part of the page that answers one question."""

    key: str
    heading: str
    lead: str
    figures: Sequence[Figure] = ()
    wide: bool = False
    legend: Sequence[Mark] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    name: str
    value: str
    detail: str


@dataclass(frozen=True)
class Metric:
    """How a measure of quality is printed, what its axis says, and how to read it."""

    text: str
    label: str
    meaning: str


METRICS: Mapping[str, Metric] = {
    "perplexity": Metric(
        "{:.3f}", "perplexity", "exp of the mean next-token loss on held-out text; lower is better."
    ),
    "KL to dense": Metric(
        "{:.4f}", "KL to dense, nats a token",
        "how far the predictions moved from the dense model's; 0 is the same.",
    ),
    "nll": Metric(
        "{:.4f}", "next-token loss, nats", "the logarithm of the perplexity; lower is better."
    ),
    "same top-1": Metric(
        "{:.2%}", "same top-1 as dense",
        "how often the most likely next token is still the dense model's.",
    ),
    "accuracy": Metric("{:.2%}", "accuracy", "the share of right answers; higher is better."),
    "cosine to dense": Metric(
        "{:.4f}", "cosine to dense embeddings", "the mean over the texts; 1 is the same."
    ),
    "10th percentile": Metric(
        "{:.4f}", "cosine to dense, 10th percentile", "nine texts of ten are closer than this."
    ),
}  # fmt: skip


def metric(name: str) -> Metric:
    """The known metric of that name, or a plain one."""
    return METRICS.get(name, Metric("{:.4g}", name, ""))


def layer_tables(
    columns: tuple[str, ...], rows: Sequence[Row], what: str, *, closed: bool = False
) -> list[Table]:
    """The rows folded where layers are alike, and all of them in a table to open.

    Columns that say nothing are left out. With `closed`, one table that opens on a click.
    """
    columns, told = without_empty(columns, rows)
    folded = fold(told)
    every = Table(columns, told, "", f"{what}: all {len(told)} lines")
    if len(folded) > MOSTLY_DIFFERENT * len(told):
        return [every if closed or len(told) > OPEN_ROWS else Table(columns, told, f"{what}.")]
    alike = f"{what}. Layers that differ in nothing else share a line."
    if closed:
        return [Table(columns, folded, alike, f"{what}: {len(folded)} lines for {len(told)}")]
    return [Table(columns, folded, alike), every]


def by_kind(values: Mapping[str, float]) -> tuple[dict[str, dict[int, float]], str]:
    """The values as {kind of layer: {block: value}} for names with a block number; the prefix.

    `model.layers.3.mlp.up` is block 3 of kind `mlp.up` under the prefix `model.layers.*`. Kinds of
    a single block are left out.
    """
    kinds: dict[tuple[str, ...], dict[int, float]] = {}
    for name, value in values.items():
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if place is not None:
            kind = (*parts[:place], "*", *parts[place + 1 :])
            kinds.setdefault(kind, {})[int(parts[place])] = value
    repeated = {kind: blocks for kind, blocks in kinds.items() if len(blocks) > 1}
    stems = {kind[: kind.index("*") + 1] for kind in repeated}
    prefix = stems.pop() if len(stems) == 1 else ()
    named = {
        ".".join(kind[len(prefix) :]) or ".".join(kind): blocks for kind, blocks in repeated.items()
    }
    return named, ".".join(prefix)


def provenance() -> dict[str, str]:
    """Versions and hardware, as the page names them."""
    facts = {
        "secateur": VERSION,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "CPU": f"{processor()}, {os.cpu_count()} cores",
        "threads": f"{torch.get_num_threads()}",
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["GPU"] = ", ".join(names)
    else:
        facts["GPU"] = "none"
    facts["written"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return facts
