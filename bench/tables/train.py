"""The tables of training in 2:4: a layer's step beside dense bf16 and dense FP8, and the packs."""

from collections.abc import Sequence
from pathlib import Path

from bench.lib.results import Row, every
from bench.tables.candidates import candidates, lines_of, quartiles
from bench.tables.markdown import page, run, runs, vs_cublas, without_figure

STEP = " forward + backward"


def train(results: Path) -> str:
    """For each device, ratios of steps to dense bf16: a line a layer and number of tokens."""
    return "\n".join(_steps(rows) for rows in _latest(results) if any(r["tokens"] for r in rows))


def train_packs(results: Path) -> str:
    """For each device, microseconds of the pass that packs a weight, beside a copy."""
    return "\n".join(_packs(rows) for rows in _latest(results) if any(_is_pack(r) for r in rows))


def _latest(results: Path) -> list[list[Row]]:
    devices: dict[str, dict[tuple[str, str, str], Row]] = {}
    for rows in every(results, "train"):
        run = {(row["layer"], row["tokens"], row["candidate"]): row for row in rows}
        devices.setdefault(rows[0]["device"], {}).update(run)
    return [list(cases.values()) for cases in devices.values()]


def _is_pack(row: Row) -> bool:
    return not row["tokens"]


def _steps(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if not _is_pack(row)]
    dense = [row for row in rows if row["candidate"] == row["baseline"]]
    names = [name for name in candidates(rows) if name != dense[0]["candidate"]]
    microseconds = {(row["layer"], row["tokens"]): f"{float(row['us']):,.0f}" for row in dense}
    lines = [
        [layer, f"{int(count):,}", microseconds.get((layer, count), "-"), *ratios]
        for layer, count, *ratios in lines_of(rows, names, vs_cublas)
    ]
    heads = ["layer", "tokens", "dense bf16, us", *(name.removesuffix(STEP) for name in names)]
    origin = (
        "Ratio of dense bf16's time to forward and backward of one layer, rounding and packing "
        "included but for `fp8 products alone`; random bf16 weights, cold, without a bias, one "
        f"CUDA graph, median; {run(rows[0]).partition(', 2')[0]}, {runs(rows)}; {quartiles(rows)}"
    )
    missing = [f"{row['candidate']}: {row['note']}" for row in rows if not row["us"]]
    return page(heads, lines, origin, without_figure(missing))


def _packs(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if _is_pack(row)]
    kinds = list(dict.fromkeys(row["candidate"].rpartition(" ")[0] for row in rows))
    cells = {(r["layer"], r["dtype"], r["candidate"].rpartition(" ")[0]): r["us"] for r in rows}
    lines = [
        [layer, dtype, *(f"{float(cells[layer, dtype, kind]):.1f}" for kind in kinds)]
        for layer, dtype in dict.fromkeys((row["layer"], row["dtype"]) for row in rows)
    ]
    origin = (
        "Microseconds to read a weight and write both packs in bfloat16, beside a copy of as many "
        f"bytes; cold, one CUDA graph, median; {run(rows[0])}; {quartiles(rows)}"
    )
    return page(["weight", "stored as", *kinds], lines, origin)
