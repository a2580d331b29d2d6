"""The tables of a whole image encoder: its speed, and what the same configurations cost."""

from collections.abc import Sequence
from pathlib import Path

from bench.lib.results import Row, Rows, newest
from bench.tables.markdown import bold, page, run, without_figure

DENSE = "dense"
RECOVERY = {"none": "before recovery", "reconstruct": "reconstructed", "train": "trained on"}


def vit(results: Path) -> str:
    """For each device, an image encoder end to end: a row a configuration and batch, losers too."""
    return "\n".join(map(_speed_table, newest(results, "vit")))


def vision(results: Path) -> str:
    """What the same configurations cost a small vision transformer, before and after recovery."""
    return "\n".join(map(_loss_table, newest(results, "vision")))


def _speed_table(rows: Rows) -> str:
    dense = {_encoder(row): row for row in rows if row["configuration"] == DENSE and row["img_s"]}
    lines = []
    for row in rows:
        figures = ["-"] * 4
        if row["img_s"]:
            speed = [f"{float(row['img_s']):.2f}", _gain(row, dense.get(_encoder(row)))]
            figures = [*speed, row["peak_mib"] or "-", f"{float(row['error']):.4f}"]
        lines.append([*_encoder(row), row["configuration"], *figures])
    first = rows[0]
    origin = (
        "Bold where it is faster than dense; random weights in bfloat16, compiled with "
        "max-autotune (the tiny model only traced), median of "
        f"{first['rounds'] or 'no'} calls; error of the output to the same pruned weights run "
        f"dense; {first['device']}, driver {first['driver']}, torch {first['torch']}, "
        f"{first['date']}, commit {first['commit']}, `python -m bench.vit`."
    )
    failed = [row for row in rows if not row["img_s"]]
    missing = without_figure(
        [f"{row['configuration']}, batch {row['batch']}: {row['note']}" for row in failed]
    )
    heads = ["model", "batch", "configuration", "img/s", "to dense", "peak MiB", "error"]
    return page(heads, lines, origin, missing)


def _encoder(row: Row) -> tuple[str, str]:
    return row["model"], row["batch"]


def _gain(row: Row, dense: Row | None) -> str:
    return "-" if dense is None else bold(float(row["img_s"]) / float(dense["img_s"]))


def _loss_table(rows: Rows) -> str:
    kinds = [kind for kind in RECOVERY if kind in {row["recovery"] for row in rows}]
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        by_recovery = found.setdefault(row["configuration"], {})
        by_recovery.setdefault(row["recovery"], []).append(float(row["top1"]))
    lines = [
        [name, *[_mean(by_recovery[kind]) if kind in by_recovery else "-" for kind in kinds]]
        for name, by_recovery in found.items()
    ]
    first, seeds = rows[0], len({row["seed"] for row in rows})
    origin = (
        f"Mean and range of {seeds} seeds, on {first['left_out']} digits left out; a vision "
        f"transformer of {first['layers']} blocks of width {first['hidden']}, trained in float32; "
        f"{run(first)}, `python -m bench.vision`."
    )
    return page(["top-1", *[RECOVERY[kind] for kind in kinds]], lines, origin)


def _mean(shares: Sequence[float]) -> str:
    mean = sum(shares) / len(shares)
    return f"{mean:.1%} ({min(shares):.1%} to {max(shares):.1%})"
