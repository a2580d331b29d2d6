"""What the tables of decode and prefill share: rows of one candidate at one layer and tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.lib.results import Row, Rows, every
from bench.tables.markdown import vs_cublas


def latest(results: Path, bench: str) -> list[list[Row]]:
    """For each device, the row of every layer, number of tokens and candidate of its last run.

    A run of all takes longer than a device may be had for. Each ratio is to dense of its own run.
    """
    devices: dict[str, dict[tuple[str, str, str], Row]] = {}
    for rows in every(results, bench):
        run = {(row["layer"], row["tokens"], row["candidate"]): row for row in rows}
        devices.setdefault(rows[0]["device"], {}).update(run)
    return [sorted(cases.values(), key=_order) for cases in devices.values()]


def _order(row: Row) -> tuple[str, int]:
    return row["layer"], int(row["tokens"])


def lines_of(rows: Rows, names: Sequence[str], cell: Callable[[Row], str]) -> list[list[str]]:
    """A line for each layer and number of tokens, with a cell for each candidate."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["layer"], row["tokens"]), {})[row["candidate"]] = cell(row)
    return [
        [layer, count, *[by_name.get(name, "-") for name in names]]
        for (layer, count), by_name in cells.items()
    ]


def ratios_of(
    rows: Rows, layer: str, names: Sequence[str], counts: Sequence[int]
) -> list[list[str]]:
    """A line for each candidate that was measured at the layer, with a ratio for each count."""
    ratios = {(r["candidate"], int(r["tokens"])): vs_cublas(r) for r in rows if r["layer"] == layer}
    return [
        [layer, name, *[ratios.get((name, count), "-") for count in counts]]
        for name in names
        if any((name, count) in ratios for count in counts)
    ]


def candidates(rows: Rows) -> list[str]:
    """The names of the candidates, in the order of their rows."""
    return list(dict.fromkeys(row["candidate"] for row in rows))


def layers(rows: Rows) -> list[str]:
    """The layers, in the order of their rows."""
    return list(dict.fromkeys(row["layer"] for row in rows))


def quartiles(rows: Rows) -> str:
    """The sentence on the largest spread of a time."""
    timed = [row for row in rows if row["us"]]
    spread = max((float(r["high_us"]) - float(r["low_us"])) / float(r["us"]) for r in timed)
    return f"quartiles at most {spread:.0%} of the median apart."
