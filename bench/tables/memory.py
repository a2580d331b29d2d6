"""The table of what a language model holds in memory once its layers are packed."""

from pathlib import Path

from bench.lib.results import Row, Rows, newest
from bench.tables.markdown import page, run, without_figure

DENSE = "dense"
HEADS = ("configuration", "layers packed", "file GB", "held GB")
ON_GPU = ("allocated GB", "to dense", "peak GB", "to dense")


def memory(results: Path) -> str:
    """For each device and model, gigabytes of each configuration and their share of dense."""
    return "\n".join(map(_table, newest(results, "memory")))


def _table(rows: Rows) -> str:
    dense = {_model(row): row for row in rows if row["configuration"] == DENSE and not row["note"]}
    lines = [
        [_name(row), *_figures(row, dense.get(_model(row)))] for row in rows if not row["note"]
    ]
    first = rows[0]
    origin = (
        "transformers' Llama, random weights in bfloat16, all linear layers of its blocks 2:4, "
        "head and embeddings dense. File: the weights that a folder holds; held: parameters and "
        "buffers in use; allocated: by torch on the GPU, after a prompt; peak: during the prompt, "
        f"its cache of keys and values included. A process a row; {run(first)}, "
        "`python -m bench.run.memory`."
    )
    failed = [f"{_name(row)}: {row['note']}" for row in rows if row["note"]]
    return page([*HEADS, *ON_GPU], lines, origin, without_figure(failed))


def _model(row: Row) -> tuple[str, ...]:
    return row["model"], row["blocks"], row["prompt"]


def _name(row: Row) -> str:
    """`llama-3-8b, prompt of 2048: semi24_int4 by accelerate_`."""
    packed = (
        "" if row["configuration"] == DENSE else f" by `{row['verb']}_`, {row['tokens']} tokens"
    )
    blocks = f"{row['model']}, {row['blocks']} blocks, prompt of {int(row['prompt']):,}"
    return f"{blocks}: {row['configuration']}{packed}"


def _figures(row: Row, dense: Row | None) -> list[str]:
    cells = [row["packed"], _gigabytes(row["file"]), _gigabytes(row["held"])]
    for name in ("allocated", "peak"):
        if not row[name]:
            cells += ["-", "-"]
            continue
        share = "-" if dense is None else f"{int(row[name]) / int(dense[name]):.2f}"
        cells += [_gigabytes(row[name]), share]
    return cells


def _gigabytes(nbytes: str) -> str:
    return f"{int(nbytes) / 1e9:.2f}"
