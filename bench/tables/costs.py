"""The tables of what pruning takes: seconds and memory."""

from pathlib import Path

from bench.lib.results import Row, every, newest
from bench.tables.accuracy import latest
from bench.tables.markdown import page, run, runs

LONG = 2.0  # seconds of SparseGPT, below which it is no comparison
TIMED = ("sparsegpt", "refit(sparsegpt)", "alps", "blockwise(alps)", "thorough")


def seconds(results: Path) -> str:
    """What the methods take at 2:4, a row a model and machine, in seconds and times SparseGPT's.

    Of several calibration sets the fastest run, since others may have run beside it.
    """
    lines = []
    for case, rows in _timed_cases(results).items():
        taken: dict[str, float] = {}
        for row in rows:
            if row["method"] in TIMED and row.get("pattern", "2:4") == "2:4":
                fastest = taken.get(row["method"], float("inf"))
                taken[row["method"]] = min(fastest, float(row["seconds"]))
        base = taken.get(TIMED[0])
        if base is not None and base >= LONG and len(taken) > 1:
            cells = [
                f"{taken[m]:.0f} s, {taken[m] / base:.1f}" if m in taken else "-" for m in TIMED
            ]
            lines.append([case, *cells])
    return page(
        ["model and data", "device", *TIMED],
        lines,
        "Seconds for the whole verb at 2:4, and how many times SparseGPT's: rows of "
        "`bench.accuracy`, `bench.encoder_accuracy` and `bench.cost`.",
    )


def _timed_cases(results: Path) -> dict[str, list[Row]]:
    """Rows with seconds, of all benches that have some, by model, data and machine."""
    found: dict[str, list[Row]] = {}
    for rows in latest(results).values():
        for row in rows:
            data = f"{row['calibration_rows']} rows"
            found.setdefault(f"{row['model']}, {data} | {_machine(row)}", []).append(row)
    for rows in newest(results, "encoder-accuracy"):
        for row in rows:
            data = f"{row['calibration_sentences']} sentences"
            found.setdefault(f"all-MiniLM-L6-v2, {data} | {_machine(row)}", []).append(row)
    for row in _cost_rows(results):
        if row["streamed"] == "False":
            data = f"{row['blocks']} blocks, {row['rows']} rows of {int(row['length']):,} tokens"
            found.setdefault(f"{row['model']}, {data} | {_machine(row)}", []).append(row)
    return found


def _cost_rows(results: Path) -> list[Row]:
    return [row for rows in every(results, "cost") for row in rows]


def _machine(row: Row) -> str:
    """The GPU, or the processor and on how many threads."""
    on_cpu = row.get("driver") == "-"
    return f"{row['device']}, {row['threads']} thread(s)" if on_cpu else row["device"]


def announced(results: Path) -> str:
    """What `best` and `thorough` said that they would take, and what they took."""
    told: dict[tuple[str, ...], Row] = {}
    for row in _cost_rows(results):
        if row.get("announced"):
            told[tuple(row[key] for key in ("device", "model", "blocks", "method"))] = row
    lines = []
    for row in told.values():
        said, taken = float(row["announced"]), float(row["seconds"])
        one = f"{row['model']}, {row['blocks']} blocks, {row['rows']} x {row['length']} tokens"
        figures = [f"{said:.1f} s", f"{taken:.1f} s", f"{taken / said:.2f}"]
        lines.append([one, row["method"], *figures])
    made = dict.fromkeys(f"{run(row)}, {row['threads']} threads" for row in told.values())
    origin = f"Llamas of random weights, at 2:4; {'; '.join(made)}, `python -m bench.cost`."
    return page(["model", "method", "announced", "taken", "ratio"], lines, origin)


def cost(results: Path) -> str:
    """Seconds and memory of a method at real sizes, the last row of each case."""
    cases: dict[tuple[str, ...], Row] = {}
    for row in _cost_rows(results):
        if row["peak_gib"]:
            names = ("device", "model", "blocks", "streamed", "method")
            cases[tuple(row[name] for name in names)] = row
    lines = []
    for row in cases.values():
        method = row["method"] + (", streamed" if row["streamed"] == "True" else "")
        figures = [f"{float(row[name]):.1f}" for name in ("seconds", "peak_gib")]
        lines.append([row["model"], row["blocks"], method, *figures])
    first = next(iter(cases.values()))
    origin = (
        "The sizes of the model, random weights in bfloat16, every linear layer of the "
        f"blocks made 2:4 on {first['rows']} x {first['length']} random tokens; the peak is of "
        f"memory on the GPU, the model included; {first['device']}, torch {first['torch']}, "
        f"{runs(list(cases.values()))}, `python -m bench.cost`."
    )
    return page(["model", "blocks", "method", "seconds", "peak GiB"], lines, origin)
