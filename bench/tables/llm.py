"""The table of a language model's tokens a second."""

from pathlib import Path

from bench.lib.results import Row, every
from bench.tables.markdown import bold, page, runs, without_figure

DENSE, STEPS, CUSTOM = "dense", "steps", "custom_generate"
SHORT = {"bfloat16": "bf16", "float32": "fp32"}
NAMES = {  # the dtype stands for itself
    DENSE: "dtype",
    "semi24": "2:4, dtype",
    "semi24_fp8": "2:4, fp8",
    "semi24_int8": "2:4, int8",
    "semi24_int4": "2:4, int4",
    "int8": "int8",
    "int4": "int4",
    "block:64x64": "80 % blocks, dtype",
    "int8_dynamic": "int8, dynamic",
    "semi24_int8_dynamic": "2:4, int8, dynamic",
    "fp8_dynamic": "fp8, dynamic",
    "semi24_fp8_dynamic": "2:4, fp8, dynamic",
}
LOOPS = {
    STEPS: "its own",
    CUSTOM: "`generate(custom_generate=...)`",
    "generate": "transformers' `generate`, static cache, compiled",
}
FIRST = ("1", "1024")  # batch and prompt of the case that stands first
HEADS = (
    "weights",
    "head",
    "loop",
    "tokens/s",
    "to dense",
    "ms to the first",
    "allocated GB",
    "peak GB",
)


def llm(results: Path) -> str:
    """For each GPU and case, every configuration of its last run, those that lose too."""
    return "\n".join(_table(case) for case in latest(results) if _on_gpu(case[0]))


def llm_cpu(results: Path) -> str:
    """The same for each CPU."""
    return "\n".join(_table(case) for case in latest(results) if not _on_gpu(case[0]))


def llm_short(results: Path) -> str:
    """One sequence after a prompt of 1,024 tokens: of each format the fastest, by two loops."""
    cases = (case for case in latest(results) if (case[0]["batch"], case[0]["prompt"]) == FIRST)
    return "\n".join(_table(_fastest(case)) for case in cases)


def _fastest(rows: list[Row]) -> list[Row]:
    """Of each format and loop the fastest row, but for the loop that lies between the two."""
    measured = sorted(
        (row for row in rows if not row["note"] and row["loop"] != CUSTOM), key=_speed
    )
    return list({(row["format"], row["loop"]): row for row in measured}.values())


def latest(results: Path) -> list[list[Row]]:
    """For each device, dtype, model, batch and prompt, a row of each configuration: its last."""
    cases: dict[tuple[str, ...], dict[tuple[str, str, str], Row]] = {}
    for rows in every(results, "llm"):
        for row in rows:
            sizes = (row[name] for name in ("model", "blocks", "batch", "prompt"))
            case = row["device"], _dtype(row), *sizes
            row.setdefault("loop", STEPS)
            cases.setdefault(case, {})[row["format"], row["head"], row["loop"]] = row
    return [list(rows.values()) for rows in cases.values()]


def _table(rows: list[Row]) -> str:
    first = rows[0]
    measured = sorted((row for row in rows if not row["note"]), key=_speed)
    dense = {row["loop"]: row for row in measured if row["format"] == DENSE}
    lines = [_line(row, dense.get(row["loop"])) for row in measured]
    on_gpu = _on_gpu(first)
    place = f"driver {first['driver']}" if on_gpu else f"{first['threads']} threads"
    made = " or ".join(map(str, sorted({int(row["tokens"]) for row in rows})))
    origin = (
        f"{first['model']}'s sizes, {first['blocks']} blocks, batch {first['batch']}, "
        f"{made} tokens after a prompt of {int(first['prompt']):,}; random weights in "
        f"{_dtype(first)}, so this is speed alone. Ratios are to {SHORT[_dtype(first)]} without "
        f"zeros in the same loop, its linear layers by {'cuBLAS' if on_gpu else 'torch'}. "
        f"{first['device']}, {place}, torch {first['torch']}, {runs(rows)}, "
        "`python -m bench.run.llm`."
    )
    failed = [f"{row['format']} by {row['loop']}: {row['note']}" for row in rows if row["note"]]
    return page(HEADS, lines, origin, without_figure(failed))


def _speed(row: Row) -> float:
    return float(row["tokens_s"])


def _line(row: Row, dense: Row | None) -> list[str]:
    ratio = "-" if dense is None else bold(float(dense["ms"]) / float(row["ms"]))
    sizes = [f"{int(row[n]) / 1e9:.2f}" if row[n] else "-" for n in ("allocated", "peak")]
    names = [NAMES[row[n]].replace("dtype", SHORT[_dtype(row)]) for n in ("format", "head")]
    return [
        *names,
        LOOPS[row["loop"]],
        f"{float(row['tokens_s']):,.0f}",
        ratio,
        row["first_ms"],
        *sizes,
    ]


def _dtype(row: Row) -> str:
    """The dtype of the weights; the first rows do not say, and are of bfloat16."""
    return row.get("dtype", "bfloat16")


def _on_gpu(row: Row) -> bool:
    return row["driver"] != "-"
