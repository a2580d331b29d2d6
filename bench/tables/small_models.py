"""The tables of what pruning costs two small models: a vision transformer, a sentence encoder."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from bench.lib.results import Row, Rows, newest
from bench.tables.markdown import libraries, page, run, without_figure


def vision_accuracy(results: Path) -> str:
    """Top-1 of a small vision transformer, a row a method and a column a pattern, mean of seeds."""
    return "\n".join(map(_vision_table, newest(results, "vision-accuracy")))


def encoder_accuracy(results: Path) -> str:
    """Cosine of a sentence encoder's embeddings to dense, a row a method and a column a pattern."""
    return "\n".join(map(_encoder_table, newest(results, "encoder-accuracy")))


def _vision_table(rows: Rows) -> str:
    first, seeds = rows[0], len({row["seed"] for row in rows})
    origin = (
        f"Mean and range of {seeds} seeds, on {first['left_out']} digits left out; a vision "
        f"transformer of {first['layers']} blocks of width {first['hidden']}; {run(first)}, "
        f"`python -m bench.vision_accuracy`. {libraries(rows)}"
    )
    return _by_pattern(rows, "top-1; KL to dense", "{:.1%}", "top1", "kl", origin)


def _encoder_table(rows: Rows) -> str:
    first = rows[0]
    origin = (
        f"all-MiniLM-L6-v2, {first['calibration_sentences']} calibration and "
        f"{first['test_sentences']} other sentences; {run(first)}, "
        f"`python -m bench.encoder_accuracy`. {libraries(rows)}"
    )
    return _by_pattern(rows, "mean cosine to dense", "{:.3f}", "cosine", "", origin)


def _by_pattern(rows: Rows, head: str, form: str, column: str, divergence: str, origin: str) -> str:
    """A row a method that has figures, a column a pattern; of several rows the mean and range.

    Of the divergence, if there is a column of it, the mean.
    """
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    cells: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row[column]:
            by_pattern = cells.setdefault(row["method"], {})
            by_pattern.setdefault(row["pattern"], []).append(row)

    def cell(found: Sequence[Row]) -> str:
        text = _spread([float(row[column]) for row in found], form)
        diverged = [float(row[divergence]) for row in found if divergence and row[divergence]]
        return f"{text}; {fmean(diverged):.3f}" if diverged else text

    lines = [
        [name, *[cell(found[p]) if p in found else "-" for p in patterns]]
        for name, found in cells.items()
    ]
    missing = without_figure([f"{r['method']}: {r['note']}" for r in rows if not r[column]])
    below = [missing, "", origin] if missing else [origin]
    return page([head, *patterns], lines, "\n".join(below).rstrip())


def _spread(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(fmean(values)) + (f" ({low} to {high})" if low != high else "")
