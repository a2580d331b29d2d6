"""The table of zeros in blocks, and anywhere, on a GPU."""

from collections.abc import Sequence
from pathlib import Path

from bench.lib.results import Row
from bench.tables.candidates import latest, quartiles
from bench.tables.markdown import page, vs_cublas, without_figure


def blocks(results: Path) -> str:
    """For each device, ratios to dense: a line a candidate and number of tokens, losers too."""
    return _tables(results, " block:")


def bitmap(results: Path) -> str:
    """The same of zeros anywhere, in 16 bits and as codes."""
    return _tables(results, " bitmap@", " bitmap_int4@")


def _tables(results: Path, *formats: str) -> str:
    found = (
        [row for row in rows if any(format in row["layer"] for format in formats)]
        for rows in latest(results, "blocks")
    )
    return "\n".join(_table(rows) for rows in found if rows)


def _table(rows: Sequence[Row]) -> str:
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        layer, sparsity = row["layer"].split("@")
        if row["candidate"] != row["baseline"]:
            name, _, format = layer.rpartition(" ")
            key = name, format, row["tokens"], row["candidate"]
            cells.setdefault(key, {})[sparsity] = vs_cublas(row)
    sparsities = sorted({row["layer"].split("@")[1] for row in rows}, key=float)
    lines = [
        [*key, *(found.get(one, "-") for one in sparsities)]
        for key, found in cells.items()
        if set(found.values()) != {"-"}
    ]
    first = rows[0]
    heads = ["layer", "format", "tokens", "runs", *(f"{float(s):.0%} zero" for s in sparsities)]
    runs = dict.fromkeys(
        f"{row['date']}, commit {row['commit']}, `{row['command']}`" for row in rows
    )
    origin = (
        "Ratio to dense cuBLAS bf16, bold where it is faster; random weights and zeros, "
        f"cold, with a bias, one CUDA graph, median; {first['device']}, driver {first['driver']}, "
        f"torch {first['torch']}, {'; '.join(runs)}; {quartiles(rows)}"
    )
    timed = {row["candidate"] for row in rows if row["us"]}
    never = [row for row in rows if row["candidate"] not in timed]
    missing = without_figure([f"{row['candidate']}: {row['note']}" for row in never])
    return page(heads, lines, origin, missing)
