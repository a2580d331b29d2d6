"""The table of layers on a CPU: every format against both ways to run dense."""

from pathlib import Path

from bench.lib.results import Row, Rows, every
from bench.tables.markdown import page, tokens

DENSES = ("dense", "dense prepacked")


def linear_cpu_all(results: Path) -> str:
    """For each device, the speed-ups on all layers and in all dtypes, of its last commit."""
    last = {rows[0]["device"]: rows for rows in every(results, "linear")}
    return "\n".join(map(_table, last.values()))


def _table(rows: Rows) -> str:
    counts = sorted({int(row["tokens"]) for row in rows})
    heads = ["layer", "dtype", "runs", "zeros", "bytes", *map(tokens, counts)]
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    dense = {_weight(row): int(row["weight_bytes"]) for row in rows if row["candidate"] == "dense"}
    for row in rows:
        if row["candidate"] in DENSES:
            continue
        share = int(row["weight_bytes"]) / dense[_weight(row)]
        key = (*_weight(row), row["candidate"], f"{float(row['sparsity']):.0%}", f"{share:.2f}")
        cells.setdefault(key, {})[int(row["tokens"])] = _ratios(row)
    lines = [
        [*key, *[by_tokens.get(count, "-") for count in counts]] for key, by_tokens in cells.items()
    ]
    return page(heads, lines, _origin(rows))


def _weight(row: Row) -> tuple[str, str]:
    return f"{row['out']} x {row['in']}", row["dtype"]


def _ratios(row: Row) -> str:
    """Over each baseline that was measured, bold where every one is beaten."""
    names = ("vs_eager", "vs_prepacked", "vs_int8")
    ratios = [float(row[name]) for name in names if row.get(name)]
    text = " / ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"**{text}**" if min(ratios) >= 1 else text


def _origin(rows: Rows) -> str:
    first = rows[0]
    loudest = max(float(row["others"]) for row in rows)
    over = "over eager / over prepacked dense (16-bit: over eager), bold where it beats both"
    if any(row.get("vs_int8") for row in rows):
        over = (
            "over eager / over prepacked dense (16-bit: over eager) / over torch's dense int8, "
            "where inputs are rounded, bold where it beats all"
        )
    return (
        f"Speed-up {over}; {first['device']}, {first['threads']} threads, torch {first['torch']}, "
        f"{first['date']}, commit {first['commit']}, `python -m bench.linear`; other processes "
        f"took at most {loudest:.0%} of the machine."
    )
