"""Which pattern to take: every kind has a line, sums are of both layers, and gaps are told."""

import csv
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.lib.results import RESULTS
from bench.tables import patterns as module
from bench.tables.pages import FIGURES, TABLES
from bench.tables.patterns import KINDS, LAYERS, MISSING, patterns, patterns_figure

SVG = "{http://www.w3.org/2000/svg}"
COMMON = {"date": "2026-12-01", "device": "GPU", "torch": "2.11", "commit": "abc"}


def written(folder: Path, bench: str, rows: list[dict[str, str]]) -> None:
    with (folder / f"{bench}_2026-12-01_gpu_abc.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def timed(layer: str, count: int, candidate: str, us: float, ratio: float) -> dict[str, str]:
    figures = {"us": str(us), "vs_cublas": str(ratio)}
    return {**COMMON, "layer": layer, "tokens": str(count), "candidate": candidate, **figures}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """2:4 at both layers, 4:8 at one of them, and losses of 2:4 and 4:8 alone."""
    gate_up, down = LAYERS
    written(
        tmp_path,
        "decode",
        [
            timed(gate_up, 1, "semi24", 20, 3.0),
            timed(down, 1, "semi24", 20, 1.0),
            timed(gate_up, 1, "semi48", 25, 2.0),
        ],
    )
    written(tmp_path, "prefill", [timed(gate_up, 4096, "semi24 prefill", 1000, 1.5)])
    written(
        tmp_path,
        "blocks",
        [timed(f"{one} block:64x64@0.8", 1, "block decode", 5, 4.0) for one in LAYERS],
    )
    names = ("2:4 bfloat16, sparsegpt", "4:8 bfloat16, sparsegpt")
    case = {"model": "small", "calibration_rows": "32", "seed": "0", "validation_rows": "16"}
    loss = {"dnll": "0.25", "kl": "0.5"}
    written(tmp_path, "bytes", [{**COMMON, **case, "recipe": name, **loss} for name in names])
    return tmp_path


def test_times_are_sums_and_what_was_not_measured_is_told(results: Path) -> None:
    said = patterns(results).splitlines()[2 : 2 + len(KINDS)]
    lines = {line.split("|")[1].strip(): line for line in said}
    assert list(lines) == list(KINDS)
    # 60 + 20 us dense, 40 us in 2:4; of many tokens one layer alone was measured
    assert lines["2:4"].startswith("| 2:4 | 0.250 | 0.500 | 0.040 (**2.00**) |")
    assert lines["2:4"].endswith(f"| {MISSING} | {MISSING} |")
    assert lines["4:8"] == "| 4:8 | 0.250 | 0.500 |" + 3 * f" {MISSING} |"
    assert f"| block 64x64, 80% | {MISSING} | {MISSING} | 0.010 (**4.00**) |" in patterns(results)


def test_a_dot_needs_both_a_loss_and_a_time(results: Path) -> None:
    root = ElementTree.fromstring(patterns_figure(results))
    assert len(list(root.iter(f"{SVG}circle"))) == 1
    assert "2:4 (0.50)" in [text.text for text in root.iter(f"{SVG}text")]  # above the axis


def test_the_page_has_them() -> None:
    root = ElementTree.fromstring(patterns_figure(RESULTS))
    names = {text.text for text in root.iter(f"{SVG}text")}
    assert {"dense", "2:4", "4:8", "unstructured 50%", "2:4, int4"} <= names
    assert TABLES["patterns"] is patterns
    assert FIGURES[Path(module.__file__).parents[2] / "docs" / "patterns.svg"] is patterns_figure
