"""The README's two tables, for `bench.tables`, which imports this module.

They are cut from the rows of larger ones, which the docs have whole; what loses stays.
"""

from collections.abc import Mapping
from pathlib import Path

from bench.accuracy_tables import PAPER, latest, table
from bench.prefill_tables import latest as latest_prefill

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
    from bench.tables import newest  # here, because it imports this module

    decode = [row for row in newest(results, "decode")[-1] if row["layer"] == LAYER]
    prefill = [row for row in latest_prefill(results)[-1] if row["layer"] == LAYER]
    found = {(row["candidate"], int(row["tokens"])): _ratio(row) for row in [*decode, *prefill]}
    heads = ["times dense bf16", *[f"{n:,} token{'s' * (n != 1)}" for n in (*FEW, MANY)]]
    lines = [heads, ["---"] * len(heads)]
    for name, few, many in KINDS:
        cells = [found.get((few, n), "-") for n in FEW] + [found.get((many, MANY), "-")]
        lines.append([name, *cells])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    first = decode[0]
    runs = dict.fromkeys(f"{r['date']}, commit {r['commit']}" for r in (decode[0], *prefill))
    return (
        f"{text}\n{LAYER}, {first['out']} x {first['in']}; ratio to dense cuBLAS, bold where it is "
        "faster; random weights, cold, one CUDA graph, median; rounding inputs is in the time; "
        f"{first['device']}, driver {first['driver']}, torch {first['torch']}, "
        f"{'; '.join(runs)}, `python -m bench.decode`, `python -m bench.prefill`.\n"
    )


def _ratio(row: Mapping[str, str]) -> str:
    if not row["vs_cublas"]:
        return "-"
    text = f"{float(row['vs_cublas']):.2f}"
    return f"**{text}**" if float(row["vs_cublas"]) > 1 else text
