"""The table of loss against bits a weight, sparse weights beside dense quantised ones."""

from collections.abc import Sequence
from pathlib import Path

from bench.lib.results import Row, every
from bench.tables.markdown import page, runs

HEADS = "weights", "bits a weight", "loss over dense, nats", "KL to dense", "top-1 as dense"
OPPONENT = "least KL of a dense grid in no more bits"
KL = "kl_"  # how columns of KL on texts of another kind begin
DENSE = "dense "  # how the names of recipes without zeros begin
EQUAL = 1e-6  # bits


def bytes_(results: Path) -> str:
    """For each model and data, every recipe of its last run, those that lose too.

    Where losses on texts of another kind were measured they have columns.
    """
    return "\n".join(map(_table, latest(results)))


def latest(results: Path) -> list[list[Row]]:
    """For each model, calibration and validation, the row of each recipe's last run.

    On whatever device: they differ by the order of float32 sums alone.
    """
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    of_case = "model", "calibration_rows", "seed", "validation_rows"
    for rows in every(results, "bytes"):
        for row in rows:
            cases.setdefault(tuple(row[name] for name in of_case), {})[row["recipe"]] = row
    return [list(rows.values()) for rows in cases.values()]


def _table(rows: Sequence[Row]) -> str:
    first, devices = rows[0], dict.fromkeys(f"{r['device']}, torch {r['torch']}" for r in rows)
    ordered = sorted(rows, key=lambda row: (-float(row["bits"]), float(row["kl"])))
    origin = (
        f"{first['model']}, the linear layers of its blocks; {first['calibration_rows']} "
        f"calibration rows of {first['documents']} documents, {_batches(rows)}, "
        f"{first['validation_rows']} validation rows; {'; '.join(devices)}, {runs(rows)}, "
        "`python -m bench.run.bytes`."
    )
    measured = dict.fromkeys(name for row in rows for name in row if row[name])
    others = [name for name in measured if name.startswith(KL)]
    heads = *HEADS, *(f"KL on {name.removeprefix(KL)}" for name in others), OPPONENT
    return page(heads, [_line(row, rows, others) for row in ordered], origin)


def _batches(rows: Sequence[Row]) -> str:
    """How many rows a batch has, which counts for what is trained: a step takes one."""
    of_size: dict[str, list[str]] = {}
    for row in rows:
        of_size.setdefault(row["batch"], []).append(row["recipe"])
    usual, *others = sorted(of_size, key=lambda size: -len(of_size[size]))
    told = [f"{size} for {' and '.join(of_size[size])}" for size in others]
    return ", ".join([f"{usual} a batch", *told])


def _line(row: Row, rows: Sequence[Row], others: Sequence[str]) -> list[str]:
    measured = [f"{float(row['dnll']):.3f}", f"{float(row['kl']):.3f}", f"{float(row['top1']):.1%}"]
    measured += [f"{float(row[name]):.3f}" if row.get(name) else "-" for name in others]
    return [row["recipe"], f"{float(row['bits']):.3f}", *measured, _opponent(row, rows)]


def _opponent(row: Row, rows: Sequence[Row]) -> str:
    """The dense recipe that a sparse one has to beat, if there is one of so few bits."""
    if row["recipe"].startswith(DENSE):
        return ""
    most = float(row["bits"]) + EQUAL
    dense = [r for r in rows if r["recipe"].startswith(DENSE) and float(r["bits"]) <= most]
    if not dense:
        return "none measured"
    best = min(dense, key=lambda r: float(r["kl"]))
    return f"{best['recipe']}: {float(best['kl']):.3f}"
