"""The table of what rounding to each grid costs."""

from pathlib import Path

from bench.lib.results import newest
from bench.tables.markdown import page


def grids(results: Path) -> str:
    """What rounding to each grid costs, a column each kind of weight and way to its scales."""
    rows = newest(results, "grids")[-1]
    heads = dict.fromkeys(f"{row['weights']}, {row['scales']}" for row in rows)
    cells: dict[str, list[str]] = {}
    for row in rows:
        cells.setdefault(row["grid"], []).append(f"{float(row['error']):.4f}")
    lines = [[f"`{grid}`", *found] for grid, found in cells.items()]
    origin = f"torch {rows[0]['torch']}, commit {rows[0]['commit']}, `python -m bench.grids`."
    return page(["grid", *heads], lines, origin)
