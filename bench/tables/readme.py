"""The README's two tables, cut from larger ones that the docs have whole; what loses stays."""

from pathlib import Path

from bench.lib.paper import PAPER
from bench.lib.results import Row
from bench.tables.accuracy import latest, table
from bench.tables.candidates import latest as latest_of
from bench.tables.markdown import page, runs, vs_cublas

METHODS = ("dense", "magnitude", PAPER, "blockwise(alps)", "thorough")
PATTERNS = ("2:4", "unstructured:0.5@layer")

LAYER = "Llama-3-8B gate_up"
FEW, MANY = (1, 16, 64), 4096
# What stands in a row: its name, the candidate at few tokens, the candidate at many.
KINDS = (
    ("2:4", "semi24", "accelerate_"),
    ("2:4, int4 weights", "semi24_int4", "semi24_int4 prefill"),
    ("2:4, int8 weights and inputs", "semi24_int8", "semi24_int8_dynamic prefill"),
    ("dense, int4 weights", "int4", ""),
    ("dense, int4 weights, by torch", "tinygemm int4", ""),
    ("dense, fp8 weights and inputs, by torch", "", "fp8_dynamic torch"),
    ("2:4, cuSPARSELt as torch calls it", "cusparselt alg 0", "cusparselt alg 0"),
)


def accuracy_short(results: Path) -> str:
    """Perplexity and more: a few methods, two patterns, the case with most calibration data."""
    return table(accuracy_rows(results))


def accuracy_rows(results: Path) -> list[Row]:
    """The rows of a few methods and two patterns, of the case with most calibration data."""
    cases = latest(results)
    rows = cases[max(cases, key=lambda case: case[1:3])]
    return [r for r in rows if r["method"] in METHODS and r["pattern"] in PATTERNS]


def speed_short(results: Path) -> str:
    """Ratios to dense cuBLAS of one layer: a row a kind, a column a number of tokens."""
    heads = ["times dense bf16", *[f"{n:,} token{'s' * (n != 1)}" for n in (*FEW, MANY)]]
    lines = [
        [name, *[vs_cublas(found[n]) if n in found else "-" for n in (*FEW, MANY)]]
        for name, found in speeds(results).items()
    ]
    decode, prefill = _rows(results)
    first = decode[-1]
    origin = (
        f"{LAYER}, {first['out']} x {first['in']}; ratio to dense cuBLAS, bold where it is "
        "faster; random weights, cold, one CUDA graph, median; rounding inputs is in the time; "
        f"{first['device']}, driver {first['driver']}, torch {first['torch']}, "
        f"{runs([*decode, *prefill])}, `python -m bench.decode`, `python -m bench.prefill`."
    )
    return page(heads, lines, origin)


def speeds(results: Path) -> dict[str, dict[int, Row]]:
    """The layer's rows by kind and number of tokens, of those that were measured."""
    decode, prefill = _rows(results)
    rows = {(row["candidate"], int(row["tokens"])): row for row in [*decode, *prefill]}
    wanted = {name: {**dict.fromkeys(FEW, few), MANY: many} for name, few, many in KINDS}
    return {
        name: {n: rows[one, n] for n, one in candidates.items() if (one, n) in rows}
        for name, candidates in wanted.items()
    }


def _rows(results: Path) -> tuple[list[Row], list[Row]]:
    """The layer's rows at few tokens and at many."""
    few, many = latest_of(results, "decode")[-1], latest_of(results, "prefill")[-1]
    return [row for row in few if row["layer"] == LAYER], [r for r in many if r["layer"] == LAYER]
