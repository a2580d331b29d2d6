"""The README's two tables, cut from larger ones that the docs have whole; what loses stays."""

from pathlib import Path

from bench.lib.paper import PAPER
from bench.lib.results import newest
from bench.tables.accuracy import latest, table
from bench.tables.markdown import page, runs, vs_cublas
from bench.tables.prefill import latest as latest_prefill

METHODS = ("dense", "magnitude", PAPER, "blockwise(alps)", "thorough")
PATTERNS = ("2:4", "unstructured:0.5@layer")

LAYER = "Llama-3-8B gate_up"
FEW, MANY = (1, 16, 64), 4096
# What stands in a row: its name, the candidate at few tokens, the candidate at many.
KINDS = (
    ("2:4", "semi24", "accelerate_"),
    ("2:4, int4 weights", "semi24_int4", ""),
    ("2:4, int8 weights and inputs", "semi24_int8", "semi24_int8_dynamic prefill"),
    ("dense, int4 weights, by torch", "tinygemm int4", ""),
    ("dense, fp8 weights and inputs, by torch", "", "fp8_dynamic torch"),
    ("2:4, cuSPARSELt as torch calls it", "cusparselt alg 0", "cusparselt alg 0"),
)


def accuracy_short(results: Path) -> str:
    """Perplexity and more: a few methods, two patterns, the case with most calibration data."""
    cases = latest(results)
    rows = cases[max(cases, key=lambda case: case[1:3])]
    return table([r for r in rows if r["method"] in METHODS and r["pattern"] in PATTERNS])


def speed_short(results: Path) -> str:
    """Ratios to dense cuBLAS of one layer: a row a kind, a column a number of tokens."""
    decode = [row for row in newest(results, "decode")[-1] if row["layer"] == LAYER]
    prefill = [row for row in latest_prefill(results)[-1] if row["layer"] == LAYER]
    found = {(row["candidate"], int(row["tokens"])): vs_cublas(row) for row in [*decode, *prefill]}
    heads = ["times dense bf16", *[f"{n:,} token{'s' * (n != 1)}" for n in (*FEW, MANY)]]
    lines = [
        [name, *[found.get((few, n), "-") for n in FEW], found.get((many, MANY), "-")]
        for name, few, many in KINDS
    ]
    first = decode[0]
    origin = (
        f"{LAYER}, {first['out']} x {first['in']}; ratio to dense cuBLAS, bold where it is "
        "faster; random weights, cold, one CUDA graph, median; rounding inputs is in the time; "
        f"{first['device']}, driver {first['driver']}, torch {first['torch']}, "
        f"{runs([first, *prefill])}, `python -m bench.decode`, `python -m bench.prefill`."
    )
    return page(heads, lines, origin)
