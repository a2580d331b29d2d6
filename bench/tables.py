"""The tables of the README and the docs, from the raw rows in bench/results.

    python -m bench.tables            # writes them
    python -m bench.tables --check    # exit code 1 if a file is stale

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; nothing there is typed by hand.
"""

import argparse
import csv
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.accuracy_tables import (
    accuracy_all,
    announced,
    cost,
    encoder_accuracy,
    seconds,
    vision_accuracy,
)
from bench.allocation_tables import allocation, budget
from bench.prefill_tables import prefill, prefill_short
from bench.readme_tables import accuracy_short, speed_short

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
DENSE = "dense"
DENSES = (DENSE, "dense prepacked")
CUBLAS_FP16 = "cublas fp16"
OURS = "semi24"  # every format of ours that decodes begins so
PLAIN = " plain"  # without dependent launch
SHORT_TOKENS = (1, 8, 16, 64)
CUTS_SHORT = ("semi24", "semi24_int4")
RECOVERY = {"none": "before recovery", "reconstruct": "reconstructed", "train": "trained on"}

Rows = Sequence[Mapping[str, str]]


def every(results: Path, bench: str) -> list[Rows]:
    """The rows of each file of the bench, the oldest first; a file is of one device and commit."""
    return [_read(path) for path in _files(results, bench)]


def newest(results: Path, bench: str) -> list[Rows]:
    """Those of the bench's latest date."""
    files = _files(results, bench)
    return [_read(path) for path in files if _date(path) == _date(files[-1])]


def _files(results: Path, bench: str) -> list[Path]:
    files = sorted(sorted(results.glob(f"{bench}_*.csv")), key=_begun)
    if not files:
        raise ValueError(f"tables need rows of {bench}, got none in {results}: run bench.{bench}")
    return files


def _begun(path: Path) -> tuple[str, str]:
    """Date and time of the file's first row; older rows have no time and are the day's first."""
    rows = _read(path)
    return _date(path), rows[0].get("time", "") if rows else ""


def _date(path: Path) -> str:
    return path.name.split("_")[1]


def linear_cpu_all(results: Path) -> str:
    """For each device, the speed-ups on all layers and in all dtypes."""
    return "\n".join(map(_linear_table, newest(results, "linear")))


def decode(results: Path) -> str:
    """For each device, a row a layer and number of tokens and a column a candidate, losers too."""
    return "\n".join(map(_decode_table, newest(results, "decode")))


def decode_short(results: Path) -> str:
    """For each device, ratios to dense at a few numbers of tokens: ours, and the best peer."""
    return "\n".join(map(_decode_short_table, newest(results, "decode")))


def cuts(results: Path) -> str:
    """The fastest cut of the decode kernel for each layer, format and number of tokens."""
    return "\n".join(map(_cuts_table, newest(results, "cuts")))


def cuts_short(results: Path) -> str:
    """The same for the formats that stand for the others: 16-bit and 4-bit weights."""
    short = [[r for r in rows if r["format"] in CUTS_SHORT] for rows in newest(results, "cuts")]
    return "\n".join(map(_cuts_table, short))


def grids(results: Path) -> str:
    """What rounding to each grid costs, a column each kind of weight and way to its scales."""
    rows = newest(results, "grids")[-1]
    heads = list(dict.fromkeys((row["weights"], row["scales"]) for row in rows))
    cells: dict[str, list[str]] = {}
    for row in rows:
        cells.setdefault(row["grid"], []).append(f"{float(row['error']):.4f}")
    lines = [_line(["grid", *[f"{weights}, {scales}" for weights, scales in heads]])]
    lines += [_line(["---"] * (1 + len(heads)))]
    lines += [_line([f"`{grid}`", *found]) for grid, found in cells.items()]
    origin = f"torch {rows[0]['torch']}, commit {rows[0]['commit']}, `python -m bench.grids`."
    return "\n".join([*lines, "", origin]) + "\n"


def vit(results: Path) -> str:
    """For each device, an image encoder end to end: a row a configuration and batch, losers too."""
    return "\n".join(map(_vit_table, newest(results, "vit")))


def vision(results: Path) -> str:
    """What the same configurations cost a small vision transformer, before and after recovery."""
    return "\n".join(map(_vision_table, newest(results, "vision")))


def _cuts_table(rows: Rows) -> str:
    tokens = sorted({int(row["tokens"]) for row in rows})
    best: dict[tuple[str, str], dict[int, Mapping[str, str]]] = {}
    for row in rows:
        found = best.setdefault((row["layer"], row["format"]), {})
        if float(row["us"]) < float(found.get(int(row["tokens"]), {"us": "inf"})["us"]):
            found[int(row["tokens"])] = row
    lines = [_line(["layer", "format", *map(_tokens, tokens)])]
    lines += [_line(["---"] * (2 + len(tokens)))]
    for (layer, name), found in best.items():
        lines.append(_line([layer, name, *[_cut(found[n]) if n in found else "-" for n in tokens]]))
    first = rows[0]
    origin = (
        "Microseconds and ratio to dense cuBLAS bf16 (that of 2 tokens in the first column) in the "
        "same process; random weights, cold, a chain of dependent launches in one CUDA graph, "
        f"median; {first['device']}, driver {first['driver']}, torch {first['torch']}, "
        f"{first['date']}, `{first['call']}`, kernel.cu {first['kernel_sha256']}."
    )
    return "\n".join([*lines, "", origin]) + "\n"


def _cut(row: Mapping[str, str]) -> str:
    ratio = float(row["dense_cublas_bf16_us"]) / float(row["us"])
    return f"{float(row['us']):.1f}, " + (f"**{ratio:.2f}**" if ratio > 1 else f"{ratio:.2f}")


def _decode_table(rows: Rows) -> str:
    names = [name for name in _candidates(rows) if name != CUBLAS_FP16]
    lines = [_line(["layer", "tokens", *names]), _line(["---"] * (2 + len(names)))]
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["layer"], int(row["tokens"])), {})[row["candidate"]] = _speed(row)
    lines += [
        _line([layer, str(tokens), *[by_name.get(name, "-") for name in names]])
        for (layer, tokens), by_name in cells.items()
    ]
    origin = f"Microseconds, ratio to dense cuBLAS, TB/s of packed bytes; {_decode_origin(rows)}"
    reasons = dict.fromkeys(f"{r['candidate']}: {r['note']}" for r in rows if not r["us"])
    missing = [f"Without a figure: {'; '.join(reasons)}."] if reasons else []
    return "\n".join([*lines, "", origin, *missing]) + "\n"


def _decode_short_table(rows: Rows) -> str:
    formats = [n for n in _candidates(rows) if n.startswith(OURS) and not n.endswith(PLAIN)]
    tokens = [n for n in SHORT_TOKENS if n in {int(row["tokens"]) for row in rows}]
    lines = [_line(["layer", "format", *map(_tokens, tokens)])]
    lines += [_line(["---"] * (2 + len(tokens)))]
    ratios = {(r["layer"], r["candidate"], int(r["tokens"])): _ratio(r) for r in rows}
    for layer in dict.fromkeys(row["layer"] for row in rows):
        for name in formats:
            if any((layer, name, n) in ratios for n in tokens):
                found = [ratios.get((layer, name, n), "-") for n in tokens]
                lines.append(_line([layer, name, *found]))
        lines.append(
            _line([layer, "best other kernel", *[_best_peer(rows, layer, n) for n in tokens]])
        )
    return "\n".join([*lines, "", f"Ratio to dense cuBLAS; {_decode_origin(rows)}"]) + "\n"


def _best_peer(rows: Rows, layer: str, tokens: int) -> str:
    """The largest ratio of a candidate that is neither ours nor dense."""
    found = [
        row
        for row in rows
        if (row["layer"], int(row["tokens"])) == (layer, tokens)
        and row["candidate"] != row["baseline"]
        and row["vs_cublas"]
        and not row["candidate"].startswith(OURS)
    ]
    return _ratio(max(found, key=lambda row: float(row["vs_cublas"]))) if found else "-"


def _candidates(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["candidate"] for row in rows))


def _ratio(row: Mapping[str, str]) -> str:
    """How many times faster than dense, bold above 1; a dash where there is no figure."""
    if not row["vs_cublas"]:
        return "-"
    text = f"{float(row['vs_cublas']):.2f}"
    return f"**{text}**" if float(row["vs_cublas"]) > 1 else text


def _speed(row: Mapping[str, str]) -> str:
    if not row["us"]:
        return "-"
    parts = [f"{float(row['us']):.1f}"]
    if row["candidate"] != row["baseline"]:
        parts.append(_ratio(row))
    return ", ".join([*parts, f"{float(row['tb_s']):.1f}"])


def _decode_origin(rows: Rows) -> str:
    first = rows[0]
    timed = [row for row in rows if row["us"]]
    spread = max((float(r["high_us"]) - float(r["low_us"])) / float(r["us"]) for r in timed)
    return (
        "bold where it is faster; random weights, cold, one CUDA graph, median; fp16 cuBLAS is "
        f"the dense of fp16 candidates; {first['device']}, driver {first['driver']}, torch "
        f"{first['torch']}, {first['date']}, commit {first['commit']}, `python -m bench.decode`; "
        f"quartiles at most {spread:.0%} of the median apart."
    )


def _vit_table(rows: Rows) -> str:
    dense = {_encoder(row): row for row in rows if row["configuration"] == DENSE and row["img_s"]}
    heads = ["model", "batch", "configuration", "img/s", "to dense", "peak MiB", "error"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in rows:
        if row["img_s"]:
            speed = [f"{float(row['img_s']):.2f}", _gain(row, dense.get(_encoder(row)))]
            figures = [*speed, row["peak_mib"] or "-", f"{float(row['error']):.4f}"]
        else:
            figures = ["-"] * 4
        lines.append(_line([*_encoder(row), row["configuration"], *figures]))
    first = rows[0]
    origin = (
        "Bold where it is faster than dense; random weights in bfloat16, compiled with "
        "max-autotune (the tiny model only traced), median of "
        f"{first['rounds'] or 'no'} calls; error of the output to the same pruned weights run "
        f"dense; {first['device']}, driver {first['driver']}, torch {first['torch']}, "
        f"{first['date']}, commit {first['commit']}, `python -m bench.vit`."
    )
    reasons = [
        f"{row['configuration']}, batch {row['batch']}: {row['note']}"
        for row in rows
        if not row["img_s"]
    ]
    missing = [f"Without a figure: {'; '.join(reasons)}."] if reasons else []
    return "\n".join([*lines, "", origin, *missing]) + "\n"


def _encoder(row: Mapping[str, str]) -> tuple[str, str]:
    return row["model"], row["batch"]


def _gain(row: Mapping[str, str], dense: Mapping[str, str] | None) -> str:
    if dense is None:
        return "-"
    ratio = float(row["img_s"]) / float(dense["img_s"])
    return f"**{ratio:.2f}**" if ratio > 1 else f"{ratio:.2f}"


def _vision_table(rows: Rows) -> str:
    kinds = [kind for kind in RECOVERY if kind in {row["recovery"] for row in rows}]
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        by_recovery = found.setdefault(row["configuration"], {})
        by_recovery.setdefault(row["recovery"], []).append(float(row["top1"]))
    lines = [_line(["top-1", *[RECOVERY[kind] for kind in kinds]])]
    lines += [_line(["---"] * (1 + len(kinds)))]
    for name, by_recovery in found.items():
        cells = [_mean(by_recovery[kind]) if kind in by_recovery else "-" for kind in kinds]
        lines.append(_line([name, *cells]))
    first, seeds = rows[0], len({row["seed"] for row in rows})
    origin = (
        f"Mean and range of {seeds} seeds, on {first['left_out']} digits left out; a vision "
        f"transformer of {first['layers']} blocks of width {first['hidden']}, trained in float32; "
        f"{first['device']}, torch {first['torch']}, {first['date']}, commit {first['commit']}, "
        "`python -m bench.vision`."
    )
    return "\n".join([*lines, "", origin]) + "\n"


def _mean(shares: Sequence[float]) -> str:
    mean = sum(shares) / len(shares)
    return f"{mean:.1%} ({min(shares):.1%} to {max(shares):.1%})"


def _linear_table(rows: Rows) -> str:
    tokens = sorted({int(row["tokens"]) for row in rows})
    heads = ["layer", "dtype", "runs", "zeros", "bytes", *map(_tokens, tokens)]
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    dense = {_weight(row): int(row["weight_bytes"]) for row in rows if row["candidate"] == "dense"}
    for row in rows:
        if row["candidate"] in DENSES:
            continue
        share = int(row["weight_bytes"]) / dense[_weight(row)]
        key = (*_weight(row), row["candidate"], f"{float(row['sparsity']):.0%}", f"{share:.2f}")
        cells.setdefault(key, {})[int(row["tokens"])] = _ratios(row)
    lines = [_line(heads), _line(["---"] * len(heads))]
    lines += [
        _line([*key, *[by_tokens.get(count, "-") for count in tokens]])
        for key, by_tokens in cells.items()
    ]
    return "\n".join([*lines, "", _origin(rows)]) + "\n"


def _weight(row: Mapping[str, str]) -> tuple[str, str]:
    return f"{row['out']} x {row['in']}", row["dtype"]


def _ratios(row: Mapping[str, str]) -> str:
    """Over eager / over prepacked, bold where every baseline that was measured is beaten."""
    ratios = [float(row[name]) for name in ("vs_eager", "vs_prepacked") if row[name]]
    text = " / ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"**{text}**" if min(ratios) >= 1 else text


TABLES: dict[str, Callable[[Path], str]] = {
    "accuracy-all": accuracy_all,
    "accuracy-short": accuracy_short,
    "allocation": allocation,
    "announced": announced,
    "budget": budget,
    "cost": cost,
    "cuts": cuts,
    "cuts-short": cuts_short,
    "decode": decode,
    "decode-short": decode_short,
    "encoder-accuracy": encoder_accuracy,
    "grids": grids,
    "linear-cpu-all": linear_cpu_all,
    "prefill": prefill,
    "prefill-short": prefill_short,
    "seconds": seconds,
    "speed-short": speed_short,
    "vision": vision,
    "vision-accuracy": vision_accuracy,
    "vit": vit,
}


def render(text: str, results: Path) -> str:
    """The text with every table in it made anew.

    Raises: ValueError for a name that is no table.
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"no table is named {name!r}: tables are {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[name](results)}\n{match[3]}"

    return BLOCK.sub(table, text)


def stale(files: Sequence[Path], results: Path, write: bool) -> list[Path]:
    """The files whose tables differ from the rows; with `write` they are brought up to date."""
    found = []
    for path in files:
        text = path.read_text()
        fresh = render(text, results)
        if fresh != text:
            found.append(path)
            if write:
                path.write_text(fresh)
    return found


def _read(path: Path) -> Rows:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _origin(rows: Rows) -> str:
    first = rows[0]
    loudest = max(float(row["others"]) for row in rows)
    return (
        "Speed-up over eager / over prepacked dense (16-bit: over eager), bold where it beats "
        f"both; {first['device']}, {first['threads']} threads, torch {first['torch']}, "
        f"{first['date']}, commit {first['commit']}, `python -m bench.linear`; other processes "
        f"took at most {loudest:.0%} of the machine."
    )


def _tokens(count: int) -> str:
    return f"{count} token" + "s" * (count != 1)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(words: Sequence[str] | None = None) -> int:
    """Writes the tables, or with --check says which files are stale; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("files", nargs="*", type=Path)
    arguments = parser.parse_args(words)
    files = arguments.files or [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    found = stale(files, arguments.results, write=not arguments.check)
    for path in found:
        print(f"{path}: {'stale, run python -m bench.tables' if arguments.check else 'written'}")
    return int(arguments.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
