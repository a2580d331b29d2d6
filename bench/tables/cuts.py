"""The tables of the decode kernel's fastest launch configs; `cut` is the word of their rows."""

from pathlib import Path

from bench.lib.results import Row, Rows, newest
from bench.tables.markdown import bold, page, tokens

SHORT = ("semi24", "semi24_int4")  # stand for the others: 16-bit and 4-bit weights


def cuts(results: Path) -> str:
    """The decode kernel's fastest launch config for each layer, format and number of tokens."""
    return "\n".join(map(_table, newest(results, "cuts")))


def cuts_short(results: Path) -> str:
    """The table of `cuts` for two formats that stand for the others."""
    short = [[row for row in rows if row["format"] in SHORT] for rows in newest(results, "cuts")]
    return "\n".join(map(_table, short))


def _table(rows: Rows) -> str:
    counts = sorted({int(row["tokens"]) for row in rows})
    best: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        found = best.setdefault((row["layer"], row["format"]), {})
        if float(row["us"]) < float(found.get(int(row["tokens"]), {"us": "inf"})["us"]):
            found[int(row["tokens"])] = row
    lines = [
        [layer, name, *[_cut(found[n]) if n in found else "-" for n in counts]]
        for (layer, name), found in best.items()
    ]
    first = rows[0]
    origin = (
        "Microseconds and ratio to dense cuBLAS bf16 (at 2 tokens in the first column) in the "
        "same process; random weights, cold, a chain of dependent launches in one CUDA graph, "
        f"median; {first['device']}, driver {first['driver']}, torch {first['torch']}, "
        f"{first['date']}, `{first['call']}`, kernel.cu {first['kernel_sha256']}."
    )
    return page(["layer", "format", *map(tokens, counts)], lines, origin)


def _cut(row: Row) -> str:
    ratio = float(row["dense_cublas_bf16_us"]) / float(row["us"])
    return f"{float(row['us']):.1f}, {bold(ratio)}"
