"""The tables of many tokens on a GPU."""

import re
from collections.abc import Sequence
from pathlib import Path

from bench.lib.results import Row
from bench.tables.candidates import (
    candidates,
    latest,
    layers,
    lines_of,
    quartiles,
    ratios_of,
)
from bench.tables.markdown import page, tokens, vs_cublas

ACCELERATE = "accelerate_"
NO_LOSS = 0.97  # as in secateur.accelerate.decision: a ratio below is slower, beyond noise
SHORT = (
    *("cusparselt alg 0", "cusparselt searched", ACCELERATE, "semi24 prefill"),
    *("semi24_int4 prefill", "semi24_int8 prefill", "semi24_fp8 prefill", "int8_dynamic torch"),
    *("fp8_dynamic torch", "semi24_int8_dynamic cusparselt"),
    *("semi24_int8_dynamic prefill", "semi24_fp8_dynamic prefill"),
)


def prefill(results: Path) -> str:
    """For each device, a row a layer and number of tokens and a column a candidate, losers too."""
    return "\n".join(map(_table, latest(results, "prefill")))


def prefill_short(results: Path) -> str:
    """For each device, ratios to dense: a row a candidate, a column a number of tokens."""
    return "\n".join(map(_short_table, latest(results, "prefill")))


def _table(rows: Sequence[Row]) -> str:
    names = candidates(rows)
    reasons: dict[str, str] = {}
    for row in rows:
        if not row["us"]:
            reasons.setdefault(row["candidate"], row["note"])
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    missing = f"Without a figure, for instance: {told}." if reasons else ""
    origin = f"Microseconds, ratio to dense cuBLAS bf16; {_origin(rows)}"
    return page(["layer", "tokens", *names], lines_of(rows, names, _cell), origin, missing)


def _short_table(rows: Sequence[Row]) -> str:
    counts = sorted({int(row["tokens"]) for row in rows})
    lines = [line for layer in layers(rows) for line in ratios_of(rows, layer, SHORT, counts)]
    heads = ["layer", "runs", *map(tokens, counts)]
    return page(heads, lines, f"Ratio to dense cuBLAS bf16; {_origin(rows)}")


def _cell(row: Row) -> str:
    """Microseconds, the ratio, and what `accelerate_` chose; a dash where there is no figure."""
    if not row["us"]:
        return "-"
    us = f"{float(row['us']):.1f}"
    if row["candidate"] == row["baseline"]:
        return us
    chosen = re.match(r"runs (\w+)", row["note"]) if row["candidate"] == ACCELERATE else None
    return f"{us}, {vs_cublas(row)}" + (f" ({chosen[1]})" if chosen else "")


def _origin(rows: Sequence[Row]) -> str:
    first = rows[0]
    runs = dict.fromkeys(
        f"{row['date']}, commit {row['commit']}, `{row['command']}`" for row in rows
    )
    return (
        "bold where it is faster; random weights, cold, with a bias, one CUDA graph, median; "
        f"`_dynamic` with the rounding of the inputs; {first['device']}, driver {first['driver']}, "
        f"torch {first['torch']}, {'; '.join(runs)}; "
        f"{quartiles(rows)} {_losses(rows)}"
    )


def _losses(rows: Sequence[Row]) -> str:
    """In how many cases what `accelerate_` chose is slower than dense beyond noise, and which."""
    timed = [row for row in rows if row["candidate"] == ACCELERATE and row["vs_cublas"]]
    lost = [
        f"{row['layer']} at {row['tokens']} ({float(row['vs_cublas']):.2f})"
        for row in timed
        if float(row["vs_cublas"]) < NO_LOSS
    ]
    where = f": {'; '.join(lost)}" if lost else ""
    return (
        f"`{ACCELERATE}` is more than {1 - NO_LOSS:.0%} slower than dense in {len(lost)} of "
        f"{len(timed)} cases{where}."
    )
