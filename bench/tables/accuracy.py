"""The tables of what pruning loses on a real language model."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from bench.lib.paper import PAPER
from bench.lib.results import Row, Rows, every
from bench.tables.markdown import libraries, page, runs

# device, calibration rows, whether they are of as many documents as there are, validation rows
Case = tuple[str, int, bool, str]


def accuracy_all(results: Path) -> str:
    """Perplexity and more, a row a method and a column a pattern, of every case.

    A case is a device, a number of calibration rows, how they were dealt, and validation rows.
    """
    return "\n".join(map(table, latest(results).values()))


def latest(results: Path) -> dict[Case, list[Row]]:
    """The rows of each case, of every method, pattern and calibration set the last that there is.

    A run of all of them takes longer than a device may be had for. Each row has its `r_kl` added,
    which needs the paper's row of the same run.
    """
    cases: dict[Case, dict[tuple[str, ...], Row]] = {}
    for rows in every(results, "accuracy"):
        papers = {_run_of(row): row for row in rows if row["method"] == PAPER}
        for row in rows:
            dealt = bool(row.get("documents"))
            case = (row["device"], int(row["calibration_rows"]), dealt, row["validation_rows"])
            one = (row["method"], row["pattern"], _set_of(row))
            cases.setdefault(case, {})[one] = {**row, "r_kl": _r_kl(row, papers.get(_run_of(row)))}
    return {case: list(cases[case].values()) for case in sorted(cases)}


def _set_of(row: Row) -> str:
    """Which calibration rows: by their seed, or by the first of rows that follow one another."""
    return row.get("seed") or row["first_row"]


def _run_of(row: Row) -> tuple[str, ...]:
    """What rows of one run on one calibration set share."""
    return (row.get("command", ""), row["pattern"], row["calibration_rows"], _set_of(row))


def _r_kl(row: Row, baseline: Row | None) -> str:
    """The share of the baseline's KL that the row avoids."""
    if baseline is None or not row.get("kl"):
        return ""
    return str(1 - float(row["kl"]) / float(baseline["kl"]))


def table(rows: Rows) -> str:
    """Perplexity and more, a row a method and a column a pattern."""
    cells: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row["nll"]:
            by_pattern = cells.setdefault(row["method"], {})
            by_pattern.setdefault(row["pattern"], []).append(row)
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    lines = []
    for name in sorted(cells, key=lambda name: _place(cells[name], patterns)):
        found = cells[name]
        lines.append([name, *[_cell(found[p]) if p in found else "-" for p in patterns]])
    return page(["perplexity (top-1 as dense; R_S; R_KL)", *patterns], lines, *_origin(rows))


def _place(found: Mapping[str, Sequence[Row]], patterns: Sequence[str]) -> tuple[bool, float]:
    """Dense first, then those that lose most in the first pattern that they have."""
    rows = next(found[pattern] for pattern in patterns if pattern in found)
    return rows[0]["method"] != "dense", -fmean(float(row["nll"]) for row in rows)


def _cell(rows: Sequence[Row]) -> str:
    """The mean over calibration sets; of the shares the range, too."""
    text = f"{math.exp(fmean(float(row['nll']) for row in rows)):.2f}"
    if not rows[0]["top1"]:
        return text
    top1 = fmean(float(row["top1"]) for row in rows)
    shares = [_share(rows, column) for column in ("r_s", "r_kl")]
    return f"{text} ({'; '.join([f'{top1:.0%}', *filter(None, shares)])})"


def _share(rows: Sequence[Row], column: str) -> str:
    found = [float(row[column]) for row in rows if row.get(column)]
    if not found:
        return ""
    spread = f", {min(found):.2f} to {max(found):.2f}" if len(found) > 1 else ""
    return f"{fmean(found):.2f}{spread}"


def _origin(rows: Rows) -> list[str]:
    """Sentences on where the rows come from, on other libraries, and on what was wrong with one."""
    first = rows[0]
    sets = len({_set_of(row) for row in rows})
    notes = [f"{r['method']}, {r['pattern']}: {r['note']}" for r in rows if r.get("note")]
    return [
        f"{first['model']}, {first['calibration_rows']} calibration "
        + (f"(mean of {sets} sets) " if sets > 1 else "")
        + f"and {first['validation_rows']} validation rows, {_documents(rows)}; "
        f"{first['device']}, torch {first['torch']}, {runs(rows)}, "
        "`python -m bench.accuracy`.",
        libraries(rows),
        f"Notes: {'; '.join(dict.fromkeys(notes))}." if notes else "",
    ]


def _documents(rows: Rows) -> str:
    """Of how many documents calibration rows are; older cases took the first rows of the file."""
    numbers = dict.fromkeys(row.get("documents", "") for row in rows)
    if not any(numbers):
        return "the former following one another in the file"
    return f"the former of {' or '.join(numbers)} documents"
