"""The tables `prefill` and `prefill-short` of `bench.tables`, which imports this module."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

ACCELERATE = "accelerate_"
NO_LOSS = 0.97  # as in secateur.accelerate.decision: a ratio below is slower, beyond noise
SHORT = (
    *("cusparselt alg 0", "cusparselt searched", ACCELERATE, "int8_dynamic torch"),
    *("fp8_dynamic torch", "semi24_int8_dynamic cusparselt"),
    *("semi24_int8_dynamic prefill", "semi24_fp8_dynamic prefill"),
)

Row = Mapping[str, str]


def prefill(results: Path) -> str:
    """For each device, a row a layer and number of tokens and a column a candidate, losers too."""
    return "\n".join(map(_table, latest(results)))


def prefill_short(results: Path) -> str:
    """For each device, ratios to dense: a row a candidate, a column a number of tokens."""
    return "\n".join(map(_short_table, latest(results)))


def latest(results: Path) -> list[list[Row]]:
    """For each device, the rows of every layer and number of tokens from the last run that had it.

    A run of all cases takes longer than a device may be had for.
    """
    from bench.tables import every  # here, because it imports this module

    devices: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for rows in every(results, "prefill"):
        run: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            run.setdefault((row["layer"], row["tokens"]), []).append(row)
        devices.setdefault(rows[0]["device"], {}).update(run)
    return [
        [row for case in sorted(cases, key=_order) for row in cases[case]]
        for cases in devices.values()
    ]


def _order(case: tuple[str, str]) -> tuple[str, int]:
    return case[0], int(case[1])


def _table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["layer"], row["tokens"]), {})[row["candidate"]] = _cell(row)
    lines = [
        [layer, tokens, *[by_name.get(name, "-") for name in names]]
        for (layer, tokens), by_name in cells.items()
    ]
    text = _markdown(["layer", "tokens", *names], lines)
    reasons: dict[str, str] = {}
    for row in rows:
        if not row["us"]:
            reasons.setdefault(row["candidate"], row["note"])
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    missing = f"Without a figure, for instance: {told}.\n" if reasons else ""
    return f"{text}\nMicroseconds, ratio to dense cuBLAS bf16; {_origin(rows)}\n{missing}"


def _short_table(rows: Sequence[Row]) -> str:
    tokens = sorted({int(row["tokens"]) for row in rows})
    ratios = {(r["layer"], r["candidate"], int(r["tokens"])): _ratio(r) for r in rows}
    lines = [
        [layer, name, *[ratios.get((layer, name, n), "-") for n in tokens]]
        for layer in dict.fromkeys(row["layer"] for row in rows)
        for name in SHORT
        if any((layer, name, n) in ratios for n in tokens)
    ]
    heads = [f"{n} token" + "s" * (n != 1) for n in tokens]
    text = _markdown(["layer", "runs", *heads], lines)
    return f"{text}\nRatio to dense cuBLAS bf16; {_origin(rows)}\n"


def _cell(row: Row) -> str:
    """Microseconds, the ratio, and what `accelerate_` chose; a dash where there is no figure."""
    if not row["us"]:
        return "-"
    us = f"{float(row['us']):.1f}"
    if row["candidate"] == row["baseline"]:
        return us
    chosen = re.match(r"runs (\w+)", row["note"]) if row["candidate"] == ACCELERATE else None
    return f"{us}, {_ratio(row)}" + (f" ({chosen[1]})" if chosen else "")


def _ratio(row: Row) -> str:
    """How many times faster than dense, bold above 1."""
    if not row["vs_cublas"]:
        return "-"
    text = f"{float(row['vs_cublas']):.2f}"
    return f"**{text}**" if float(row["vs_cublas"]) > 1 else text


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (heads, ["---"] * len(heads), *lines))


def _origin(rows: Sequence[Row]) -> str:
    first, timed = rows[0], [row for row in rows if row["us"]]
    runs = dict.fromkeys(
        f"{row['date']}, commit {row['commit']}, `{row['command']}`" for row in rows
    )
    spread = max((float(r["high_us"]) - float(r["low_us"])) / float(r["us"]) for r in timed)
    return (
        "bold where it is faster; random weights, cold, with a bias, one CUDA graph, median; "
        f"`_dynamic` with the rounding of the inputs; {first['device']}, driver {first['driver']}, "
        f"torch {first['torch']}, {'; '.join(runs)}; "
        f"quartiles at most {spread:.0%} of the median apart. {_losses(rows)}"
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
