"""The tables of what an allocation gains and how a budget of time is met."""

import math
from pathlib import Path

from bench.lib.results import Rows, newest
from bench.tables.markdown import page, run

UNIFORM = "uniform"


def allocation(results: Path) -> str:
    """Perplexity at one sparsity of the whole model, a row a method and a column a sparsity."""
    return "\n".join(map(_allocation_table, newest(results, "allocation")))


def budget(results: Path) -> str:
    """For each budget of milliseconds, what the plan was measured to take, and what sums say."""
    return "\n".join(map(_budget_table, newest(results, "budget")))


def _allocation_table(rows: Rows) -> str:
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    uniform = {row["pattern"]: float(row["kl"]) for row in rows if row["method"] == UNIFORM}
    for row in rows:
        perplexity, gain = math.exp(float(row["nll"])), float(row["r_s"])
        of_kl = 1 - float(row["kl"]) / uniform[row["pattern"]]
        cell = f"{perplexity:.2f} ({gain:.2f}; {of_kl:.2f})"
        cells.setdefault(row["method"], {})[row["pattern"]] = cell
    lines = [
        [method, *[found.get(pattern, "-") for pattern in patterns]]
        for method, found in cells.items()
    ]
    first = rows[0]
    origin = (
        f"{first['model']}, dense {math.exp(float(first['dense_nll'])):.2f}, "
        f"{first['calibration_rows']} calibration rows, {first['search_rows']} others to search "
        f"by, {first['validation_rows']} to validate; SparseGPT whatever the allocation; curves "
        f"and weights took {float(first['shared_seconds']):.0f} s, each evolution at most "
        f"{max(float(row['choice_seconds']) for row in rows):.0f} s; {run(first)}, "
        "`python -m bench.allocation`."
    )
    return page(["perplexity (R_S; R_KL to uniform)", *patterns], lines, origin)


def _budget_table(rows: Rows) -> str:
    lines = []
    for row in rows:
        figures = [f"{float(row[name]):.3f}" for name in ("budget_ms", "measured_ms")]
        sums = [f"{float(row[name]):.3f}" for name in ("sum_ms", "dense_ms")]
        lines.append([row["tokens"], *figures, f"{float(row['over']):+.1%}", *sums])
    first = rows[0]
    origin = (
        f"{first['layers']} linear layers of {first['model']} with random weights in "
        f"{first['dtype']}, one after another in one CUDA graph; {run(first)}, "
        "`python -m bench.budget`."
    )
    heads = ["tokens", "budget ms", "measured ms", "to the budget", "sum of layers ms", "dense ms"]
    return page(heads, lines, origin)
