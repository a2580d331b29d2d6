"""The tables of few tokens on a GPU."""

from pathlib import Path

from bench.lib.results import Row, Rows
from bench.tables.candidates import candidates, latest, layers, lines_of, quartiles, ratios_of
from bench.tables.markdown import page, runs, tokens, vs_cublas, without_figure

CUBLAS_FP16 = "cublas fp16"
OURS = ("semi24", "semi48", "int4", "int8")  # every format of ours that decodes begins so
PLAIN = " plain"  # without dependent launch
SHORT_TOKENS = (1, 8, 16, 64)


def decode(results: Path) -> str:
    """For each device, a row a layer and number of tokens and a column a candidate, losers too."""
    return "\n".join(map(_table, latest(results, "decode")))


def decode_short(results: Path) -> str:
    """For each device, ratios to dense at a few numbers of tokens: ours, and the best peer."""
    return "\n".join(map(_short_table, latest(results, "decode")))


def _table(rows: Rows) -> str:
    names = [name for name in candidates(rows) if name != CUBLAS_FP16]
    origin = f"Microseconds, ratio to dense cuBLAS, TB/s of packed bytes; {_origin(rows)}"
    missing = without_figure([f"{r['candidate']}: {r['note']}" for r in rows if not r["us"]])
    return page(["layer", "tokens", *names], lines_of(rows, names, _speed), origin, missing)


def _short_table(rows: Rows) -> str:
    formats = [n for n in candidates(rows) if n.startswith(OURS) and not n.endswith(PLAIN)]
    counts = [n for n in SHORT_TOKENS if n in {int(row["tokens"]) for row in rows}]
    lines = []
    for layer in layers(rows):
        peers = [_best_peer(rows, layer, n) for n in counts]
        lines += ratios_of(rows, layer, formats, counts)
        lines.append([layer, "best other kernel", *peers])
    heads = ["layer", "format", *map(tokens, counts)]
    return page(heads, lines, f"Ratio to dense cuBLAS; {_origin(rows)}")


def _best_peer(rows: Rows, layer: str, count: int) -> str:
    """The largest ratio of a candidate that is neither ours nor dense."""
    found = [
        row
        for row in rows
        if (row["layer"], int(row["tokens"])) == (layer, count)
        and row["candidate"] != row["baseline"]
        and row["vs_cublas"]
        and not row["candidate"].startswith(OURS)
    ]
    return vs_cublas(max(found, key=lambda row: float(row["vs_cublas"]))) if found else "-"


def _speed(row: Row) -> str:
    if not row["us"]:
        return "-"
    ratio = [] if row["candidate"] == row["baseline"] else [vs_cublas(row)]
    return ", ".join([f"{float(row['us']):.1f}", *ratio, f"{float(row['tb_s']):.1f}"])


def _origin(rows: Rows) -> str:
    first = rows[0]
    return (
        "bold where it is faster; random weights, cold, one CUDA graph, median; fp16 cuBLAS is "
        f"the dense of fp16 candidates; {first['device']}, driver {first['driver']}, torch "
        f"{first['torch']}, {runs(rows)}, `python -m bench.decode`; {quartiles(rows)}"
    )
