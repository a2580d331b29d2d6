"""The table of what training in 2:4 from scratch loses, by the way that zeros are chosen."""

from pathlib import Path
from statistics import fmean

from bench.lib.results import Row, newest
from bench.tables.markdown import page, run


def from_scratch(results: Path) -> str:
    """The loss of each way, mean of seeds, what it is above dense, and what the last step moved."""
    rows = newest(results, "from-scratch")[-1]
    ways: dict[str, list[Row]] = {}
    for row in rows:
        ways.setdefault(row["way"], []).append(row)
    dense = {row["seed"]: float(row["loss"]) for row in ways["dense"]}
    lines = []
    for way, found in ways.items():
        above = [float(row["loss"]) - dense[row["seed"]] for row in found]
        moved = fmean(int(row["exchanged"]) for row in found)
        shown = [f"{fmean(float(row['loss']) for row in found):.3f}"]
        shown += ["-"] if way == "dense" else [f"{min(above):+.3f} to {max(above):+.3f}"]
        lines.append([way, *shown, f"{moved:,.0f}"])
    first = rows[0]
    below = (
        f"Mean of {len(dense)} seeds, {int(first['steps']):,} steps of the same batches for every "
        "way; a byte model of two blocks on Python's standard library. Exchanged are weights "
        f"between the last two masks. {run(first)}, `{first['command']}`."
    )
    return page(["way", "nats a byte", "above dense", "exchanged"], lines, below)
