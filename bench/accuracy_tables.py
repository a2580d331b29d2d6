"""The tables of what pruning loses and takes, for `bench.tables`, which imports this module."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

Row = Mapping[str, str]
# device, calibration rows, whether they are of as many documents as there are, validation rows
Case = tuple[str, int, bool, str]

PAPER = "sparsegpt, algorithm 1 in float64"
LONG = 2.0  # seconds of SparseGPT, below which it is no comparison
TIMED = ("sparsegpt", "refit(sparsegpt)", "alps", "blockwise(alps)", "thorough")


def accuracy_all(results: Path) -> str:
    """Perplexity and more, a row a method and a column a pattern, of every case.

    A case is a device, a number of calibration rows, how they were dealt, and validation rows.
    """
    return "\n".join(map(table, latest(results).values()))


def latest(results: Path) -> dict[Case, list[Row]]:
    """The rows of each case, of every method, pattern and calibration set the last that there is.

    A run of all of them takes longer than a device may be had for. Each row has its `r_kl` added,
    which needs the paper's row of the same run.
    """
    from bench.tables import every  # here, because it imports this module

    cases: dict[Case, dict[tuple[str, ...], Row]] = {}
    for rows in every(results, "accuracy"):
        papers = {_run_of(row): row for row in rows if row["method"] == PAPER}
        for row in rows:
            dealt = bool(row.get("documents"))
            case = (row["device"], int(row["calibration_rows"]), dealt, row["validation_rows"])
            one = (row["method"], row["pattern"], _set_of(row))
            cases.setdefault(case, {})[one] = {**row, "r_kl": _r_kl(row, papers.get(_run_of(row)))}
    return {case: list(cases[case].values()) for case in sorted(cases)}


def _set_of(row: Row) -> str:
    """Which calibration rows: by their seed, or by the first of rows that follow one another."""
    return row.get("seed") or row["first_row"]


def _run_of(row: Row) -> tuple[str, ...]:
    """What rows of one run on one calibration set share."""
    return (row.get("command", ""), row["pattern"], row["calibration_rows"], _set_of(row))


def _r_kl(row: Row, baseline: Row | None) -> str:
    """The share of the baseline's KL that the row avoids."""
    if baseline is None or not row.get("kl"):
        return ""
    return str(1 - float(row["kl"]) / float(baseline["kl"]))


def table(rows: Sequence[Row]) -> str:
    """Perplexity and more, a row a method and a column a pattern."""
    cells: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row["nll"]:
            by_pattern = cells.setdefault(row["method"], {})
            by_pattern.setdefault(row["pattern"], []).append(row)
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    lines = [["perplexity (top-1 as dense; R_S; R_KL)", *patterns], ["---"] * (1 + len(patterns))]
    for name in sorted(cells, key=lambda name: _place(cells[name], patterns)):
        found = cells[name]
        lines.append([name, *[_cell(found[p]) if p in found else "-" for p in patterns]])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{_origin(rows)}\n"


def _place(found: Mapping[str, Sequence[Row]], patterns: Sequence[str]) -> tuple[bool, float]:
    """Dense first, then those that lose most in the first pattern that they have."""
    rows = next(found[pattern] for pattern in patterns if pattern in found)
    return rows[0]["method"] != "dense", -fmean(float(row["nll"]) for row in rows)


def _cell(rows: Sequence[Row]) -> str:
    """The mean over calibration sets; of the shares the range, too."""
    text = f"{math.exp(fmean(float(row['nll']) for row in rows)):.2f}"
    if not rows[0]["top1"]:
        return text
    top1 = fmean(float(row["top1"]) for row in rows)
    shares = [_share(rows, column) for column in ("r_s", "r_kl")]
    return f"{text} ({'; '.join([f'{top1:.0%}', *filter(None, shares)])})"


def _share(rows: Sequence[Row], column: str) -> str:
    found = [float(row[column]) for row in rows if row.get(column)]
    if not found:
        return ""
    spread = f", {min(found):.2f} to {max(found):.2f}" if len(found) > 1 else ""
    return f"{fmean(found):.2f}{spread}"


def _origin(rows: Sequence[Row]) -> str:
    """Where the rows come from, which libraries they are of, and what was wrong with one."""
    first = rows[0]
    sets = len({_set_of(row) for row in rows})
    runs = dict.fromkeys(f"{row['date']}, commit {row['commit']}" for row in rows)
    notes = [f"{r['method']}, {r['pattern']}: {r['note']}" for r in rows if r.get("note")]
    sentences = [
        f"{first['model']}, {first['calibration_rows']} calibration "
        + (f"(mean of {sets} sets) " if sets > 1 else "")
        + f"and {first['validation_rows']} validation rows, {_documents(rows)}; "
        f"{first['device']}, torch {first['torch']}, {'; '.join(runs)}, "
        "`python -m bench.accuracy`.",
        _libraries(rows),
        f"Notes: {'; '.join(dict.fromkeys(notes))}." if notes else "",
    ]
    return "\n".join(filter(None, sentences))


def _documents(rows: Sequence[Row]) -> str:
    """Of how many documents calibration rows are; older cases took the first rows of the file."""
    numbers = dict.fromkeys(row.get("documents", "") for row in rows)
    if not any(numbers):
        return "the former following one another in the file"
    return f"the former of {' or '.join(numbers)} documents"


def seconds(results: Path) -> str:
    """What the methods take at 2:4, a row a model and machine, in seconds and times SparseGPT's.

    Of several calibration sets the fastest run, since others may have run beside it.
    """
    from bench.tables import every, newest

    found: dict[str, list[Row]] = {}
    for rows in latest(results).values():
        for row in rows:
            data = f"{row['calibration_rows']} rows"
            found.setdefault(f"{row['model']}, {data} | {_machine(row)}", []).append(row)
    for rows in newest(results, "encoder-accuracy"):
        for row in rows:
            data = f"{row['calibration_sentences']} sentences"
            found.setdefault(f"all-MiniLM-L6-v2, {data} | {_machine(row)}", []).append(row)
    for rows in every(results, "cost"):
        for row in rows:
            if row["streamed"] == "False":
                data = (
                    f"{row['blocks']} blocks, {row['rows']} rows of {int(row['length']):,} tokens"
                )
                found.setdefault(f"{row['model']}, {data} | {_machine(row)}", []).append(row)
    lines = [["model and data", "device", *TIMED], ["---"] * (2 + len(TIMED))]
    for case, rows in found.items():
        taken = {
            method: min(
                float(row["seconds"])
                for row in rows
                if row["method"] == method and row.get("pattern", "2:4") == "2:4"
            )
            for method in {row["method"] for row in rows if row.get("pattern", "2:4") == "2:4"}
            if method in TIMED
        }
        base = taken.get(TIMED[0])
        if base is not None and base >= LONG and len(taken) > 1:
            cells = [
                f"{taken[m]:.0f} s, {taken[m] / base:.1f}" if m in taken else "-" for m in TIMED
            ]
            lines.append([case, *cells])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{text}\n\nSeconds for the whole verb at 2:4, and how many times SparseGPT's: rows of "
        "`bench.accuracy`, `bench.encoder_accuracy` and `bench.cost`.\n"
    )


def _machine(row: Row) -> str:
    """The GPU, or the processor and on how many threads."""
    on_cpu = row.get("driver") == "-"
    return f"{row['device']}, {row['threads']} thread(s)" if on_cpu else row["device"]


def announced(results: Path) -> str:
    """What `best` and `thorough` said that they would take, and what they took."""
    from bench.tables import every

    told: dict[tuple[str, ...], Row] = {}
    for rows in every(results, "cost"):
        for row in rows:
            if row.get("announced"):
                told[tuple(row[key] for key in ("device", "model", "blocks", "method"))] = row
    lines = [["model", "method", "announced", "taken", "ratio"], ["---"] * 5]
    for row in told.values():
        said, taken = float(row["announced"]), float(row["seconds"])
        one = f"{row['model']}, {row['blocks']} blocks, {row['rows']} x {row['length']} tokens"
        figures = [f"{said:.1f} s", f"{taken:.1f} s", f"{taken / said:.2f}"]
        lines.append([one, row["method"], *figures])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    runs = dict.fromkeys(f"{_run(row)}, {row['threads']} threads" for row in told.values())
    return (
        f"{text}\n\nLlamas of random weights, at 2:4; {'; '.join(runs)}, `python -m bench.cost`.\n"
    )


def cost(results: Path) -> str:
    """Seconds and memory of a method at real sizes, the last row of each case."""
    from bench.tables import every

    cases: dict[tuple[str, ...], Row] = {}
    for rows in every(results, "cost"):
        for row in (row for row in rows if row["peak_gib"]):
            cases[
                tuple(row[key] for key in ("device", "model", "blocks", "streamed", "method"))
            ] = row
    lines = [["model", "blocks", "method", "seconds", "peak GiB"], ["---"] * 5]
    for row in cases.values():
        method = row["method"] + (", streamed" if row["streamed"] == "True" else "")
        seconds, peak = float(row["seconds"]), float(row["peak_gib"])
        lines.append([row["model"], row["blocks"], method, f"{seconds:.1f}", f"{peak:.1f}"])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    first = next(iter(cases.values()))
    runs = dict.fromkeys(f"{row['date']}, commit {row['commit']}" for row in cases.values())
    return (
        f"{text}\n\nThe sizes of the model, random weights in bfloat16, every linear layer of the "
        f"blocks made 2:4 on {first['rows']} x {first['length']} random tokens; the peak is of "
        f"memory on the GPU, the model included; {first['device']}, torch {first['torch']}, "
        f"{'; '.join(runs)}, `python -m bench.cost`.\n"
    )


def _libraries(rows: Sequence[Row]) -> str:
    """Which versions of other libraries there are rows of."""
    named = ", ".join(filter(None, dict.fromkeys(row.get("library", "") for row in rows)))
    return f"Other libraries: {named}." if named else ""


def vision_accuracy(results: Path) -> str:
    """Top-1 of a small vision transformer, a row a method and a column a pattern, mean of seeds."""
    from bench.tables import newest

    return "\n".join(map(_vision_table, newest(results, "vision-accuracy")))


def encoder_accuracy(results: Path) -> str:
    """Cosine of a sentence encoder's embeddings to dense, a row a method and a column a pattern."""
    from bench.tables import newest

    return "\n".join(map(_encoder_table, newest(results, "encoder-accuracy")))


def _vision_table(rows: Sequence[Row]) -> str:
    first, seeds = rows[0], len({row["seed"] for row in rows})
    origin = (
        f"Mean and range of {seeds} seeds, on {first['left_out']} digits left out; a vision "
        f"transformer of {first['layers']} blocks of width {first['hidden']}; {_run(first)}, "
        f"`python -m bench.vision_accuracy`. {_libraries(rows)}"
    )
    table = _by_pattern(rows, "top-1; KL to dense", "{:.1%}", "top1", "kl")
    return f"{table}\n\n{origin.rstrip()}\n"


def _encoder_table(rows: Sequence[Row]) -> str:
    first = rows[0]
    origin = (
        f"all-MiniLM-L6-v2, {first['calibration_sentences']} calibration and "
        f"{first['test_sentences']} other sentences; {_run(first)}, "
        f"`python -m bench.encoder_accuracy`. {_libraries(rows)}"
    )
    return (
        _by_pattern(rows, "mean cosine to dense", "{:.3f}", "cosine") + f"\n\n{origin.rstrip()}\n"
    )


def _by_pattern(
    rows: Sequence[Row], head: str, form: str, column: str, divergence: str = ""
) -> str:
    """A row a method that has figures, a column a pattern; of several rows the mean and range.

    Of the divergence, if there is a column of it, the mean.
    """
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    cells: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row[column]:
            by_pattern = cells.setdefault(row["method"], {})
            by_pattern.setdefault(row["pattern"], []).append(row)
    lines = [[head, *patterns], ["---"] * (1 + len(patterns))]

    def cell(found: Sequence[Row]) -> str:
        text = _spread([float(row[column]) for row in found], form)
        diverged = [float(row[divergence]) for row in found if divergence and row[divergence]]
        return f"{text}; {fmean(diverged):.3f}" if diverged else text

    for name, found in cells.items():
        lines.append([name, *[cell(found[p]) if p in found else "-" for p in patterns]])
    missing = dict.fromkeys(f"{r['method']}: {r['note']}" for r in rows if not r[column])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return text + (f"\n\nWithout a figure: {'; '.join(missing)}." if missing else "")


def _spread(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(fmean(values)) + (f" ({low} to {high})" if low != high else "")


def _run(row: Row) -> str:
    return f"{row['device']}, torch {row['torch']}, {row['date']}, commit {row['commit']}"
